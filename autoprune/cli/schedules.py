"""The options of the command line that name a schedule of pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

if TYPE_CHECKING:
    from autoprune.space.schedule import Schedule


def given_schedule(kind: str | None, rounds: int | None) -> Schedule | None:
    """Return the schedule that was asked for; None where none was.

    Raises:
        UsageError: If the kind is unknown, has no rounds, or the number of rounds is not allowed.
    """
    from pydantic import ValidationError

    from autoprune.config import describe_faults
    from autoprune.space.schedule import SCHEDULES, SETTINGS_OF, Schedule

    if kind is None and rounds is None:
        return None
    if kind is not None and kind not in SCHEDULES:
        raise unknown_name("schedule", kind, SCHEDULES)
    values = {"kind": kind or "one_shot", **({} if rounds is None else {"rounds": rounds})}
    try:
        schedule = Schedule.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_faults("the schedule", error)) from None
    if rounds is not None and "rounds" not in SETTINGS_OF[schedule.kind]:
        raise UsageError(
            f"--rounds {rounds} cannot be used: the schedule {schedule.kind!r} has no rounds; "
            "allowed with --schedule iterative and gradual"
        )
    return schedule
