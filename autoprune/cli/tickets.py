"""Verb `tickets`: lottery tickets, ways of training them and controls, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli import options
from autoprune.cli.live import live_view
from autoprune.cli.output import print_json, print_pairs, print_table, print_text
from autoprune.cli.settings import gather
from autoprune.errors import UsageError

if TYPE_CHECKING:
    from autoprune.search.ticket_record import TicketRecord, TicketSettings


def tickets(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="folder that gets the record")],
    overrides: options.Overrides = None,
    model: options.Model = None,
    data: options.Data = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="F", help="file to begin with instead of random weights"),
    ] = None,
    ratio: Annotated[float | None, typer.Option(metavar="R", help="share of weights removed (0.8)")] = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="in which they are removed (3)")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="S", help="of one training; as for the dense network if not given")
    ] = None,
    rewind_step: Annotated[
        int | None, typer.Option(metavar="K", help="early step to rewind to (a twentieth of the steps)")
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="repetitions (2)")] = None,
    structured: Annotated[
        bool, typer.Option("--structured", help="remove channels instead of weights")
    ] = False,
    rate: Annotated[float | None, typer.Option(metavar="R", help="peak learning rate")] = None,
    seed: options.Seed = None,
    trust_code: options.TrustCode = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Settings = None,
) -> None:
    """Find lottery tickets and compare them, trained in several ways, with random controls."""
    flags = {"model": model, "data": data, "weights": weights, "seed": seed, "trust_code": trust_code}
    settings = gather(config, flags, overrides or ())
    wanted = _wanted(
        {
            "ratio": ratio, "rounds": rounds, "steps": steps, "rewind_step": rewind_step, "seeds": seeds, "rate": rate,
            "structured": structured,
        }
    )  # fmt: skip
    if settings.weights == "DEFAULT":
        raise UsageError(
            "weights 'DEFAULT' are trained ones: a ticket begins with random weights; allowed: none or a file",
            "leave --weights out",
        )
    from autoprune.workloads.catalog import check_inputs

    check_inputs(settings)
    from autoprune.search.ticket_record import RECORD_FILE, read_record
    from autoprune.search.tickets import compare_tickets

    try:
        with live_view(f"autoprune tickets {settings.model}", quiet) as listener:
            record = compare_tickets(settings, wanted, to, listener)
    except KeyboardInterrupt:
        found = read_record(to) if (to / RECORD_FILE).is_file() else None
        if found is not None and found.results:
            _show(found, to, json)
        raise
    _show(record, to, json)


def _wanted(given: dict[str, Any]) -> TicketSettings:
    from pydantic import ValidationError

    from autoprune.config import describe_faults
    from autoprune.search.ticket_record import TicketSettings

    try:
        return TicketSettings.model_validate({n: v for n, v in given.items() if v is not None})
    except ValidationError as error:
        raise UsageError(describe_faults("tickets", error)) from None


def _show(record: TicketRecord, to: Path, json: bool) -> None:
    from autoprune.report.tickets_view import ticket_table, write_tickets
    from autoprune.search.ticket_record import MEANINGS, RECORD_FILE

    files = {"record": str(to / RECORD_FILE), **write_tickets(record, to)}
    if json:
        rows = [row.model_dump(mode="json") for row in record.rows()]
        print_json({**record.model_dump(mode="json"), "rows": rows, "files": files})
        return
    headings, cells = ticket_table(record)
    for kind, meaning in MEANINGS.items():
        print_text(f"{kind:<12}{meaning}")
    print_table(headings, cells, headings[1:], whole=["kind"])
    print_pairs({"examples": record.examples, **files})
