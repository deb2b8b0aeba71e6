"""Verb `sensitivity`: how much accuracy each group of a network costs, cut alone and ever deeper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_pairs, print_table, print_text
from autoprune.cli.settings import gather
from autoprune.errors import UsageError
from autoprune.naming import unknown_name

if TYPE_CHECKING:
    from autoprune.search.curves import Analysis

RECOVERIES = ("none", "closed_form")


def sensitivity(
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: options.Weights = None,
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="R,R", help="shares removed, each between 0 and 1")
    ] = "0.1,0.3,0.5,0.7,0.9",
    criteria: Annotated[
        str, typer.Option("--criteria", metavar="C,C", help="how units are ranked")
    ] = "l2,activation",
    recover: Annotated[
        str, typer.Option("--recover", metavar="R", help="none, or closed_form: without training")
    ] = "none",
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="folder that gets sensitivity.csv and .png")
    ] = Path(),
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """Cut every group by itself and measure what is lost on the search split."""
    flags = {"model": model, "data": data, "weights": weights, "seed": seed, "trust_code": trust_code}
    settings = gather(config, flags, overrides or ())
    shares, names = _ratios(ratios), _criteria(criteria)
    if recover not in RECOVERIES:
        raise unknown_name("recovery", recover, RECOVERIES)
    if to.exists() and not to.is_dir():
        raise UsageError(
            f"--to {str(to)!r} cannot be used; allowed: a folder, which is made if it is not there"
        )
    from autoprune.workloads.catalog import check_inputs

    check_inputs(settings)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--to {str(to)!r} cannot be made: {error}", "choose another folder") from error
    from autoprune.report.sensitivity_view import write_sensitivity_csv, write_sensitivity_png
    from autoprune.search.interrupt import Interrupt
    from autoprune.search.sensitivity import analyse

    interrupt = Interrupt()
    with live_view(f"autoprune sensitivity {settings.model}", quiet) as listener:
        found = analyse(
            settings,
            shares,
            names,
            "closed_form" if recover == RECOVERIES[1] else "none",
            listener,
            interrupt,
        )
    files = [to / "sensitivity.csv", to / "sensitivity.png"]
    write_sensitivity_csv(found, files[0])
    write_sensitivity_png(found, files[1])
    _show(settings.model, found, files, json)
    if interrupt.requested:
        raise KeyboardInterrupt


def _show(model: str, found: Analysis, files: list[Path], json: bool) -> None:
    from autoprune.report.sensitivity_view import sensitivity_json, sensitivity_table

    content = sensitivity_json(found)
    if json:
        print_json({"model": model, "files": [str(path) for path in files], **content})
        return
    columns, rows = sensitivity_table(found)
    print_text(f"points of {found.metric} lost on the search split, one group cut at a time")
    print_table(
        columns, rows, numeric=[c for c in columns if c not in ("group", "criterion")], whole=["group"]
    )
    kept = {name: value for name, value in content.items() if name != "curves"}
    print_pairs({**kept, "files": ", ".join(str(path) for path in files)})


def _ratios(text: str) -> tuple[float, ...]:
    """Read ``--ratios``: numbers between 0 and 1, each once."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0.0 < ratio < 1.0 for ratio in found):
        raise UsageError(
            f"--ratios {text!r} cannot be used; allowed: shares removed above 0 and below 1, such as 0.1,0.5",
            "what taking out a whole block costs is measured in any case",
        )
    return found


def _criteria(text: str) -> tuple[str, ...]:
    """Read ``--criteria``: known names, each once."""
    from autoprune.space.recipe import CRITERIA

    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in CRITERIA:
            raise unknown_name("criterion", name, CRITERIA)
    return names
