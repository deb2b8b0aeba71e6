"""Lottery tickets: finds sparse networks by iterative pruning and compares ways of training them with controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autoprune.compress.discovery import cuttable
from autoprune.compress.layers import has_batchnorm
from autoprune.compress.stream import TeacherStream
from autoprune.compress.ticket_masks import Masks, Ticket, by_channel, by_magnitude, random_like, share_left
from autoprune.compress.ticket_training import Course, outputs_on, train
from autoprune.config import StudyConfig
from autoprune.errors import TrialError, UsageError
from autoprune.measure.capability import score
from autoprune.search.bench import discover, training_device, two_examples
from autoprune.search.events import Listener, Progress
from autoprune.search.interrupt import Interrupt
from autoprune.search.ticket_record import (
    TicketKind,
    TicketRecord,
    TicketResult,
    TicketSettings,
    going_on,
    read_record,
    write_record,
)
from autoprune.space.groups import Groups
from autoprune.study.artifacts import write_bytes_atomic
from autoprune.workloads.catalog import parse_model
from autoprune.workloads.models import load_network
from autoprune.workloads.training import plan_training
from autoprune.workloads.weights import state_digest
from autoprune.workloads.workload import Workload, load_workload

# Seeds of the control's weights lie apart from those of the tickets.
_OTHER = 1_000_003
_REWIND_SHARE = 0.05
_RATE, _RATE_WITHOUT_NORM = 0.1, 0.02
_BATCH = 250


@dataclass(frozen=True)
class _Trained:
    """A network that waits to be scored."""

    kind: TicketKind
    model: nn.Module
    masks: Masks
    steps: int
    steps_before: int


def compare_tickets(
    config: StudyConfig, settings: TicketSettings, to: Path, listener: Listener
) -> TicketRecord:
    """Train, prune and train again, and compare at equal steps under the mask [Frankle2019]_.

    From random weights the network is trained for ``rewind_step`` steps, which gives the early checkpoint, and then to
    the end. In each round the smallest weights are removed, and all but after the last round the rest is rewound to
    the checkpoint and trained again [Frankle2020]_. The final mask is compared on the checkpoint's weights, on the
    final weights with the learning rate rewound [Renda2020]_ or at the last small rate, on other random weights, and
    against a random mask. All but ``reinit`` take the steps from the checkpoint to the end under their mask;
    ``reinit``, whose weights are new, takes those before too. In [Renda2020]_ each way of training prunes networks of
    its own; here all share one mask, so that they differ in the training alone.

    The report split is scored once for each network, after the last training of its seed; nothing is chosen by it.
    The record is written after every seed, and at Ctrl-C with the networks that were done by then; the same call goes
    on after the last complete seed.

    Args:
        config: Model, data, weights (random ones unless a file is named) and seed.
        settings: What is asked for.
        to: Folder that gets the record, and for each seed the checkpoint and the mask.
        listener: Gets progress.

    Returns:
        The record.

    Raises:
        UsageError: If ``to`` holds something else, the rewind step is not below the steps, the model's function gives
            the same weights for all seeds, or training diverges.
        KeyboardInterrupt: After Ctrl-C; the record holds what is done.

    References:
        [Frankle2019] The Lottery Ticket Hypothesis, ICLR 2019.
        [Frankle2020] Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020.
        [Renda2020] Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020.
    """
    earlier = read_record(to)
    config = config.model_copy(update={"weights": config.weights or "none"})
    listener(Progress("load", f"loading {config.model} and {config.data or 'its usual data'}"))
    workload = load_workload(config)
    comparison = _Comparison.of(workload, config, settings, to, listener)
    record = going_on(
        TicketRecord(
            settings=comparison.identity(),
            metric=workload.metric.name,
            examples=len(workload.data.report),
        ),
        earlier,
        to,
    )
    write_record(record, to)
    interrupt = Interrupt()
    with interrupt.listening():
        for seed in comparison.seeds:
            if interrupt():
                break
            if seed not in {r.seed for r in record.results}:
                trained = list(_until(comparison.run(seed, interrupt)))
                results = tuple(comparison.scored(each, seed) for each in trained)
                record = record.model_copy(update={"results": (*record.results, *results)})
                write_record(record, to)
    if interrupt.requested:
        raise KeyboardInterrupt
    return record


def _until(trained: Iterator[_Trained | None]) -> Iterator[_Trained]:
    """Yield networks until one was interrupted."""
    for each in trained:
        if each is None:
            return
        yield each


@dataclass(frozen=True)
class _Comparison:
    """What all seeds share."""

    workload: Workload
    config: StudyConfig
    settings: TicketSettings
    to: Path
    listener: Listener
    device: torch.device
    groups: Groups | None
    batch_size: int
    steps: int
    early: int
    rate: float

    @classmethod
    def of(
        cls, workload: Workload, config: StudyConfig, settings: TicketSettings, to: Path, listener: Listener
    ) -> _Comparison:
        plan = plan_training(workload, config.batch_size)
        steps = settings.steps or plan.steps
        early = settings.rewind_step
        if early is None:
            early = min(steps - 1, max(1, round(_REWIND_SHARE * steps)))
        if early >= steps:
            raise UsageError(
                f"rewind step {early} cannot be used: the training has {steps} steps; allowed: 0 to {steps - 1}",
                "lower --rewind-step or raise --steps",
            )
        usual = _RATE if has_batchnorm(workload.model) else _RATE_WITHOUT_NORM
        groups: Groups | None = None
        if settings.structured:
            workload, groups = discover(workload)
        made = cls(
            workload=workload,
            config=config,
            settings=settings,
            to=to,
            listener=listener,
            device=training_device(),
            groups=groups,
            batch_size=plan.batch_size,
            steps=steps,
            early=early,
            rate=settings.rate or usual * plan.batch_size / 128,
        )
        if made.groups is not None and not made.groups.prunable:
            raise UsageError(f"{workload.name} has no channels that can be removed", "leave --structured out")
        if state_digest(made.random(config.seed)) == state_digest(made.random(config.seed + _OTHER)):
            raise UsageError(
                f"the model's function gives the same weights for every seed, so that there is no control for "
                f"{workload.name}",
                "let it draw its weights from torch's own generator",
            )
        return made

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.settings.seeds)

    def identity(self) -> dict[str, object]:
        """Return all that results depend on, but the number of seeds."""
        return {
            "model": self.config.model,
            "data": self.workload.data.name,
            "data_fingerprint": self.workload.data.fingerprint,
            "weights": self.workload.weights_source,
            "seed": self.config.seed,
            "ratio": self.settings.ratio,
            "rounds": self.settings.rounds,
            "steps": self.steps,
            "rewind_step": self.early,
            "structured": self.settings.structured,
            "rate": self.rate,
            "batch_size": self.batch_size,
        }

    def random(self, seed: int) -> nn.Module:
        """Return the network with random weights."""
        model = load_network(
            parse_model(self.config.model),
            "none",
            self.workload.data.classes,
            self.workload.data.input_shape,
            seed=seed,
            trusted=self.config.trust_code,
            say=lambda _: None,
        ).model
        return model if self.groups is None else cuttable(model, self.groups, two_examples(self.workload))

    def run(self, seed: int, interrupt: Callable[[], bool]) -> Iterator[_Trained | None]:
        """Yield the networks of one seed; None once the user ended the comparison."""
        course = self._course(seed)
        start = self.random(seed) if self.config.weights == "none" else self.workload.model

        def trained(what: str, model: nn.Module, **how: object) -> nn.Module | None:
            self.listener(Progress("train", f"seed {seed}: {what}"))
            return _train(model, course, interrupt, **how)

        early = trained("to the early step", start, last=self.early)
        dense = None if early is None else trained("dense, to the end", early, first=self.early)
        if early is None or dense is None:
            yield None
            return
        self._keep(seed, "early", early.state_dict())
        yield _Trained("dense", dense, {}, self.steps, 0)
        final: nn.Module | None = dense
        for number in range(1, self.settings.rounds + 1):
            if final is None:
                yield None
                return
            ticket = self._choose(final, number / self.settings.rounds)
            if number < self.settings.rounds:
                what = f"round {number} of {self.settings.rounds}, {share_left(early, ticket.masks):.1%} left"
                final = trained(what, early, first=self.early, masks=ticket.masks)
        assert final is not None  # noqa: S101  # the last round trains nothing
        self._keep(seed, "ticket", ticket.masks)
        masks, after = ticket.masks, self.steps - self.early
        control = random_like(ticket, early, self.groups, seed).masks
        other = self.random(seed + _OTHER)
        arms: list[tuple[TicketKind, nn.Module, Masks, int, int, bool]] = [
            ("rewind", early, masks, self.early, self.early, False),
            ("rate_rewind", final, masks, self.early, self.steps, False),
            ("finetune", final, masks, self.early, self.steps, True),
            ("reinit", other, masks, 0, 0, False),
            ("random_mask", early, control, self.early, self.early, False),
        ]
        for kind, model, kept, first, before, small in arms:
            result = trained(kind, model, first=first, masks=kept, at_last_rate=small)
            under = after if first else self.steps
            yield None if result is None else _Trained(kind, result, kept, under, before)

    def scored(self, each: _Trained, seed: int) -> TicketResult:
        """Score one network on the report split."""
        data = self.workload.data
        outputs, targets = outputs_on(
            each.model,
            data.report.unseal().batches(_BATCH),
            [x for x, _ in data.calibration.batches(64, limit=self.config.calibration_examples)],
            self.device,
        )
        found = score(outputs, targets, self.workload.metric)
        return TicketResult(
            kind=each.kind,
            seed=seed,
            share_left=share_left(each.model, each.masks),
            accuracy=found.value,
            ci=found.ci,
            steps=each.steps,
            steps_before=each.steps_before,
        )

    def _course(self, seed: int) -> Course:
        stream = TeacherStream(
            self.workload.model,
            self.workload.data.train,
            seed=seed,
            batch_size=self.batch_size,
            device=self.device,
        )
        return Course(stream, self.workload.loss, self.device, self.rate, self.steps)

    def _choose(self, model: nn.Module, part: float) -> Ticket:
        ratio = self.settings.ratio
        if self.groups is not None:
            return by_channel(model, self.groups, ratio, part)
        return by_magnitude(model, (1.0 - ratio) ** part)

    def _keep(self, seed: int, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors for people who want to go on with them."""
        content = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        write_bytes_atomic(self.to / f"seed-{seed}" / f"{name}.safetensors", save(content))


def _train(
    model: nn.Module, course: Course, interrupt: Callable[[], bool], **how: object
) -> nn.Module | None:
    try:
        return train(model, course, stop=interrupt, **how)  # type: ignore[arg-type]
    except TrialError as error:
        raise UsageError(
            f"the network cannot be trained: {error.reason}", "give a smaller --rate, or fewer --steps"
        ) from error
