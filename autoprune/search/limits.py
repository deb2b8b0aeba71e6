"""What the default search cannot search, told before anything runs. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.space.choices import FloatRange
from autoprune.space.quantization import Activations
from autoprune.space.search_space import SearchSpace
from autoprune.target import Target


def auto_cannot(space: SearchSpace) -> list[str]:
    """Return one line for each setting of a space that the default search cannot work with.

    It proposes a width, a criterion and bits for each group from a profile of single groups, starts networks from
    trained ones, and does nothing else.
    """
    found: list[str] = []
    if space.rankings != ("group",):
        found.append(f"rankings = {list(space.rankings)}: which units go has to depend on one group alone")
    if space.activation_bits != (8,):
        found.append(f"activation_bits = {list(space.activation_bits)}; allowed: [8]")
    if space.quantization.count() > 1 or len(space.quantization.half) > 1:
        found.append("quantization holds several choices; allowed: one of each setting")
    if space.schedules.kind != ("one_shot",):
        found.append(f"schedules.kind = {list(space.schedules.kind)}: it prunes by one_shot alone")
    if any(space.every_sparsity):
        found.append(f"sparsities holds {sorted(space.every_sparsity)}: it masks no single weights")
    ranks = [space.rank_ratios, *(o.rank_ratios for o in space.overrides if o.rank_ratios is not None)]
    if any(choices != (0.0,) for choices in ranks):
        named = next(choices for choices in ranks if choices != (0.0,))
        found.append(f"rank_ratios = {list(named)}; allowed: [0.0]")
    if space.orders != ("prune-tune-quantize",):
        found.append(f"orders = {list(space.orders)}; allowed: ['prune-tune-quantize']")
    weights = space.recovery.feature_distill
    if isinstance(weights, FloatRange) or len(weights) > 1:
        shown = weights.model_dump() if isinstance(weights, FloatRange) else list(weights)
        found.append(f"recovery.feature_distill = {shown}; allowed: a single value")
    return found


def check_space(settings: StudyConfig, space: SearchSpace) -> None:
    """Refuse a space that a study's sampler cannot search or its targets cannot run, before anything runs.

    Raises:
        UsageError: With what cannot be searched or run.
    """
    check_sampler(settings.sampler, space)
    for target in settings.targets:
        check_activations(space.quantization.activations, target)


def check_sampler(sampler: str, space: SearchSpace) -> None:
    """Refuse a space that the default search cannot search.

    Args:
        sampler: Who proposes; only ``auto`` has limits.
        space: What may be tried.

    Raises:
        UsageError: With every setting that it cannot search, and the samplers that can.
    """
    faults = auto_cannot(space) if sampler == "auto" else []
    if faults:
        raise UsageError(
            "\n  ".join(["the default search (--sampler auto) cannot search this space:", *faults]),
            "search it with --sampler tpe (or nsga2, random, grid), or leave these settings out",
        )


def compares_features(space: SearchSpace) -> bool:
    """Return whether any recipe of a space may ask for distillation on features."""
    weights = space.recovery.feature_distill
    return isinstance(weights, FloatRange) or any(weight > 0 for weight in weights)


def check_activations(activations: Iterable[Activations], target: Target) -> None:
    """Refuse ranges of inputs that a target's runtime cannot find at each inference, before anything runs.

    Args:
        activations: Where recipes may take ranges from.
        target: Where they are measured.

    Raises:
        UsageError: If the runtime has no dynamic ranges for single layers, or no fp8, and they are asked for.
    """
    if "fp8" in activations and target.device not in target.facts.fp8:
        raise UsageError(
            f"target {target.spec!r} runs nothing in fp8 (activations 'fp8'); allowed there: static"
            + (", dynamic" if target.facts.dynamic else ""),
            "leave out fp8, or use the target torch:cuda on a GPU that has it",
        )
    if "dynamic" in activations and not target.facts.dynamic:
        raise UsageError(
            f"target {target.runtime!r} cannot find the ranges of inputs at each inference (activations 'dynamic'); "
            "allowed there: static",
            "leave out dynamic activations, or use the target onnxruntime",
        )
