"""Validated settings of a study: every value that a user gives, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from autoprune.errors import UsageError
from autoprune.execution import Execution
from autoprune.naming import check_study_name, default_study_name, unknown_name
from autoprune.storage_url import check_storage, shown_storage, without_passwords
from autoprune.target import Target, given_target, merged

OBJECTIVES = ("accuracy", "latency", "size")
SAMPLERS = ("auto", "tpe", "nsga2", "random", "grid")
Objective = Literal["accuracy", "latency", "size"]

_UNITS_S = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BUDGET_FORMS = "a time such as 90s, 5m, 1.5h or 2d, or a number of trials such as 200trials"


@dataclass(frozen=True)
class Budget:
    """How long a search may take: exactly one of the two is set.

    Attributes:
        seconds: Wall time for everything, counted on the monotonic clock.
        trials: Number of proposals after the baselines.
    """

    seconds: float | None = None
    trials: int | None = None


def parse_budget(text: str) -> Budget:
    """Read a budget such as ``8h``, ``90m`` or ``200trials``.

    Raises:
        UsageError: If the text has another form, or is not positive, or above 30 days or 1,000,000 trials.
    """
    match = re.fullmatch(r"\s*(-?\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = match.group(2).lower() if match else ""
    if not match or (unit not in _UNITS_S and unit not in ("trial", "trials")):
        raise UsageError(f"budget {text!r} is not understood; allowed: {_BUDGET_FORMS}")
    number = float(match.group(1))
    if number <= 0:
        raise UsageError(f"budget {text!r} must be above zero; allowed: {_BUDGET_FORMS}")
    if unit.startswith("trial"):
        if number != int(number) or number > 1_000_000:
            raise UsageError(f"budget {text!r} must be a whole number of trials up to 1,000,000")
        return Budget(trials=int(number))
    seconds = number * _UNITS_S[unit]
    if seconds > 30 * 86400:
        raise UsageError(f"budget {text!r} is above 30 days")
    return Budget(seconds=seconds)


class Limits(BaseModel):
    """What the user needs of a network; the default search looks nowhere else.

    Attributes:
        max_latency_ms: Most milliseconds for one batch on the target.
        max_size_mb: Most megabytes (1e6 bytes) of the model file.
        min_accuracy: Least capability.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_latency_ms: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    max_size_mb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    min_accuracy: Annotated[float, Field(allow_inf_nan=False)] | None = None


class AutoSearch(BaseModel):
    """Parts of the default search that can be switched off, to see what each is worth.

    Attributes:
        solver: Whether proposals come from the solver; else from random moves alone.
        screening: Whether recipes are screened before any is trained; else each one is trained.
        lineage: Whether a recipe that prunes further than a trained network starts from that one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    solver: bool = True
    screening: bool = True
    lineage: bool = True


class StudyConfig(BaseModel):
    """All settings of a search.

    Attributes:
        model: Model by name or ``file.py:function``.
        data: Data by name, ``imagefolder:DIR`` or ``file.py:function``; None looks for the model's usual data.
        weights: ``DEFAULT``, ``none`` or a file; None takes what the model's kind calls for.
        space: Search space by name or file.
        target: Where networks are measured and the search decides by; the first of several.
        also: Further targets, on which the final front is measured too.
        objectives: What the front trades, two or three.
        budget: Time or number of trials.
        study: Name of the study; None derives it from model, data and target.
        storage: Where the study's record is: a PostgreSQL URL; None for ``AUTOPRUNE_STORAGE`` or SQLite in its folder.
        sampler: Who proposes: ``auto`` is the profile, the solver and their search; the others are plain samplers.
        auto: Parts of the default search.
        limits: What the user needs of a network.
        seed: Seed of splits, sampler and training.
        final_share: Share of the time budget kept for the final recovery and re-measurement, in ``(0, 0.95]``.
        image_size: Pixels that images are resized to; None takes the data's own.
        batch_size: Images in one training step.
        search_examples: Most images in the search split.
        report_examples: Most images in the report split; a fixed part of it where there are more.
        calibration_examples: Images for closed-form recovery, BatchNorm statistics and int8 ranges.
        front_points: Most networks that the final recovery trains; one network may give several points. By default 12
            where networks start from each other, 5 where each starts from its own trial.
        trust_code: Whether Python files given as model or data may be run.
        execution: Where trials run, and how many side by side; no part of what a study is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str | None = None
    weights: str | None = None
    space: str = "default"
    target: Target = Target()
    also: Annotated[tuple[Target, ...], Field(max_length=8)] = ()
    objectives: tuple[Objective, ...] = ("accuracy", "latency", "size")
    budget: str = "1h"
    study: str | None = None
    storage: Annotated[str | None, Field(repr=False)] = None
    sampler: Literal["auto", "tpe", "nsga2", "random", "grid"] = "auto"
    auto: AutoSearch = AutoSearch()
    limits: Limits = Limits()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    final_share: Annotated[float, Field(gt=0.0, le=0.95)] = 0.6
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    search_examples: Annotated[int, Field(ge=10)] = 2000
    report_examples: Annotated[int, Field(ge=10)] = 10_000
    calibration_examples: Annotated[int, Field(ge=8)] = 512
    front_points: Annotated[int, Field(ge=1, le=64)] | None = None
    trust_code: bool = False
    execution: Execution = Execution()

    @field_validator("budget")
    @classmethod
    def _budget(cls, text: str) -> str:
        parse_budget(text)
        return text

    @field_validator("study")
    @classmethod
    def _study(cls, name: str | None) -> str | None:
        return name if name is None else check_study_name(name)

    @field_validator("storage", mode="before")
    @classmethod
    def _storage(cls, storage: object) -> str | None:
        return check_storage(storage)

    @field_serializer("storage")
    def _shown_storage(self, storage: str | None) -> str | None:
        return shown_storage(storage)

    @model_validator(mode="after")
    def _targets(self) -> Self:
        specs = [each.spec for each in self.targets]
        if len(set(specs)) != len(specs):
            raise UsageError(f"a target is there twice: {', '.join(specs)}; allowed: each once")
        sizes = {each.input_size for each in self.targets}
        if len(sizes) > 1 or (self.image_size and sizes - {None, self.image_size}):
            raise UsageError(
                "targets of one study get images of one size; given: "
                f"image_size {self.image_size}, {', '.join(specs)}",
                "accuracy at another size is that of another task: make a study of its own for it",
            )
        return self

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names) or not 2 <= len(names) <= 3 or "accuracy" not in names:
            raise UsageError(
                f"objectives {','.join(names)!r} cannot be used; "
                "allowed: accuracy with latency, size or both, each once"
            )
        return names

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets, the one that the search decides by first."""
        return (self.target, *self.also)

    @property
    def pixels(self) -> int | None:
        """Sides of the images that networks get; None for the data's own."""
        return self.image_size or self.target.input_size

    def check_installed(self) -> None:
        """Refuse targets that are not installed here, before any work is done.

        Raises:
            UsageError: With the line that installs the first one missing.
        """
        for each in self.targets:
            each.check_installed()

    @property
    def most_networks(self) -> int:
        """Most networks that the final recovery trains."""
        if self.front_points is not None:
            return self.front_points
        return 12 if self.has_lineage else 5

    @property
    def has_lineage(self) -> bool:
        """Whether recipes may start from networks that were trained before."""
        return self.sampler == "auto" and self.auto.lineage

    @property
    def study_name(self) -> str:
        """The study's name, derived where none was given."""
        return self.study or default_study_name(self.model, self.data or "data", self.target.runtime)

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed search must share; the budget may change."""
        dump = self.model_dump(
            mode="json", exclude={"budget", "study", "storage", "trust_code", "target", "also", "execution"}
        )
        targets: dict[str, Any] = {"target": self.target.content()}
        if self.also:
            targets["also"] = [each.content() for each in self.also]
        return {**dump, **targets, "study": self.study_name}


def make_config(values: dict[str, Any]) -> StudyConfig:
    """Validate settings.

    Args:
        values: Settings by name; ``target`` may be a name or a mapping; ``objectives`` a comma-separated text.

    Raises:
        UsageError: With all faults at once, each with its name, its value and what is allowed.
    """
    values = dict(values)
    for name in values:
        if name not in StudyConfig.model_fields:
            raise unknown_name("setting", name, StudyConfig.model_fields)
    read_targets(values)
    if isinstance(values.get("objectives"), str):
        values["objectives"] = [part.strip() for part in values["objectives"].split(",") if part.strip()]
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_faults("settings", error)) from None


def read_targets(values: dict[str, Any]) -> None:
    """Turn targets that are written as words into mappings, in place; several are separated by commas."""
    first: Any = values.get("target")
    also: Any = values.get("also", ())
    if isinstance(first, str):
        first, *more = [part for part in first.split(",") if part.strip()] or [""]
        also = [*more, *also] if isinstance(also, list | tuple) else also
        first = given_target(first)
    if isinstance(also, str):
        also = [part for part in also.split(",") if part.strip()]
    if isinstance(first, dict) and isinstance(also, list | tuple):
        own: Any = [given_target(each) for each in also]
        also = [merged(first, each) if isinstance(each, dict) else each for each in own]
    if first is not None:
        values["target"] = first
    if also:
        values["also"] = also


def describe_faults(
    what: str, error: ValidationError, line_of: Callable[[tuple[str | int, ...]], int] | None = None
) -> str:
    """Return one line for each fault that pydantic found, with name, value and what is allowed.

    Args:
        what: What was validated; the name of the file where ``line_of`` is given.
        error: What pydantic found.
        line_of: Gives the line of a value in the file; None where the values came from no file.
    """
    lines = [f"{what} cannot be used:"]
    faults = error.errors(include_url=False)
    for fault in faults:
        at = fault["loc"]
        if fault["type"] == "too_short" and any(f["loc"][: len(at)] == at and f["loc"] != at for f in faults):
            continue  # pydantic counts the faulty items as missing
        name = ".".join(map(_in_one_line, fault["loc"])) or "the whole"
        value = without_passwords(repr(fault.get("input")))
        shown = value if len(value) <= 60 else value[:60] + "…"
        where = f"{what}:{line_of(fault['loc'])}: " if line_of else ""
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(
            f"  {where}{name} " + ("is required" if fault["type"] == "missing" else f"= {shown}: {message}")
        )
    return "\n".join(lines)


def _in_one_line(name: object) -> str:
    """Return a name of a file's as it stands there, written out where it would break the line."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]
