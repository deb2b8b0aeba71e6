"""Search spaces from files: shipped by name, or the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from autoprune.config import describe_faults
from autoprune.errors import UsageError
from autoprune.naming import unknown_name
from autoprune.space.search_space import SearchSpace
from autoprune.yaml_io import YamlDocument, parse_yaml, read_yaml


def shipped_folder() -> Path:
    """Return the folder of the search spaces that autoprune ships.

    Raises:
        UsageError: If the installation lacks them.
    """
    installed = Path(str(resources.files("autoprune"))) / "_data" / "search_spaces"
    # In a checkout, and so in an editable install, they lie beside the package.
    for folder in (installed, Path(__file__).resolve().parents[2] / "search_spaces"):
        if folder.is_dir():
            return folder
    raise UsageError("the search spaces that autoprune ships are missing", "install autoprune again")


def shipped_spaces() -> dict[str, Path]:
    """Return the shipped search spaces by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def load_space(name_or_path: str) -> SearchSpace:
    """Load a shipped search space by name, or one of the user's own from a YAML file.

    Raises:
        UsageError: If the name is unknown or the file is no search space; with file and line.
    """
    return parse_space(read_yaml(space_path(name_or_path)))


def space_path(name_or_path: str) -> Path:
    """Return the file of a search space.

    Raises:
        UsageError: If the name is unknown.
    """
    shipped = shipped_spaces()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or "\\" in name_or_path:
        return Path(name_or_path)
    raise unknown_name(
        "search space", name_or_path, shipped, "or give a YAML file; `autoprune spaces copy` writes one"
    )


def parse_space(document: YamlDocument | str) -> SearchSpace:
    """Validate a search space.

    Args:
        document: What was read, or YAML text.

    Raises:
        UsageError: With all faults at once, each with its line, name, value and what is allowed.
    """
    if isinstance(document, str):
        document = parse_yaml(document, "search space")
    if not isinstance(document.values, dict):
        raise UsageError(
            f"{document.name}:1: a search space is a mapping of settings, not {document.values!r:.60}"
        )
    for key in document.values:
        if key not in SearchSpace.model_fields:
            error = unknown_name("setting", key, SearchSpace.model_fields)
            raise UsageError(f"{document.name}:{document.line((key,))}: {error.message}", error.hint)
    try:
        return SearchSpace.model_validate(document.values)
    except ValidationError as error:
        raise UsageError(describe_faults(document.name, error, document.line)) from None
    except UsageError as error:
        raise UsageError(f"{document.name}: {error.message}", error.hint) from None


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of search spaces, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SearchSpace.model_json_schema()}
