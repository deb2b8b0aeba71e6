"""TicketRecord: what a comparison of lottery tickets was asked for and what it found. Torch-free."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autoprune.errors import UsageError
from autoprune.study.artifacts import write_text_atomic

RECORD_FILE = "tickets.json"

TicketKind = Literal["dense", "rewind", "rate_rewind", "finetune", "reinit", "random_mask"]
KINDS: tuple[TicketKind, ...] = get_args(TicketKind)
MEANINGS: dict[TicketKind, str] = {
    "dense": "all weights, trained to the end",
    "rewind": "the ticket, weights and rate rewound to the early step",
    "rate_rewind": "the ticket, final weights, rate rewound to the early step",
    "finetune": "the ticket, final weights, at the last small rate",
    "reinit": "control: the ticket on other random weights, from the first step on",
    "random_mask": "control: a random mask with the same share of every layer, rewound",
}


class TicketSettings(BaseModel):
    """What is asked of a comparison.

    Attributes:
        ratio: Share of the weights (of every group's channels, if ``structured``) that is removed.
        rounds: Trainings after each of which a part is removed, each the same share of what is left.
        steps: Gradient steps of a training from its random weights; None takes as many as training the dense network.
        rewind_step: Early step that is rewound to; None takes a twentieth of the steps. 0 is the random weights.
        seeds: Independent repetitions, each with random weights and an order of examples of its own.
        structured: Whether whole channels are removed instead of single weights.
        rate: Peak learning rate; None chooses it by the network's layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    rounds: Annotated[int, Field(ge=1, le=50)] = 3
    steps: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    rewind_step: Annotated[int, Field(ge=0)] | None = None
    seeds: Annotated[int, Field(ge=1, le=100)] = 2
    structured: bool = False
    rate: Annotated[float, Field(gt=0.0, le=10.0)] | None = None

    @model_validator(mode="after")
    def _rewinds_to_an_earlier_step(self) -> Self:
        if self.steps is not None and self.rewind_step is not None and self.rewind_step >= self.steps:
            raise ValueError(f"rewind_step {self.rewind_step} must be below the steps, {self.steps}")
        return self


class TicketResult(BaseModel):
    """One trained network.

    Attributes:
        kind: How it came about; see :data:`MEANINGS`.
        seed: Seed of its weights and of the order of examples.
        share_left: Share of the weights of convolutions and linear layers that it keeps, in ``[0, 1]``.
        accuracy: The metric on the report split.
        ci: Its 95 % interval over examples.
        steps: Gradient steps under its mask; of the dense network all.
        steps_before: Gradient steps that its weights had taken before, in the training that it starts from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: TicketKind
    seed: int
    share_left: float
    accuracy: float
    ci: tuple[float, float]
    steps: int
    steps_before: int


class TicketRow(BaseModel):
    """All seeds of one kind.

    Attributes:
        kind: How the networks came about.
        seeds: How many there are.
        share_left: Mean share of weights left.
        accuracy: Mean of the metric over seeds.
        lowest: Lowest of a seed.
        highest: Highest of a seed.
        steps: Gradient steps under the mask.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: TicketKind
    seeds: int
    share_left: float
    accuracy: float
    lowest: float
    highest: float
    steps: int


class TicketRecord(BaseModel):
    """The record of a comparison, complete or not.

    Attributes:
        settings: What it depends on; a run that goes on must have the same.
        metric: Name of the metric.
        examples: Examples of the report split.
        results: What is done so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    metric: str
    examples: int
    results: tuple[TicketResult, ...] = ()

    def of_complete_seeds(self) -> TicketRecord:
        """Return the record without the seeds that lack a kind."""
        done = {
            r.seed for r in self.results if {o.kind for o in self.results if o.seed == r.seed} == {*KINDS}
        }
        return self.model_copy(update={"results": tuple(r for r in self.results if r.seed in done)})

    def rows(self) -> list[TicketRow]:
        """Return one row for each kind that has results, in the order of :data:`KINDS`."""
        found = []
        for kind in KINDS:
            own = [r for r in self.results if r.kind == kind]
            if own:
                values = [r.accuracy for r in own]
                found.append(
                    TicketRow(
                        kind=kind,
                        seeds=len(own),
                        share_left=fmean(r.share_left for r in own),
                        accuracy=fmean(values),
                        lowest=min(values),
                        highest=max(values),
                        steps=own[0].steps,
                    )
                )
        return found


def read_record(folder: Path) -> TicketRecord | None:
    """Return the record in ``folder``; None where there is none yet.

    Raises:
        UsageError: If the folder holds other files, or the record cannot be read.
    """
    path = folder / RECORD_FILE
    if path.is_file():
        try:
            return TicketRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{str(path)!r} is no record of tickets: {str(error).splitlines()[0]}",
                "choose another folder with --to DIR",
            ) from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} exists and is not an empty folder", "choose another with --to DIR")
    return None


def going_on(new: TicketRecord, earlier: TicketRecord | None, folder: Path) -> TicketRecord:
    """Return the record to go on with: the complete seeds of the earlier one, if it has any results.

    Args:
        new: A record without results, with the settings of now.
        earlier: What the folder holds; None for nothing.
        folder: Named in the message.

    Raises:
        UsageError: If the earlier results have other settings.
    """
    if earlier is None or not earlier.results:
        return new
    differ = sorted(n for n in new.settings if new.settings[n] != earlier.settings.get(n))
    if differ:
        name = differ[0]
        raise UsageError(
            f"{str(folder)!r} holds tickets with {name} = {earlier.settings.get(name)!r}, not {new.settings[name]!r}",
            "give the same settings to go on, or choose another folder with --to DIR",
        )
    return earlier.of_complete_seeds()


def write_record(record: TicketRecord, folder: Path) -> None:
    """Write the record in one step.

    Raises:
        StorageError: If the folder cannot be written.
    """
    write_text_atomic(folder / RECORD_FILE, record.model_dump_json(indent=1))
