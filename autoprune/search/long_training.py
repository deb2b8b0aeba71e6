"""Long training of one network of the final phase: by path and plain values, so that any worker can do it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from autoprune.clock import Clock, SystemClock
from autoprune.compress.aware import IntegerTraining
from autoprune.compress.finetune import Trainer
from autoprune.compress.lowrank import with_factors
from autoprune.compress.masking import hold_zeros, masked_layers
from autoprune.compress.pipeline import Compressed
from autoprune.search.bench import Bench
from autoprune.search.jobs import with_steps
from autoprune.space.recipe import Recipe, Recovery

_SYSTEM = SystemClock()


def train_long(
    bench: Bench,
    recipe: Recipe,
    folder: Path,
    *,
    own: Path | None,
    line: Path | None,
    recovery: Recovery,
    slot_s: float,
    start_step: int,
    stop: Callable[[], bool],
    clock: Clock = _SYSTEM,
) -> int:
    """Continue a network's training and save it.

    Args:
        bench: What the trials share.
        recipe: The network's recipe.
        folder: Empty folder that gets the weights and the recipe.
        own: Artifact folder of the network that the recipe's trial left; None for the dense network.
        line: Artifact folder of a network of this phase that is cut further instead.
        recovery: Learning rate, schedule and distillation.
        slot_s: Seconds to train for.
        start_step: Step of the training stream to begin at.
        stop: Returns True once training has to end.
        clock: Source of time.

    Returns:
        Gradient steps taken.
    """
    compressed = _begin(bench, recipe, own, line)
    begun_s = clock.monotonic()
    network = deepcopy(compressed.model)
    kinds = bench.config.target.facts.int8
    integers = IntegerTraining.of(network, recipe, bench.groups, kinds, bench.int8_bits)
    trainer = Trainer(
        network,
        bench.stream,
        recovery,
        loss=bench.workload.loss,
        device=bench.device,
        training_step=bench.workload.training_step,
        start_step=start_step,
    )
    groups = bench.groups
    masked = masked_layers(recipe, groups, groups.removed_blocks(recipe.kept_counts(groups)))
    hold_zeros(with_factors(trainer.model, list(masked)))(trainer)
    integers.watch(trainer)
    steps = trainer.run_for(lambda: (clock.monotonic() - begun_s) / slot_s, stop=stop)
    trained = Compressed(
        model=integers.finish(trainer.finish()),
        plan=compressed.plan,
        train_steps=compressed.train_steps + steps,
        solved=[],
        factorised=compressed.factorised,
        ranges=integers.ranges,
    )
    bench.save(trained, recipe, folder)
    return steps


def _begin(bench: Bench, recipe: Recipe, own: Path | None, line: Path | None) -> Compressed:
    if line is not None:
        untrained = recipe.model_copy(update={"recovery": with_steps(recipe.recovery, 0)})
        return bench.compressed(untrained, start=line)
    return Compressed(bench.workload.model) if own is None else bench.load(own)
