"""Bounded YAML reader: YAML 1.2, plain data only; every fault names the file and the line."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from autoprune.errors import UsageError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
# ruamel's pure parser needs 15 microseconds for one of them; its time grows with the square of a tag's length.
MAX_NODES = 20_000
MAX_LINE = 10_000
MAX_LINES = 20_000

Location = tuple[str | int, ...]

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}
_STRING_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class YamlDocument:
    """A document that was read.

    Attributes:
        name: File name for messages.
        values: The content: mappings, lists, strings, numbers, booleans and None.
        lines: Line of every value, counted from 1, by its keys and indices from the top.
    """

    name: str
    values: Any
    lines: dict[Location, int]

    def line(self, location: Location) -> int:
        """Return the line of the value at ``location``, or of the nearest value around it."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.lines:
                return self.lines[location[:end]]
        return 1


def read_yaml(path: Path) -> YamlDocument:
    """Read a YAML file of at most 1 MB.

    Raises:
        UsageError: If the file is missing, unreadable, too large, not a regular file, or not plain YAML.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"YAML file {str(path)!r} cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"YAML file {str(path)!r} is not a regular file")
    if status.st_size > MAX_BYTES:
        raise UsageError(f"{path}:1: the file has {status.st_size:,} bytes; allowed: up to {MAX_BYTES:,}")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"YAML file {str(path)!r} cannot be read: {_reason(error)}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: the file is not UTF-8 (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parse YAML that is already in memory.

    Args:
        text: The document.
        name: What to call it in messages.

    Raises:
        UsageError: If the text is too large, too deep, not YAML, or holds anything but plain data: aliases,
            anchors, tags, duplicate keys and keys that are not text are refused.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{name}:1: {len(text):,} characters; allowed: up to {MAX_BYTES:,}")
    for number, content in enumerate(text.split("\n"), start=1):
        if number > MAX_LINES:
            raise UsageError(f"{name}:{number}: more than {MAX_LINES:,} lines")
        if "\0" in content:
            raise UsageError(f"{name}:{number}: NUL characters are not allowed")
        if len(content) > MAX_LINE:
            raise UsageError(
                f"{name}:{number}: the line has {len(content):,} characters; allowed: up to {MAX_LINE:,}"
            )
    try:
        _check_events(text, name)
        root = YAML(typ="safe", pure=True).compose(text)
        lines: dict[Location, int] = {}
        values = None if root is None else _Builder(name, lines).build(root, ())
        return YamlDocument(name, values, lines)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise UsageError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError) as error:
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position if isinstance(position, int) else 0) + 1
        problem = str(getattr(error, "reason", "") or error).splitlines()[0]
        raise UsageError(f"{name}:{line}: not valid YAML: {problem}") from None


def _check_events(text: str, name: str) -> None:
    """Refuse, before anything is built, what would cost much or is not plain data."""
    depth = nodes = documents = 0
    events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, AliasEvent):
            raise UsageError(f"{name}:{line}: aliases (*{event.anchor}) are not allowed; write the value out")
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UsageError(f"{name}:{line}: one document is allowed, a second begins here")
            if event.version not in (None, (1, 2)):
                raise UsageError(f"{name}:{line}: YAML 1.2 is read, not {'.'.join(map(str, event.version))}")
        if isinstance(event, NodeEvent):
            nodes += 1
            if nodes > MAX_NODES:
                raise UsageError(f"{name}:{line}: more than {MAX_NODES:,} values")
            if event.anchor is not None:
                raise UsageError(
                    f"{name}:{line}: anchors (&{event.anchor}) are not allowed; write the value out"
                )
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise UsageError(
                    f"{name}:{line}: tags ({_short(str(tag))}) are not allowed; write plain values"
                )
        depth += _depth_change(event)
        if depth > MAX_DEPTH:
            raise UsageError(f"{name}:{line}: nested deeper than {MAX_DEPTH} levels")


def _depth_change(event: Any) -> int:
    kind = type(event).__name__
    if kind in ("MappingStartEvent", "SequenceStartEvent"):
        return 1
    return -1 if kind in ("MappingEndEvent", "SequenceEndEvent") else 0


class _Builder:
    """Turns composed nodes into plain values and notes their lines."""

    def __init__(self, name: str, lines: dict[Location, int]) -> None:
        self._name = name
        self._lines = lines
        self._constructor = YAML(typ="safe", pure=True).constructor

    def build(self, node: Node, location: Location) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(location, line)
        if isinstance(node, MappingNode):
            return self._mapping(node, location)
        if isinstance(node, SequenceNode):
            return [self.build(child, (*location, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.build(key_node, (*location, "<key>"))
            if not isinstance(key, str):
                raise UsageError(f"{self._name}:{line}: the key {_short(key)} is not text; put it in quotes")
            if key in values:
                raise UsageError(f"{self._name}:{line}: the key {_short(key)} is there twice; keep one")
            self._lines[*location, key] = line
            values[key] = self.build(value_node, (*location, key))
        return values

    def _scalar(self, node: Node, line: int) -> Any:
        tag = str(node.tag)
        if tag not in _PLAIN_TAGS:
            if not isinstance(node, ScalarNode) or "timestamp" not in tag:
                raise UsageError(
                    f"{self._name}:{line}: {_short(node.value)} is not allowed here; put it in quotes"
                )
            tag = _STRING_TAG
        if tag == _STRING_TAG:
            return str(node.value)
        try:
            return self._constructor.construct_object(node)
        except (ConstructorError, ValueError, OverflowError):
            raise UsageError(f"{self._name}:{line}: the value {_short(node.value)} cannot be read") from None


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
