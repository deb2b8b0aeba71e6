"""Verbs that work on a network: search, compress, groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli import bit_options, mask_options, options
from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_pairs, print_table
from autoprune.cli.rendering import show_front
from autoprune.cli.schedules import given_schedule
from autoprune.cli.settings import check_engine, check_place, gather
from autoprune.errors import UsageError
from autoprune.naming import StudyPaths, unknown_name

if TYPE_CHECKING:
    from autoprune.api import Study
    from autoprune.config import StudyConfig
    from autoprune.space.groups import Groups
    from autoprune.space.recipe import Recipe


def search(
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: options.Weights = None,
    space: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="search space; see `autoprune spaces`")
    ] = None,
    target: options.Target = None,
    objectives: Annotated[
        str | None, typer.Option(metavar="A,B[,C]", help="of accuracy, latency, size")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="8h|90m|200trials", help="for everything")] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="name of the study")] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="auto|tpe|nsga2|random|grid", help="who proposes")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(metavar="X", help="search only below it")] = None,
    max_size_mb: Annotated[float | None, typer.Option(metavar="X", help="search only below it")] = None,
    min_accuracy: Annotated[float | None, typer.Option(metavar="X", help="search only above it")] = None,
    storage: options.Storage = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="trials side by side, each in a process of its own")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="local|ray", help="where trials run: this machine, or a Ray cluster")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ray://HOST:PORT|HOST:PORT", help="Ray cluster to join; starts Ray here if not given"
        ),
    ] = None,
    cpus_per_trial: Annotated[float | None, typer.Option(metavar="X", help="of one trial on Ray (1)")] = None,
    gpus_per_trial: Annotated[
        float | None, typer.Option(metavar="X", help="of one trial on Ray, parts of one too (0)")
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="storage that all nodes reach, such as s3://bucket/folder"),
    ] = None,
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start over; the earlier study is kept aside")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, search nothing")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """Search a Pareto front; the same command again resumes."""
    flags = {
        "model": model, "data": data, "weights": weights, "space": space, "target": target, "objectives": objectives,
        "budget": budget, "study": study, "storage": storage, "sampler": sampler, "seed": seed,
        "trust_code": trust_code,
    }  # fmt: skip
    limits = {"max_latency_ms": max_latency_ms, "max_size_mb": max_size_mb, "min_accuracy": min_accuracy}
    execution = {
        "workers": workers, "engine": check_engine(engine), "address": address, "cpus_per_trial": cpus_per_trial,
        "gpus_per_trial": gpus_per_trial, "artifacts": artifacts,
    }  # fmt: skip
    settings = gather(config, flags, overrides or (), limits=limits, execution=execution)
    # Faults that need no torch are told before it is loaded.
    from autoprune.search.limits import check_space
    from autoprune.space.space_files import load_space
    from autoprune.workloads.catalog import check_inputs

    check_place(settings, fresh=fresh)
    check_space(settings, load_space(settings.space))
    check_inputs(settings)
    if dry_run:
        _dry_run(settings, json, quiet)
        return
    from autoprune.api import open_study, run_search

    try:
        with live_view(f"autoprune {settings.study_name}", quiet) as listener:
            found = run_search(settings, fresh=fresh, progress=listener)
    except KeyboardInterrupt:
        if StudyPaths.of(settings.study_name).has_record:
            show_front(open_study(settings.study_name, settings.storage), json=json)
        raise
    show_front(found, json=json)
    _check_limits(found, settings)


def _check_limits(study: Study, settings: StudyConfig) -> None:
    """End with "no feasible point" where limits were given and no point of the front keeps them."""
    from autoprune.study.front import dense_record, pick_points

    limits = settings.limits.model_dump()
    if any(value is not None for value in limits.values()):
        pick_points(
            study.points(), dense=dense_record(study.records()), objectives=study.objectives, **limits
        )


def _dry_run(settings: StudyConfig, json: bool, quiet: bool) -> None:
    """Load the network, find its groups and tell what a search would do."""
    from autoprune.actions import list_groups
    from autoprune.measure.truth_table import read_table
    from autoprune.search.limits import check_space
    from autoprune.search.space_cut import cut_space
    from autoprune.space.space_files import load_space

    space = load_space(settings.space)
    check_space(settings, space)
    with live_view("autoprune search --dry-run", quiet) as listener:
        groups = list_groups(settings, listener)
    space.check(groups)
    cut = cut_space(space, groups, settings.target, settings.objectives, read_table(settings.target))
    space = cut.applied(space, groups)
    plan = {
        "study": settings.study_name,
        "folder": str(StudyPaths.of(settings.study_name).root),
        "settings": settings.model_dump(mode="json"),
        "groups": len(groups.groups),
        "prunable_groups": len(groups.prunable),
        "width": space.width,
        "log10_recipes": space.size(groups),
        "brings_no_time": list(cut.lines),
        "baseline_ratios": list(space.baselines.ratios),
    }
    print_json(plan) if json else print_pairs(plan)


def compress(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="empty folder that gets the artifact")],
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: options.Weights = None,
    target: options.Target = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="recipe.json of an artifact, or YAML")
    ] = None,
    ratio: Annotated[float | None, typer.Option(metavar="R", help="share removed from every group")] = None,
    criterion: Annotated[str | None, typer.Option(metavar="C", help="how units are ranked (l2)")] = None,
    bits: bit_options.Bits = None,
    activation_bits: bit_options.ActivationBits = None,
    scale: bit_options.Scale = None,
    block_size: bit_options.BlockSize = None,
    rounding: bit_options.Rounding = None,
    bias_correction: bit_options.BiasCorrection = None,
    aware: bit_options.Aware = None,
    half: bit_options.Half = None,
    activations: bit_options.Activations = None,
    equalize: bit_options.Equalize = None,
    smooth_alpha: bit_options.SmoothAlpha = None,
    ranking: Annotated[
        str | None, typer.Option(metavar="W", help="units compared: of a group, global or alike (group)")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="fine-tuning steps")] = None,
    sparsity: mask_options.Sparsity = None,
    pattern: mask_options.Pattern = None,
    allocation: mask_options.Allocation = None,
    mask_criterion: mask_options.MaskCriterion = None,
    rank_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="share of the rank removed from every layer")
    ] = None,
    feature_distill: Annotated[
        float | None, typer.Option(metavar="W", help="weight of the distillation on features")
    ] = None,
    order: Annotated[
        str | None, typer.Option(metavar="ORDER", help="prune-tune-quantize or tune-prune-quantize")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="KIND", help="one_shot, iterative, gradual or sparse (one_shot)")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="of an iterative or gradual schedule (3)")
    ] = None,
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """Compress a network by one recipe, without a search."""
    flags = {
        "model": model, "data": data, "weights": weights, "target": target, "seed": seed, "trust_code": trust_code,
    }  # fmt: skip
    settings = gather(config, flags, overrides or ())
    uniform: dict[str, Any] = {
        name: value
        for name, value in {
            "ratio": ratio,
            "criterion": criterion,
            "ranking": ranking,
            "rank_ratio": rank_ratio,
            "feature_distill": feature_distill,
            "order": order,
        }.items()  # fmt: skip
        if value is not None
    }
    uniform |= bit_options.gathered(
        bits, activation_bits, scale, block_size, rounding, bias_correction, aware,
        half, activations, equalize, smooth_alpha,
    )  # fmt: skip
    uniform |= mask_options.gathered(sparsity, pattern, allocation, mask_criterion)
    chosen = (
        None
        if recipe is None
        else _read_recipe(recipe, [*uniform, *(["steps"] if steps is not None else [])])
    )
    if (planned := given_schedule(schedule, rounds)) is not None:
        if recipe is not None:
            raise UsageError("--recipe and --schedule exclude each other: a recipe file says everything")
        uniform["schedule"] = planned
    if criterion is not None:
        _check_criterion(criterion)
    if ranking is not None:
        _check_ranking(ranking)
    if order is not None:
        _check_order(order)
    from autoprune.workloads.catalog import check_inputs

    check_inputs(settings)
    from autoprune.actions import compress_once

    with live_view(f"autoprune compress {settings.model}", quiet) as listener:
        result = compress_once(settings, to, recipe=chosen, steps=steps, listener=listener, **uniform)
    if json:
        print_json(result)
    else:
        print_pairs({name: value for name, value in result.items() if name != "recipe"})


def _check_criterion(criterion: str) -> None:
    from autoprune.space.recipe import CRITERIA

    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)


def _check_ranking(ranking: str) -> None:
    from typing import get_args

    from autoprune.space.recipe import Ranking

    if ranking not in get_args(Ranking):
        raise unknown_name("ranking", ranking, get_args(Ranking))


def _check_order(order: str) -> None:
    from autoprune.space.recipe import ORDERS

    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)


def _read_recipe(path: Path, also_given: list[str]) -> Recipe:
    """Read a recipe by itself, or the one in the ``recipe.json`` of an artifact."""
    from pydantic import ValidationError

    from autoprune.config import describe_faults
    from autoprune.space.recipe import Recipe
    from autoprune.yaml_io import read_yaml

    if also_given:
        given = also_given[0].replace("_", "-")
        raise UsageError(f"--recipe and --{given} exclude each other: a recipe file says everything")
    document = read_yaml(path)
    values = document.values
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_faults(str(path), error, document.line)) from None
    own = (choice.criterion for choice in recipe.groups.values() if choice.criterion)
    for criterion in (*recipe.criterion.values(), *own):
        _check_criterion(criterion)
    return recipe


def groups(
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: options.Weights = None,
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """List what can be compressed in a network, and why the rest cannot."""
    flags = {"model": model, "data": data, "weights": weights, "seed": seed, "trust_code": trust_code}
    settings = gather(config, flags, overrides or ())
    from autoprune.workloads.catalog import check_inputs

    check_inputs(settings)
    from autoprune.actions import list_groups

    with live_view(f"autoprune groups {settings.model}", quiet) as listener:
        found = list_groups(settings, listener)
    if json:
        print_json({"model": settings.model, **found.model_dump(mode="json")})
    else:
        _print_groups(found)


def _print_groups(found: Groups) -> None:
    rows = [
        (
            g.name,
            g.type,
            g.size,
            len(g.producers),
            len(g.consumers),
            "yes" if g.prunable else f"no: {g.reason}",
            g.block or "-",
        )
        for g in found.groups
    ]
    print_table(
        ["group", "type", "units", "made by", "read by", "prunable", "ratio 1 removes"],
        rows,
        ["units", "made by", "read by"],
    )
