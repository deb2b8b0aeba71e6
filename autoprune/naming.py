"""All that concerns names: near matches, study names, and every path inside a study."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoprune.errors import UsageError

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# Folder inside of an artifact that holds the files of further targets.
TARGETS_FOLDER = "targets"


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UsageError:
    """Build the error for a name that is not in a closed list.

    Args:
        kind: What the name stands for, such as ``criterion``.
        name: The name that was given.
        known: All names that are allowed.
        hint: What to do next; empty for none.

    Returns:
        An error whose message holds near matches and the list (its first 40 names).
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    message = f"unknown {kind} {name!r}"
    if near:
        message += "; did you mean " + " or ".join(repr(match) for match in near) + "?"
    shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    return UsageError(f"{message}\nknown: {shown}", hint)


def check_study_name(name: str) -> str:
    """Return ``name`` if it can be a study's name, which is also its folder.

    Raises:
        UsageError: If the name has a character outside ``A-Z a-z 0-9 . _ -``, does not begin with a
            letter or digit, or is longer than 64 characters.
    """
    if STUDY_NAME.fullmatch(name) and ".." not in name:
        return name
    shown = name if len(name) <= 40 else name[:40] + "…"
    raise UsageError(
        f"study name {shown!r} cannot be used: 1 to 64 of A-Z a-z 0-9 . _ -, "
        "beginning with a letter or digit, without '..'",
        "choose another with --study NAME",
    )


def check_entry_name(kind: str, name: str) -> str:
    """Return ``name`` if a file or folder of a study may be called so wherever it is kept.

    Raises:
        UsageError: If it has a character outside ``A-Z a-z 0-9 . _ -``, begins with another than a letter or digit,
            holds ``..``, or is longer than 128 characters.
    """
    if _ENTRY_NAME.fullmatch(name) and ".." not in name:
        return name
    raise UsageError(
        f"{kind} name {name[:60]!r} cannot be used: 1 to 128 of A-Z a-z 0-9 . _ -, "
        "beginning with a letter or digit, without '..'"
    )


def inner_parts(text: str) -> tuple[str, ...]:
    """Return the parts of a path that was read from a file and has to lie inside of a folder.

    Raises:
        UsageError: If it could lie outside: an absolute path, ``..``, empty parts, backslashes, control characters.
    """
    parts = tuple(text.split("/"))
    sound = all(part not in ("", ".", "..") and len(os.fsencode(part)) <= 255 for part in parts)
    if sound and "\\" not in text and text.isprintable() and len(parts) <= 32:
        return parts
    raise UsageError(f"path {text[:60]!r} is refused: allowed are names inside of the folder, without '..'")


def default_study_name(model: str, data: str, target: str) -> str:
    """Return a valid study name made of the model's, data's and target's names."""
    parts = (re.sub(r"[^A-Za-z0-9]+", "-", Path(text).name or text) for text in (model, data, target))
    joined = "-".join(part.strip("-") for part in parts if part.strip("-"))
    return check_study_name((joined or "study")[:64].rstrip(".-_"))


def studies_root() -> Path:
    """Return the folder of all studies: ``AUTOPRUNE_STUDIES``, else ``studies`` here."""
    return Path(os.environ.get("AUTOPRUNE_STUDIES", "studies"))


def cache_root() -> Path:
    """Return the folder of cached results: ``AUTOPRUNE_CACHE``, else ``~/.cache/autoprune``."""
    given = os.environ.get("AUTOPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "autoprune"


def data_root() -> Path:
    """Return the folder of data sets: ``AUTOPRUNE_DATA``, else ``data`` in the cache folder."""
    given = os.environ.get("AUTOPRUNE_DATA")
    return Path(given) if given else cache_root() / "data"


def locks_root() -> Path:
    """Return the folder of the locks that all jobs of a host share: ``AUTOPRUNE_LOCKS``, else ``/tmp``."""
    given = os.environ.get("AUTOPRUNE_LOCKS")
    if given:
        return Path(given)
    shared = Path("/tmp")  # noqa: S108 - not the TMPDIR of a job, which others don't see
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def file_name_of(spec: str) -> str:
    """Return the word of a target as it stands in names of files, such as ``openvino-bfloat16-threads2``."""
    return spec.replace(":", "-").replace("=", "")


@dataclass(frozen=True)
class StudyPaths:
    """Every path of one study.

    Attributes:
        root: The study's folder, ``studies/<name>``.
        target: Word of the further target whose figures are meant; empty for the study's first one.
    """

    root: Path
    target: str = ""

    @classmethod
    def of(cls, name: str) -> StudyPaths:
        """Return the paths of the study ``name`` under :func:`studies_root`."""
        return cls(studies_root() / check_study_name(name))

    @property
    def name(self) -> str:
        """The study's name."""
        return self.root.name

    @property
    def settings(self) -> Path:
        """The settings that the study was started with."""
        return self.root / "settings.yaml"

    @property
    def database(self) -> Path:
        """The Optuna database, the one record of the study."""
        return self.root / "study.db"

    @property
    def storage(self) -> Path:
        """The file that says in which database the record is, where it is not the one of the folder."""
        return self.root / "storage.json"

    @property
    def has_record(self) -> bool:
        """Whether the folder holds the record, or says where it is."""
        return self.database.is_file() or self.storage.is_file()

    @property
    def database_copy(self) -> Path:
        """A copy of the database as it was found sound last, which takes the place of a damaged one."""
        return self.root / "study.db.copy"

    @property
    def screens(self) -> Path:
        """Recipes that the default search looked at without making them trials."""
        return self.root / "screens.jsonl"

    @property
    def profile(self) -> Path:
        """What every choice for every group costs and buys, as the default search measured it."""
        return self.root / "profile.json"

    @property
    def lock(self) -> Path:
        """The file that the one driver of the study holds locked."""
        return self.root / "driver.lock"

    @property
    def environment(self) -> Path:
        """Versions, host and seeds of the study."""
        return self.root / "env.json"

    @property
    def artifacts(self) -> Path:
        """The folder that holds one folder for each kept trial."""
        return self.root / "artifacts"

    def artifact(self, number: int) -> Path:
        """Return the artifact folder of trial ``number``."""
        return self.artifacts / f"trial-{number:05d}"

    def final_artifact(self, number: int, round: int, variant: str = "") -> Path:
        """Return the artifact folder of the final trial that continued trial ``number`` in final phase ``round``.

        ``variant`` tells several of one network apart.
        """
        return self.artifacts / f"trial-{number:05d}-final{round}{f'-{variant}' if variant else ''}"

    def recovered(self, number: int, round: int) -> Path:
        """Return the folder of the weights that the recovery of trial ``number`` gave in final phase ``round``."""
        return self.artifacts / f"trial-{number:05d}-recovered{round}"

    @property
    def front_csv(self) -> Path:
        """The front as a table."""
        return self._of_target("front", ".csv")

    @property
    def front_png(self) -> Path:
        """The front as a picture."""
        return self._of_target("front", ".png")

    @property
    def robustness(self) -> Path:
        """What was measured on corrupted images."""
        return self.root / "robustness.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self._of_target("report", ".html")

    def on_target(self, spec: str) -> StudyPaths:
        """Return the paths of what is told of a further target."""
        return StudyPaths(self.root, spec)

    def in_artifact(self, folder: Path) -> Path:
        """Return the folder of the target's own files inside of an artifact's folder."""
        return folder / TARGETS_FOLDER / file_name_of(self.target) if self.target else folder

    def _of_target(self, stem: str, ending: str) -> Path:
        return self.root / (
            f"{stem}-{file_name_of(self.target)}{ending}" if self.target else f"{stem}{ending}"
        )


def study_folders() -> list[Path]:
    """Return the folders that hold a study, by name."""
    root = studies_root()
    if not root.is_dir():
        return []
    found = []
    for folder in sorted(root.iterdir()):
        try:
            check_study_name(folder.name)
        except UsageError:
            continue
        if StudyPaths(folder).has_record and (folder / "settings.yaml").is_file():
            found.append(folder)
    return found
