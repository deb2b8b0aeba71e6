"""A whole study: load, train the dense network, find groups, search, recover the front."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial

from autoprune.clock import Clock
from autoprune.config import StudyConfig, parse_budget
from autoprune.errors import StorageError, TrialError, UsageError
from autoprune.faults import reached
from autoprune.measure.host import describe_host
from autoprune.naming import StudyPaths
from autoprune.search.auto import AutoSearch
from autoprune.search.baselines import Baseline
from autoprune.search.bench import WEIGHTS_FILE, Bench, as_groups_say, check_features, discover
from autoprune.search.budget import Timekeeper
from autoprune.search.cost_model import CostModel
from autoprune.search.driver import Driver
from autoprune.search.events import Listener, Progress
from autoprune.search.executors.contract import Setup
from autoprune.search.executors.start import WorkerTrials, started_executor
from autoprune.search.executors.work import build_bench
from autoprune.search.final import FinalPhase
from autoprune.search.interrupt import Interrupt
from autoprune.search.jobs import Job, Strategy
from autoprune.search.limits import check_space, compares_features
from autoprune.search.options import Options
from autoprune.search.profile import Profile, read_profile, write_profile
from autoprune.search.profiling import measure_profile
from autoprune.search.replay import spent_s
from autoprune.search.shelf import Shelf
from autoprune.search.space_cut import study_cut
from autoprune.search.trial import failures_as_trial_errors
from autoprune.space.groups import Groups
from autoprune.space.recipe import GRADIENT_CRITERIA, Recipe
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import load_space
from autoprune.study.artifacts import verify
from autoprune.study.env import write_environment
from autoprune.study.front import dense_number
from autoprune.study.opening import has_record
from autoprune.study.store import StudyStore
from autoprune.workloads.training import train_dense, trained_before
from autoprune.workloads.weights import state_digest
from autoprune.workloads.workload import Workload, load_workload

# Share of the budget for the profile, and seconds under a budget of trials.
_PROFILE_SHARE = 0.05
_PROFILE_TRIALS_S = 120.0
# Of the time that is left after the profile the search has at least so much of its share, and this share where the
# final phase only measures.
_LEAST_OF_SHARE = 0.75
_SHARE_WITHOUT_TRAINING = 0.6


def run_study(
    config: StudyConfig,
    *,
    fresh: bool,
    listener: Listener,
    clock: Clock,
    started_s: float | None = None,
    load: Callable[[], Workload] | None = None,
    close: Callable[[StudyStore], object],
) -> StudyStore:
    """Run or resume a study until its budget is spent, its trials are done, or the user ends it.

    Args:
        config: Validated settings.
        fresh: Start over, keeping the earlier study aside.
        listener: Gets progress.
        clock: Source of time.
        started_s: Monotonic reading from which the budget counts; now if not given.
        load: Loads the workload; by the settings' names if not given.
        close: Writes the report of what there is, at the end and after an interruption.

    Returns:
        The study's record.

    Raises:
        KeyboardInterrupt: After the user ended the search; what there is has been reported.
    """
    started_s = clock.monotonic() if started_s is None else started_s
    config.check_installed()
    space = load_space(config.space)
    check_space(config, space)
    config.check_installed()
    paths = StudyPaths.of(config.study_name)
    shelf = Shelf.of(config, paths)
    if brought := shelf.restore():
        listener(Progress("load", f"fetched {len(brought)} artifacts of study {paths.name} from its mirror"))
        if not has_record(paths, config.storage):
            raise StorageError(
                f"the record of study {paths.name!r} is in SQLite on another node; its artifacts were fetched to here",
                "run it there, or begin another --study with --storage postgresql://… for drivers on several nodes",
            )
    if fresh:
        shelf.forget()
    store = (
        StudyStore.create_or_resume(config, paths, fresh=fresh) if has_record(paths, config.storage) else None
    )
    if store is not None and store.phase == "done" and not _extends(config, store):
        listener(
            Progress(
                "done",
                f"study {paths.name} is finished; --fresh starts over, "
                f"a --budget beyond {store.ended_budget} continues",
            )
        )
        if not all(path.is_file() for path in (paths.report, paths.front_csv, paths.front_png)):
            close(store)
        store.release()
        return store
    try:
        listener(Progress("load", f"loading {config.model} and {config.data or 'its usual data'}"))
        workload = load() if load is not None else load_workload(config)
    except BaseException:
        if store is not None:
            store.release()
        raise
    store = store or StudyStore.create_or_resume(config, paths, fresh=fresh)
    keeper = Timekeeper(
        parse_budget(config.budget),
        config.final_share,
        clock,
        spent_s(store),
        started_s,
        divided_s=max(store.ended_rounds_s, default=0.0),
    )
    interrupt = Interrupt()
    try:
        with interrupt.listening():
            write_environment(paths, config, describe_host(), workload.data.fingerprint)
            given = None if load is None else workload
            _search(store, space, config, workload, given, shelf, keeper, interrupt, listener, clock)
            store.set_spent(keeper.spent_s)  # the report states it
            close(store)
            shelf.tidy(at_once=True)
            reached("report:written")
    finally:
        try:
            store.set_spent(keeper.spent_s)
        finally:
            store.release()
    if interrupt.requested:
        raise KeyboardInterrupt
    return store


def _extends(config: StudyConfig, store: StudyStore) -> bool:
    """Return whether the budget given now goes beyond the one that the study finished."""
    now, before = parse_budget(config.budget), parse_budget(store.ended_budget)
    if now.seconds is not None and before.seconds is not None:
        return now.seconds > before.seconds
    return now.trials is None or before.trials is None or now.trials > before.trials


def _search(
    store: StudyStore,
    space: SearchSpace,
    config: StudyConfig,
    workload: Workload,
    given: Workload | None,
    shelf: Shelf,
    keeper: Timekeeper,
    interrupt: Interrupt,
    listener: Listener,
    clock: Clock,
) -> None:
    """Run every phase that is not over yet; ``given`` is the workload of a user's own objects, unchanged."""
    check_same_inputs(store, workload, space)
    check_features(compares_features(space), workload)
    listener(Progress("groups", "finding groups", left_s=keeper.left_s))
    workload, groups = _groups(store, workload)
    space.check(groups)
    cut = study_cut(store, space, groups, config)
    for line in cut.lines:
        listener(Progress("space", line, left_s=keeper.left_s, last=line))
    space = cut.applied(space, groups)
    workload = with_trained_dense(store, workload, config, keeper, interrupt, listener)
    if interrupt():
        return
    listener(Progress("groups", "measuring the dense network", left_s=keeper.left_s))
    store.note("search_split_seen", "yes" if workload.search_split_seen else "no")
    if workload.search_split_seen and config.limits.min_accuracy is not None:
        message = (
            "the network may know the search split: --min-accuracy is kept there, the report split shows less"
        )
        listener(Progress("groups", message, left_s=keeper.left_s))
    auto = config.sampler == "auto"
    # The default search's profile estimates from gradients what it has no time to measure.
    by_gradient = any(name in GRADIENT_CRITERIA for names in space.criteria.values() for name in names)
    setup = Setup(config, groups, gradients=auto or by_gradient, by_gradient=by_gradient)
    with started_executor(setup, workload, given, keeper, interrupt, paths=store.paths) as executor:
        bench = build_bench(setup, workload)
        # A run that goes on after a kill has timed nothing itself.
        bench.timings.take(store.notes().get("timings", "{}"))
        trials = None if executor is None else WorkerTrials(executor, bench, store.paths)
        driver = Driver(
            store, space, bench, keeper, interrupt, listener, clock,
            run=None if trials is None else trials.run,
            adopt_dense=None if trials is None else trials.adopt_dense,
            executor=executor, shelf=shelf,
        )  # fmt: skip
        final = FinalPhase(driver, bench)
        store.phase = "search"
        screen = None if trials is None else trials.screen
        strategy = default_strategy(driver, bench, config, clock, cut.in_float, screen) if auto else None
        driver.search(final.reserve_s, strategy)
        if interrupt():
            return
        keeper.begin_final()
        store.phase = "final"
        final.run()
        if not interrupt():
            reached("round:over")
            store.end_round(keeper.spent_s, config.budget)
            reached("round:told")


def default_strategy(
    driver: Driver,
    bench: Bench,
    config: StudyConfig,
    clock: Clock,
    in_float: Collection[str] = (),
    scored: Callable[[Recipe, int | None], float] | None = None,
) -> Strategy:
    """Return the default search, which begins with the profile once the dense network is measured.

    Args:
        driver: The driver of the study.
        bench: What the trials share.
        config: Settings of the study.
        clock: Source of time.
        in_float: Groups that run in float whatever bits are asked for.
        scored: Returns the capability of a recipe after closed-form recovery alone, by so many examples; the bench's
            if not given.
    """
    scored = scored or (lambda recipe, examples: bench.screened(recipe, examples).value)

    def strategy(baselines: Sequence[Baseline]) -> None:
        if not driver.may_propose():
            return
        try:
            profile = _profile(driver, bench, config)
        except TrialError as error:
            driver.store.note("profile_failure", f"{error.kind}: {error.reason}")
            driver.say(f"no profile ({error.kind}: {error.reason}); TPE proposes instead")
            driver.run_each(
                partial(driver.trial, Job(baseline.recipe, "baseline", baseline.label))
                for baseline in baselines
                if driver.may_propose()
            )
            driver.propose_by_sampler()
            return
        if driver.interrupt():
            return
        _share_preparations(driver)
        costs = CostModel(profile.shapes, profile.designs, in_float=in_float)
        options = Options(profile, bench.groups, driver.space, costs)
        examples = driver.space.rungs[0].examples
        dense = bench.screened(Recipe(), examples).value

        def screen(recipe: Recipe) -> float:
            with failures_as_trial_errors():
                return dense - scored(recipe, examples)

        AutoSearch(driver, options, screen, config, clock).run(baselines)

    return strategy


def _share_preparations(driver: Driver) -> None:
    """Let the final phase bear its part of what came before the first proposal, once in each round of the study."""
    name = f"granted_s:{driver.store.round}"
    noted = driver.store.notes().get(name)
    share = _LEAST_OF_SHARE * (1.0 - driver.bench.config.final_share)
    if not driver.space.trains:
        share = max(share, _SHARE_WITHOUT_TRAINING)
    granted_s = driver.keeper.wanted_s(share) if noted is None else float(noted)
    driver.store.note(name, str(granted_s))
    driver.keeper.grant(granted_s)


def _profile(driver: Driver, bench: Bench, config: StudyConfig) -> Profile:
    """Return the study's profile: measured once, so that a run that goes on decides by the same figures."""
    kept = read_profile(driver.paths.profile)
    if kept is not None:
        return kept
    left_s = driver.keeper.left_s
    budget_s = parse_budget(config.budget).seconds
    allowed_s = _PROFILE_TRIALS_S if budget_s is None else _PROFILE_SHARE * budget_s
    if left_s is not None:
        allowed_s = min(allowed_s, _PROFILE_SHARE * 2 * left_s)
    with failures_as_trial_errors():
        profile = measure_profile(bench, driver.space, allowed_s, driver.say, driver.interrupt)
    if not driver.interrupt():
        write_profile(driver.paths.profile, profile)
        reached("profile:written")
    return profile


def _groups(store: StudyStore, workload: Workload) -> tuple[Workload, Groups]:
    """Return the study's groups, and the workload with the network that they belong to.

    They are found once, because a time limit makes finding them depend on the machine's speed.
    """
    kept = store.notes().get("groups")
    if kept is not None:
        groups = Groups.model_validate_json(kept)
        return as_groups_say(workload, groups), groups
    workload, groups = discover(workload)
    store.note("groups", groups.model_dump_json())
    return workload, groups


def check_same_inputs(store: StudyStore, workload: Workload, space: SearchSpace) -> None:
    """Refuse to go on with another search space, images or trained weights under the names that the study began with.

    Raises:
        UsageError: If they differ; says which.
    """
    # A network that is trained here comes back from the study's own artifact, whatever it was initialised with.
    network = state_digest(workload.model) if workload.dense_trained else "trained here"
    choices = hashlib.sha256(space.content().encode()).hexdigest()
    now = {"data": workload.data.fingerprint, "network": network, "search space": choices}
    before = store.notes()
    changed = [name for name, value in now.items() if before.get(f"{name}_content", value) != value]
    if changed:
        raise UsageError(
            f"the {' and the '.join(changed)} of study {store.paths.name!r} changed since it began: "
            "other content under the same name",
            "give what it began with, choose another --study NAME, or --fresh to start over (the old study is kept)",
        )
    for name, value in now.items():
        if f"{name}_content" not in before:
            store.note(f"{name}_content", value)


def with_trained_dense(
    store: StudyStore,
    workload: Workload,
    config: StudyConfig,
    keeper: Timekeeper,
    interrupt: Interrupt,
    listener: Listener,
) -> Workload:
    """Train the dense network if it is not trained for its data; at most a third of the budget goes into it."""
    if workload.dense_trained:
        return workload
    number = dense_number(store.records())
    if number is not None and (weights := store.paths.artifact(number) / WEIGHTS_FILE).is_file():
        verify(
            store.paths.artifact(number)
        )  # trained anew it would be another network than the record is about
        listener(
            Progress("dense", f"taking the dense network from trial {number} of study {store.paths.name}")
        )
        return trained_before(workload, weights)
    return train_dense(
        workload,
        deadline=interrupt,
        time_limit_s=None if keeper.left_s is None else keeper.left_s / 3,
        resuming=bool(store.records()),
        progress=lambda message: listener(Progress("dense", message, left_s=keeper.left_s)),
        seed=config.seed,
    )
