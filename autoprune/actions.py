"""What the command line does with a network without a search: list its groups, profile it, compress it once."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoprune.compress.lowrank import Factorised
from autoprune.config import StudyConfig, describe_faults
from autoprune.deploy.runtime import Artifact
from autoprune.errors import UsageError
from autoprune.exporting import trial_errors_as_export_errors
from autoprune.measure.figures import FULL_RUN
from autoprune.measure.latency import FINAL_PROTOCOL, measure_latency
from autoprune.measure.record import Measurement
from autoprune.search.bench import Bench, check_features, discover
from autoprune.search.cost_model import CostModel
from autoprune.search.events import Listener, Progress, ignore
from autoprune.search.limits import check_activations
from autoprune.search.options import Options
from autoprune.search.profile import Profile
from autoprune.search.profiling import measure_profile
from autoprune.search.space_cut import settled
from autoprune.search.trial import assemble, evaluate, failures_as_trial_errors
from autoprune.space.groups import Groups
from autoprune.space.mask import Mask, check_sparsity
from autoprune.space.quantization import ActivationBits, Bits, Quantization
from autoprune.space.recipe import (
    GRADIENT_CRITERIA,
    Order,
    Ranking,
    Recipe,
    Recovery,
    uniform_recipe,
)
from autoprune.space.schedule import Schedule
from autoprune.space.space_files import load_space
from autoprune.study.artifacts import commit_folder, temporary_folder
from autoprune.workloads.training import train_dense
from autoprune.workloads.workload import Workload, load_workload


def list_groups(config: StudyConfig, listener: Listener = ignore) -> Groups:
    """Return the groups of a model: what can be removed, and why the rest cannot."""
    listener(Progress("groups", f"finding the groups of {config.model}"))
    return discover(load_workload(config))[1]


def profile_network(config: StudyConfig, listener: Listener = ignore) -> tuple[Profile, Options]:
    """Measure the whole profile of a network, without a limit of time, or complete the one in the cache.

    Args:
        config: Model, data, weights, search space, target.
        listener: Gets progress.
    """
    space = load_space(config.space)
    config.check_installed()
    listener(Progress("load", f"loading {config.model} and {config.data or 'its usual data'}"))
    workload = load_workload(config)
    listener(Progress("groups", f"finding the groups of {config.model}"))
    workload, groups = discover(workload)
    space.check(groups)
    space = settled(space, config.target)
    if not workload.dense_trained:
        workload = _with_dense(workload, config, listener)
    bench = Bench.build(config, workload, groups, gradients=True)
    with (
        tempfile.TemporaryDirectory(prefix="autoprune-dense-") as folder,
        trial_errors_as_export_errors(),
        failures_as_trial_errors(),
    ):
        bench.dense = bench.deploy_dense(Path(folder))
        profile = measure_profile(
            bench, space, math.inf, lambda message: listener(Progress("profile", message))
        )
    return profile, Options(profile, groups, space, CostModel(profile.shapes, profile.designs))


def _with_dense(workload: Workload, config: StudyConfig, listener: Listener) -> Workload:
    return train_dense(
        workload,
        deadline=None,
        progress=lambda message: listener(Progress("dense", message)),
        seed=config.seed,
    )


def compress_once(
    config: StudyConfig,
    to: Path,
    *,
    recipe: Recipe | None = None,
    ratio: float = 0.0,
    criterion: str = "l2",
    bits: Bits = 8,
    activation_bits: ActivationBits = 8,
    quantization: Quantization | None = None,
    ranking: Ranking = "group",
    steps: int | None = None,
    sparsity: float = 0.0,
    mask: Mask | None = None,
    schedule: Schedule | None = None,
    rank_ratio: float = 0.0,
    feature_distill: float = 0.0,
    order: Order = "prune-tune-quantize",
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Compress a network by one recipe, without a search, and measure the result on the report split.

    Args:
        config: Model, data, weights, target.
        to: Folder that gets the artifact; must be empty or absent.
        recipe: The whole recipe; the uniform one of the next arguments if not given.
        ratio: Share removed from every prunable group, in ``[0, 1)``.
        criterion: How units are ranked.
        bits: Bit-width of the weights of every group.
        activation_bits: Bit-width of the inputs of layers with integer weights.
        quantization: How integer weights are made; the nearest of a grid up to the largest magnitude if not given.
        ranking: Which units are compared with each other.
        steps: Fine-tuning steps; the recipe's own if not given.
        sparsity: Share of single weights of every group that become zero, in ``[0, 1)``.
        mask: How these are chosen; by magnitude in every layer if not given.
        schedule: When channels and weights are removed, for the uniform recipe; at once if not given.
        rank_ratio: Share of the rank removed from every layer that does not make the network's output, in ``[0, 1)``.
        feature_distill: Weight of the distillation on features; 0 for none.
        order: Order of the stages.
        listener: Gets progress.

    Returns:
        The measurements, with the names of a point of ``front --json``; where a rank was to be removed also
        ``factorised``, the ranks by layer, and ``left_whole``, why other layers were not factorised.

    Raises:
        UsageError: If the recipe cannot be carried out on this model; nothing is written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{str(to)!r} exists and is not an empty folder", "choose another with --to DIR")
    config.check_installed()
    recovery = _checked_recovery(ratio, steps, rank_ratio, feature_distill)
    check_sparsity(sparsity)
    (mask or Mask()).check([sparsity], recovery.finetune_steps)
    schedule = schedule or Schedule()
    schedule.check(recovery.finetune_steps)
    listener(Progress("load", f"loading {config.model} and {config.data or 'its usual data'}"))
    workload = load_workload(config)
    workload, groups = discover(workload)
    recipe = recipe or uniform_recipe(
        groups,
        ratio,
        bits,
        criterion,
        recovery=recovery,
        ranking=ranking,
        sparsity=sparsity,
        mask=mask,
        rank_ratio=rank_ratio,
        order=order,
        schedule=schedule,
        activation_bits=activation_bits,
        quantization=quantization,
    )
    recipe.check(groups)
    if any(choice.runs_int8 for choice in recipe.groups.values()):
        check_activations([recipe.quantization.activations], config.target)
    check_features(recipe.recovery.feature_distill > 0, workload)
    if not workload.dense_trained:
        workload = _with_dense(workload, config, listener)
    criteria = {recipe.criterion_of(g) for g in groups.groups}
    bench = Bench.build(config, workload, groups, gradients=any(c in GRADIENT_CRITERIA for c in criteria))
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_folder(to.parent)
    try:
        measurement, factorised = _compress_into(bench, recipe, folder, listener)
        if to.exists():
            to.rmdir()
        commit_folder(folder, to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ranks = {"factorised": dict(factorised.ranks), "left_whole": dict(factorised.left_whole)}
    return {
        "artifact": str(to),
        **flat(measurement),
        **(ranks if recipe.factorises else {}),
        "recipe": recipe.content(),
    }


def _checked_recovery(ratio: float, steps: int | None, rank_ratio: float, feature_distill: float) -> Recovery:
    """Check the numbers that ``compress`` was given before anything is loaded."""
    if not 0.0 <= ratio < 1.0:
        raise UsageError(f"ratio {ratio:g} cannot be used; allowed: the share removed, from 0 to below 1")
    if not 0.0 <= rank_ratio < 1.0:
        raise UsageError(
            f"rank ratio {rank_ratio:g} cannot be used; allowed: the share of the rank removed, from 0 to below 1"
        )
    given = {} if steps is None else {"finetune_steps": steps}
    try:
        return Recovery.model_validate({**given, "feature_distill": feature_distill})
    except ValidationError as error:
        raise UsageError(describe_faults("recovery", error)) from None


def _compress_into(
    bench: Bench, recipe: Recipe, folder: Path, listener: Listener
) -> tuple[Measurement, Factorised]:
    listener(Progress("compress", "pruning, recovering, exporting"))
    with trial_errors_as_export_errors(), failures_as_trial_errors():
        dense_folder = folder / "dense"
        dense_folder.mkdir()
        built = bench.deploy_dense(dense_folder)
        facts = bench.config.target.facts
        (dense_folder / facts.model_file).replace(folder / facts.dense_file)
        dense_folder.rmdir()
        bench.dense = Artifact(folder / facts.dense_file, built.executed, built.parity_error)
        compressed = bench.compressed(recipe)
        artifact = bench.deploy(compressed, recipe, folder)
        bench.save(compressed, recipe, folder)
        listener(Progress("measure", "measuring on the report split"))
        search = evaluate(bench, artifact, bench.workload.data.search)
        report = evaluate(bench, artifact, bench.workload.data.report.unseal())
        latency, figures = measure_latency(
            artifact.path,
            bench.dense.path,
            bench.config.target,
            bench.workload.data.input_shape,
            protocol=FINAL_PROTOCOL,
            run=FULL_RUN,
        )
        measured = assemble(bench, compressed.model, artifact, latency, figures, search=search, report=report)
        return measured, compressed.factorised


def flat(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as one flat mapping with the names that ``front --json`` uses."""
    report = measurement.report or measurement.search
    return {
        "accuracy": report.value,
        "accuracy_ci": report.ci,
        "accuracy_search": measurement.search.value,
        "latency_ms": measurement.latency.latency_ms,
        "latency_p95_ms": measurement.latency.latency_p95_ms,
        "latency_ratio": measurement.latency.ratio,
        "latency_ratio_ci": measurement.latency.ratio_ci,
        "size_bytes": measurement.size_bytes,
        "size_ratio": measurement.size_ratio,
        "params": measurement.params,
        "macs": measurement.macs,
        **measurement.figures.flat(),
        "int8_layers": measurement.executed.int8_layers,
        "layers": measurement.executed.layers,
    }
