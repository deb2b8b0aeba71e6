"""The verbs of the command line, in one list."""

from __future__ import annotations

from typing import Annotated

import typer

from autoprune import __version__
from autoprune.cli.doctor import doctor
from autoprune.cli.profiling import profile
from autoprune.cli.searching import compress, groups, search
from autoprune.cli.sensitivity import sensitivity
from autoprune.cli.spaces import spaces
from autoprune.cli.studying import export, front, measure, report, studies
from autoprune.cli.tickets import tickets

app = typer.Typer(
    name="autoprune",
    help="Search the Pareto front of a network's compressed versions, measured where they will run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Search the Pareto front of a network's compressed versions, measured where they will run."""


_VERBS = (
    search,
    front,
    report,
    export,
    compress,
    measure,
    groups,
    profile,
    sensitivity,
    tickets,
    studies,
)
for verb in _VERBS:
    app.command()(verb)
app.add_typer(spaces, name="spaces")
app.command()(doctor)
