"""The layout holds: who imports whom, what loads torch, and that the README's file map is the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "autoprune"

# Each may import only what stands below it.
ORDER = ["__main__", "cli", "__init__", "api", "actions", "exporting",
         "report", "search", "study", "measure", "deploy", "compress", "space", "workloads"]  # fmt: skip
# What the runtime executed is read back in deploy and told in the record of a measurement, which is plain data.
SHARED_RECORD = ("deploy", "autoprune.measure.record")
GROUND = {
    "bound",
    "config",
    "disk",
    "execution",
    "target",
    "yaml_io",
    "errors",
    "clock",
    "naming",
    "printing",
    "storage_url",
    "faults",
}
TORCH_FREE = ["*.py", "space/*.py", "study/*.py", "report/*.py",
              "measure/record.py", "measure/stats.py", "measure/truth_table.py", "deploy/known_formats.py",
              "cli/*.py"]  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)


def imports(path: Path, only_at_import: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, without those for type checking alone."""
    nodes: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))


def stage(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def rank(name: str) -> int:
    return len(ORDER) if name in GROUND else ORDER.index(name)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_folders_below(path: Path) -> None:
    own = stage(path)
    for name in imports(path):
        if not name.startswith("autoprune."):
            continue
        other = name.split(".")[1]
        if other in ("__version__", own) or (own, ".".join(name.split(".")[:3])) == SHARED_RECORD:
            continue
        assert own not in GROUND or other in GROUND, f"{path.name} imports {name}"
        assert own in GROUND or rank(other) > rank(own), f"{path.name} imports {name}"


def test_every_folder_has_its_place_in_the_order() -> None:
    found = {stage(path) for path in modules()}
    assert found == {*ORDER, *GROUND}


@pytest.mark.parametrize("pattern", TORCH_FREE)
def test_torch_free_files_do_not_import_torch(pattern: str) -> None:
    for path in PACKAGE.glob(pattern):
        assert not [name for name in imports(path, only_at_import=True) if name.split(".")[0] == "torch"], (
            path
        )


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["search", "--help"], ["studies"], ["front", "nothing"], ["spaces"]]
)
def test_these_verbs_load_neither_torch_nor_ray(words: list[str]) -> None:
    code = (
        "import sys; from autoprune.cli.main import main; "
        f"main({words!r}); print(sorted({{'torch', 'ray', 'torchvision'}} & set(sys.modules)))"
    )
    result = in_a_process(code)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


def test_importing_the_library_costs_nothing() -> None:
    result = in_a_process("import sys, autoprune; print(autoprune.__version__, 'torch' in sys.modules)")
    assert result.stdout.split() == [__import__("autoprune").__version__, "False"]


def file_map() -> str:
    """Return the file map that the README should hold, from the modules' docstrings."""
    lines, shown = ["autoprune/"], set()
    # The files of a folder before its folders.
    files = sorted(modules(), key=lambda path: (path.parent != PACKAGE, path.parent, path.name))
    for path in files:
        relative = path.relative_to(PACKAGE)
        indent = "  "
        if path.parent != PACKAGE:
            indent = "    "
            if path.name == "__init__.py" or relative.parent not in shown:
                if relative.parent not in shown:
                    shown.add(relative.parent)
                    lines.append(
                        f"  {str(relative.parent) + '/':<24}{purpose(path.parent / '__init__.py')}".rstrip()
                    )
                if path.name == "__init__.py":
                    continue
        lines.append(f"{indent}{path.name:<{26 - len(indent)}}{purpose(path)}".rstrip())
    return "\n".join(lines)


def purpose(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?:\s|$)", re.sub(r"\s+", " ", text.strip()))[0].replace("``", "`")


def test_every_file_says_what_it_is_for() -> None:
    assert [str(path.relative_to(PACKAGE)) for path in modules() if not purpose(path)] == []


def test_the_file_map_of_the_readme_is_the_tree() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- file-map -->\n```\n(.*?)\n?```", readme, re.DOTALL)
    assert found, "the README lacks its file map"
    assert found.group(1) == file_map(), "refresh it: python tests/test_layout.py"


def test_shipped_search_spaces_are_where_the_wheel_takes_them_from() -> None:
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert '"search_spaces" = "autoprune/_data/search_spaces"' in settings
    assert {path.stem for path in (REPOSITORY / "search_spaces").iterdir()} == {
        "default",
        "structured",
        "int8",
        "lowbit",
        "quick",
        "sparse",
    }


def refresh() -> None:
    """Write the file map into the README."""
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = f"<!-- file-map -->\n```\n{file_map()}\n```"
    readme.write_text(
        re.sub(r"<!-- file-map -->\n```\n.*?```", lambda _: block, text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    refresh()
