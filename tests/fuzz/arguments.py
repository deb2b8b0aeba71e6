"""Commands drawn from the real verbs and their options, with hostile values in some places."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from autoprune.cli.app import app
from tests.fuzz import hostile

NETWORK = ["--model", "cifar_resnet20", "--data", "digits"]
# Words of each verb with which it would do its work.
RIGHT: dict[str, list[str]] = {
    "search": [*NETWORK, "--budget", "5m", "--study", "new"],
    "compress": [*NETWORK, "--to", "new"],
    "groups": NETWORK,
    "profile": [*NETWORK, "--to", "new.png"],
    "sensitivity": [*NETWORK, "--to", "new"],
    "tickets": [*NETWORK, "--to", "new"],
    "front": ["s"],
    "report": ["s"],
    "export": ["s", "--trial", "1", "--to", "new"],
    "measure": ["artifact", "--data", "digits"],
    "studies": [],
    "doctor": [],
    "spaces": [],
    "spaces list": [],
    "spaces show": ["default"],
    "spaces schema": [],
    "spaces copy": ["default", "new.yaml"],
}
_GIVEN: dict[str, tuple[str, ...]] = {
    "--model": ("cifar_resnet20", "resnet18", "m.py:build"),
    "--data": ("digits", "imagefolder:images", "m.py:build"),
    "--weights": ("DEFAULT", "none", "weights.safetensors"),
    "--space": ("default", "sparse", "space.yaml"),
    "--target": ("onnxruntime", "torch:bf16", "openvino:threads=1", "onnxruntime,torch"),
    "--study": ("s", "new"),
    "--recipe": ("recipe.yaml", "artifact/recipe.json"),
    "--config": ("settings.yaml",),
    "--measurements": ("measured.json",),
}
_SETTINGS = (
    "target.threads",
    "target",
    "seed",
    "final_share",
    "also",
    "auto.lineage",
    "limits.max_size_mb",
    "objectives",
    "study",
    "x.y",
    "model.a.b",
)


@dataclass(frozen=True)
class Verb:
    """A verb.

    Attributes:
        name: Its words.
        options: Name, whether it takes a value, and whether that is a number, of each option.
        most: Positional words that it takes.
    """

    name: str
    options: tuple[tuple[str, bool, bool], ...]
    most: int


def verbs() -> dict[str, Verb]:
    """Return every verb of the command line."""
    return {verb.name: verb for verb in _verbs(typer.main.get_command(app), ())}


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[Verb]:
    if words:
        options = [p for p in command.params if p.param_type_name == "option"]
        yield Verb(
            " ".join(words),
            tuple(
                (name, not p.is_flag, p.type_descriptor.annotation in (int, float))
                for p in options
                for name in p.opts
            ),
            sum(p.param_type_name == "argument" for p in command.params),
        )
    for name, inner in getattr(command, "commands", {}).items():
        yield from _verbs(inner, (*words, name))


def command(random_: random.Random, known: dict[str, Verb]) -> list[str]:
    """Return the words of one command."""
    verb = known[random_.choice(sorted(known))]
    words = list(RIGHT[verb.name])
    for _ in range(random_.choice((0, 1, 1, 1, 2, 3))):
        words = _faulty(random_, verb, words)
    if random_.random() < 0.03:
        words = [hostile.text(random_) for _ in range(random_.randrange(5))]
    return [*verb.name.split(), *words]


def _faulty(random_: random.Random, verb: Verb, words: list[str]) -> list[str]:
    kind = random_.random()
    if kind < 0.15 and words:
        words[random_.randrange(len(words))] = hostile.text(random_)
    elif kind < 0.2 and words:
        del words[random_.randrange(len(words))]
    elif kind < 0.25:
        words.insert(random_.randrange(len(words) + 1), hostile.text(random_))
    elif kind < 0.35:
        words.append(f"{random_.choice(_SETTINGS)}={_any(random_)}")
    elif verb.options:
        name, takes, is_number = random_.choice(verb.options)
        value = hostile.number(random_) if is_number and random_.random() < 0.8 else _any(random_)
        if name in _GIVEN and random_.random() < 0.3:
            value = random_.choice(_GIVEN[name])
        if name in words and random_.random() < 0.7 and words.index(name) + 1 < len(words):
            words[words.index(name) + 1] = value
        else:
            own = [name] if not takes else [f"{name}={value}"] if random_.random() < 0.3 else [name, value]
            words = [*words, *own]
    return words


def _any(random_: random.Random) -> str:
    return hostile.number(random_) if random_.random() < 0.3 else hostile.text(random_)


def may_write(words: list[str], work: Path) -> list[str]:
    """Return what a command says itself that it shall write, and the study's own folder where it reports."""
    named = ["studies/s"] if words[:1] in (["report"], ["front"], ["export"], ["studies"]) else []
    given = [word.partition("=")[2] for word in words if word.startswith("--to=")]
    given += [value for name, value in zip(words, words[1:], strict=False) if name == "--to"]
    if words[:1] == ["sensitivity"] and not given:
        given = ["."]
    if words[:2] == ["spaces", "copy"]:
        given += words[2:]
        given += [Path(word).name + ending for word in words[2:] for ending in ("", ".yaml")]
    for text in filter(None, given):
        if "\0" in text:
            continue
        place = work / text
        missing = [parent for parent in place.parents if not parent.exists()]
        named += [text, *map(str, missing), str(place.parent / ".unfinished-")]
    return named
