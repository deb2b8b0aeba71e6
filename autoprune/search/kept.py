"""Kept: which artifacts of trials a search keeps on the disk, and whether they are sound."""

from __future__ import annotations

from autoprune.naming import StudyPaths
from autoprune.search.ledger import Ledger
from autoprune.search.outlook import Outlook
from autoprune.study.artifacts import discard_unlisted, usable
from autoprune.study.records import TrialRecord

# What is kept is chosen among all trials, which takes longer the more there are: in large studies not after each one.
_EVERY = 25


class Kept:
    """The artifacts of one study's trials.

    Args:
        paths: Where the study lies.
        most: Networks that the final recovery trains at most.

    Attributes:
        wanted: Trials from which others start that an earlier run began and that are still to be tried again.
    """

    def __init__(self, paths: StudyPaths, most: int) -> None:
        self._paths = paths
        self._most = most
        self._sound: set[int] = set()
        self.wanted: set[int] = set()

    def has(self, record: TrialRecord) -> bool:
        """Return whether the weights of a search trial are kept."""
        return record.fidelity == "search" and self.is_sound(record.number)

    def is_sound(self, number: int) -> bool:
        """Return whether a trial's artifact is there and what was written; each is checked once in a run."""
        place = self._paths.artifact(number)
        if number not in self._sound and usable(place):
            self._sound.add(number)
        return number in self._sound and place.is_dir()

    def discard_dominated(self, ledger: Ledger, outlook: Outlook) -> None:
        """Keep those of the dense network, the baselines, the front and what the final recovery would train.

        Of trials that are not recorded yet it keeps what they start from, and what they may have written by now. It
        depends on the number of finished trials alone when something is removed, so that a resumed search finds what
        one finds that was not interrupted.
        """
        finished = ledger.finished - ledger.cut_off
        if finished % (1 + finished // _EVERY):
            return
        keep = ledger.fronts.numbers() | ledger.given | self.wanted
        keep |= {n for r in ledger.running() for n in (r.number, r.started_from) if n is not None}
        keep |= {r.number for members in outlook.networks(self._most) for r in members}
        discard_unlisted(self._paths, keep)
