"""Verb `profile`: what every choice for every group of a network costs and buys on the target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_pairs, print_table
from autoprune.cli.settings import gather
from autoprune.errors import UsageError

if TYPE_CHECKING:
    from autoprune.report.profile_view import Row

_SHOWN = (0.25, 0.5, 0.75)


def profile(
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: options.Weights = None,
    space: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="search space; see `autoprune spaces`")
    ] = None,
    target: options.Target = None,
    to: Annotated[Path, typer.Option("--to", metavar="FILE.png", help="file that gets the heat map")] = Path(
        "profile.png"
    ),
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """Measure what can be removed at what price, and what it saves on the target."""
    flags = {
        "model": model, "data": data, "weights": weights, "space": space, "target": target, "seed": seed,
        "trust_code": trust_code,
    }  # fmt: skip
    settings = gather(config, flags, overrides or ())
    if to.suffix != ".png":
        raise UsageError(f"--to {str(to)!r} cannot be used; allowed: a file that ends in .png")
    from autoprune.space.search_space import load_space
    from autoprune.workloads.catalog import check_inputs

    load_space(settings.space)
    check_inputs(settings)
    from autoprune.actions import profile_network
    from autoprune.report.profile_view import profile_json, profile_rows, write_heat_map

    with live_view(f"autoprune profile {settings.model}", quiet) as listener:
        measured, found = profile_network(settings, listener)
    rows = profile_rows(measured, found)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_heat_map(measured, rows, to)
    content = profile_json(measured, found, rows)
    if json:
        print_json({"model": settings.model, "heat_map": str(to), **content})
        return
    _print_rows(rows)
    print_pairs({**{k: v for k, v in content.items() if k != "groups"}, "heat_map": str(to)})


def _print_rows(rows: list[Row]) -> None:
    bits = min((row.bits for row in rows), default=32)
    columns = ["group", "units", f"{bits} bits: loss", "saves latency"]
    for ratio in _SHOWN:
        columns += [f"-{ratio:.0%}: loss", "saves size", "saves latency"]
    cells = []
    for row in rows:
        line = [row.group, str(row.units), f"{row.bits_loss:+.4f}", f"{row.bits_latency:+.1%}"]
        for ratio in _SHOWN:
            near = min(row.cells, key=lambda cell: abs(cell.ratio - ratio), default=None)
            line += (
                [f"{near.loss:+.4f}", f"{near.size:+.1%}", f"{near.latency:+.1%}"] if near else ["", "", ""]
            )
        cells.append([*line, row.verdict])
    print_table([*columns, "is"], cells, columns[1:])
