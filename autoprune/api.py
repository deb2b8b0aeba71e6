"""The library: search a model and data of the user's own, and work with the study that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.clock import Clock, SystemClock
from autoprune.config import StudyConfig, make_config
from autoprune.errors import UsageError
from autoprune.naming import StudyPaths
from autoprune.search.events import Listener, ignore
from autoprune.study.elsewhere import seen_by, seen_on, targets_of
from autoprune.study.front import FrontPoint, dense_record, front_points, pick_points, to_frame
from autoprune.study.records import TrialRecord
from autoprune.study.store import StudyStore
from autoprune.target import target_word

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from autoprune.measure.record import Robustness
    from autoprune.workloads.workload import Metric, Workload


@dataclass(frozen=True)
class Point:
    """One point of a front.

    Attributes:
        study: Name of the study.
        record: The trial behind it, with all its measurements.
    """

    study: str
    record: TrialRecord

    @property
    def trial(self) -> int:
        """Number of the trial."""
        return self.record.number

    def export(self, to: str | Path) -> Path:
        """Write the artifact, its weights and recipe, and a card into the folder ``to``.

        Raises:
            UsageError: If ``to`` holds files already.
            StorageError: If the artifact is damaged or missing.
        """
        from autoprune.exporting import export_point

        return export_point(self.study, self.record.number, Path(to))


class Study:
    """A study on disk, with its front.

    Args:
        store: The study's record, open for reading.
    """

    def __init__(self, store: StudyStore) -> None:
        self._store = store

    @property
    def name(self) -> str:
        """Name of the study."""
        return self._store.paths.name

    @property
    def path(self) -> Path:
        """Folder of the study."""
        return self._store.paths.root

    @property
    def paths(self) -> StudyPaths:
        """Files of the study, of the target that its figures are of."""
        return self._store.paths

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives."""
        return self._store.objectives

    @property
    def targets(self) -> tuple[str, ...]:
        """Words of the targets that it is measured on, the one that the search decided by first."""
        return targets_of(self._store.settings())

    @property
    def target(self) -> str:
        """Word of the target that its figures are of."""
        return target_word(self._store.settings().get("target", {}))

    def on(self, target: str) -> Study:
        """Return the study with the figures of one of its targets.

        Raises:
            UsageError: If it has no such target.
        """
        return Study(seen_on(self._store, target))

    def measured_by(self, file: str | Path) -> Study:
        """Return the study with figures that ``autoprune measure --json`` printed elsewhere of its exports.

        Raises:
            UsageError: If the file cannot be read, or is of another study.
        """
        from autoprune.study.measurements import read_measurements

        return Study(seen_by(self._store, read_measurements(Path(file), self._store)))

    def records(self) -> list[TrialRecord]:
        """Return every trial, failed ones included."""
        return self._store.records()

    def points(self) -> list[FrontPoint]:
        """Return the front."""
        return front_points(self._store)

    def front(self) -> pd.DataFrame:
        """Return the front as a table, one row a point, best capability first."""
        return to_frame(self.points(), self._store.paths)

    def pick(
        self,
        *,
        max_latency_ms: float | None = None,
        max_latency_ratio: float | None = None,
        max_size_mb: float | None = None,
        min_accuracy: float | None = None,
        max_drop: float | None = None,
        knee: bool = False,
    ) -> Point:
        """Return the best point under the given limits: the highest capability, or the knee.

        Args:
            max_latency_ms: Most milliseconds for one batch.
            max_latency_ratio: Most latency as a share of the dense network's.
            max_size_mb: Most megabytes (1e6 bytes) of the model file.
            min_accuracy: Least capability.
            max_drop: Most capability lost against the dense network.
            knee: Take the point where the trade turns instead of the most capable one.

        Raises:
            NoFeasiblePointError: If no point satisfies the limits; names the nearest miss.
        """
        chosen = pick_points(
            self.points(),
            max_latency_ms=max_latency_ms,
            max_latency_ratio=max_latency_ratio,
            max_size_mb=max_size_mb,
            min_accuracy=min_accuracy,
            max_drop=max_drop,
            knee=knee,
            dense=dense_record(self.records()),
            objectives=self.objectives,
        )
        return Point(self.name, chosen[0].record)

    def report(self) -> list[Path]:
        """Write ``report.html``, ``front.png`` and ``front.csv`` into the study's folder and return their paths."""
        from autoprune.report.writing import write_report

        return list(write_report(self._store).values())

    def robustness(
        self,
        records: Sequence[TrialRecord] | None = None,
        *,
        trust_code: bool = False,
        progress: Listener = ignore,
    ) -> dict[int, Robustness]:
        """Return what trials are worth on corrupted images of the report split, by their numbers.

        Measured once from the exported model files, then read from ``robustness.json`` in the study's folder. Trials
        without an artifact are left out.

        Args:
            records: Trials; the front's if not given.
            trust_code: Whether a Python file given as data may be run.
            progress: Called with every step.

        Raises:
            UsageError: If no name stands for the study's data, it changed, or holds no images in 0..1.
        """
        from autoprune.search.robustness import study_robustness

        chosen = [point.record for point in self.points()] if records is None else records
        return study_robustness(self._store, chosen, progress, trust_code=trust_code)

    def plot(self) -> Figure:
        """Return the front as a matplotlib figure."""
        from autoprune.report.plot import figure

        return figure(self._store)


def open_study(name: str, storage: str | None = None) -> Study:
    """Open a study that exists.

    Args:
        name: Name of the study.
        storage: Where its record is, such as ``postgresql://user@host/database``, if not where its folder says.

    Raises:
        UsageError: If there is none of this name; the message holds near matches.
    """
    return Study(StudyStore.open(name, storage))


def search(
    model: nn.Module | str,
    data: Any,
    budget: str = "1h",
    *,
    metric: Metric | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    training_step: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] | None = None,
    fresh: bool = False,
    progress: Listener = ignore,
    clock: Clock | None = None,
    **settings: Any,
) -> Study:
    """Search the front of a network; the same call again resumes.

    Args:
        model: A network, or a name that the command line takes.
        data: ``(train, test)``, a mapping with these keys, or one data set that is split; each a torch
            ``Dataset``, a ``DataLoader`` or a pair of tensors; or a name that the command line takes.
        budget: Time such as ``"2h"``, or trials such as ``"50trials"``; everything is counted.
        metric: What is searched for, higher is better; top-1 accuracy if not given.
        loss: Loss of outputs and targets; cross entropy if not given.
        training_step: Replaces the loss of fine-tuning: takes the network and a batch, returns the loss.
        fresh: Start over; the earlier study is moved aside, never deleted.
        progress: Called with every step of the search.
        clock: Source of time, for tests.
        **settings: Any other field of :class:`autoprune.config.StudyConfig`, such as ``study`` or ``space``.

    Returns:
        The finished study.

    Raises:
        KeyboardInterrupt: After Ctrl-C; what there is has been recorded, and ``open_study`` opens it.
        UsageError: If a setting, the model or the data cannot be used.
    """
    clock = clock or SystemClock()
    started_s = clock.monotonic()
    network = None if isinstance(model, str) else model
    if (network is None) != isinstance(data, str):
        raise UsageError(
            "model and data must both be names or both be objects", "pass a module with its data sets"
        )
    if network is None and (metric is not None or loss is not None or training_step is not None):
        raise UsageError(
            "metric, loss and training_step go with a model and data given as objects, not as names"
        )
    values = {
        "model": model if network is None else type(network).__name__,
        "data": data if network is None else "given",
        "budget": budget,
        **settings,
    }
    config = make_config(values)
    load = None
    if network is not None:
        load = _loader(network, data, metric, loss, training_step, config)
    return run_search(config, fresh=fresh, progress=progress, clock=clock, started_s=started_s, load=load)


def _loader(
    network: nn.Module,
    data: Any,
    metric: Metric | None,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    training_step: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] | None,
    config: StudyConfig,
) -> Callable[[], Workload]:
    def load() -> Workload:
        from autoprune.workloads.workload import workload_from_objects

        return workload_from_objects(
            network, data, metric=metric, loss=loss, training_step=training_step, config=config
        )

    return load


def run_search(
    config: StudyConfig,
    *,
    fresh: bool = False,
    progress: Listener = ignore,
    clock: Clock | None = None,
    started_s: float | None = None,
    load: Callable[[], Workload] | None = None,
) -> Study:
    """Run or resume the study that ``config`` describes; see :func:`search`.

    Args:
        config: Validated settings.
        fresh: Start over, keeping the earlier study aside.
        progress: Called with every step of the search.
        clock: Source of time.
        started_s: Monotonic reading from which the budget counts; now if not given.
        load: Loads the workload; by the settings' names if not given.
    """
    from autoprune.report.writing import write_report
    from autoprune.search.run import run_study

    store = run_study(
        config,
        fresh=fresh,
        listener=progress,
        clock=clock or SystemClock(),
        started_s=started_s,
        load=load,
        close=write_report,
    )
    return Study(store)
