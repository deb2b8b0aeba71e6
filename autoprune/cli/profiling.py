"""Verb `profile`: what every choice for every group of a network costs and buys on the target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli import options
from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_pairs, print_table, print_text
from autoprune.cli.settings import gather
from autoprune.errors import UsageError

if TYPE_CHECKING:
    from autoprune.report.profile_view import Cell, Row

_SHOWN = (0.25, 0.5, 0.75)
_LOST = {"divergence": "divergence of the outputs in nats", "loss": "growth of the task's loss"}
# A width stands under a heading no farther from it than this.
_NEAR = 0.13


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
    from autoprune.space.space_files import load_space
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
    _print_rows(rows, _LOST[measured.measure])
    print_pairs({**{k: v for k, v in content.items() if k != "groups"}, "heat_map": str(to)})


def _print_rows(rows: list[Row], lost: str) -> None:
    bits = min((row.bits for row in rows), default=32)
    columns = ["group", "units", f"{bits} bits", *(f"-{ratio:.0%}" for ratio in _SHOWN), "whole block", "is"]
    lines = []
    for row in rows:
        cells = [_figures(row.bits_loss, row.bits_size, row.bits_latency)]
        for ratio in _SHOWN:
            near = min(
                (c for c in row.cells if c.kept), key=lambda cell: abs(cell.ratio - ratio), default=None
            )
            cells.append(_cell(near) if near and abs(near.ratio - ratio) <= _NEAR else "")
        gone = next((cell for cell in row.cells if not cell.kept), None)
        lines.append([row.group, str(row.units), *cells, _cell(gone) if gone else "", row.verdict])
    print_text(f"each choice: {lost}, share of the dense file saved, share of the dense latency saved")
    print_table(columns, lines, ["units"], whole=["group", "is"])


def _cell(cell: Cell) -> str:
    return _figures(cell.loss, cell.size, cell.latency)


def _figures(loss: float, size: float, latency: float) -> str:
    return f"{loss:+.4f} {size:.1%} {latency:.1%}"
