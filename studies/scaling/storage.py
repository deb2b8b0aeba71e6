"""What a study of many trials costs: one more trial, the driver's memory, `front` and `report`, on each database.

    python studies/scaling/storage.py run      # writes storage.json here; about five minutes on two cores
    python studies/scaling/storage.py page     # writes storage.md and storage.png from it

Trials are those of a network of 20 groups, with about 43 parameters each (tests/study/large.py). PostgreSQL is a server
of its own in a temporary folder, which flushes every commit to disk as SQLite does.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

SIZES = (100, 1_000, 10_000)
MORE = 30
# Those of Optuna, which look at the study for each proposal, and how many each makes.
SAMPLERS, FEW = ("random", "tpe", "nsga2"), 10
RECORD = HERE / "storage.json"


def run() -> None:
    """Measure on SQLite and, where it is installed, on PostgreSQL, and write the record."""
    rows, server = [], _server()
    try:
        for kind in ("sqlite", *(["postgresql"] if server is not None else [])):
            with tempfile.TemporaryDirectory(prefix="autoprune-scaling-") as folder:
                environment = {**os.environ, "AUTOPRUNE_STUDIES": folder, "PYTHONPATH": str(HERE.parents[1])}
                environment.pop("AUTOPRUNE_STORAGE", None)
                if kind == "postgresql":
                    environment["AUTOPRUNE_STORAGE"] = server.database()
                for trials in SIZES:
                    rows.append(
                        {"storage": kind, "trials": trials, **_measured(f"n{trials}", trials, environment)}
                    )
                    print(rows[-1], file=sys.stderr)
    finally:
        if server is not None:
            from tests.study.postgres import remove_postgres

            remove_postgres(server)
    load = os.getloadavg()[0]
    host = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_the_end": round(load, 1),
    }
    RECORD.write_text(
        json.dumps({"host": host, "more": MORE, "few": FEW, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


def _server() -> Any:
    import pytest

    from tests.study.postgres import make_postgres

    try:
        return make_postgres(fsync=True)
    except pytest.skip.Exception as reason:
        print(f"without PostgreSQL: {reason}", file=sys.stderr)
        return None


def _measured(name: str, trials: int, environment: dict[str, str]) -> dict[str, Any]:
    def child(*words: str) -> dict[str, Any]:
        done = subprocess.run(  # noqa: S603
            [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    child("fill", name, str(trials))
    found = child("more", name)
    for verb in ("front", "report"):
        begun_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "autoprune", verb, name, "--json"], env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[f"{verb}_s"] = time.perf_counter() - begun_s
        found[f"{verb}_cpu_s"] = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return found


def fill(name: str, trials: int) -> dict[str, Any]:
    """Make a study of so many trials."""
    from tests.study.large import fill as fill_study
    from tests.study.made import open_for_writing

    store = open_for_writing(name)
    fill_study(store, trials)
    store.release()
    return {}


def more(name: str) -> dict[str, Any]:
    """Resume the study and record some more trials; return what each took, and the memory of this process."""
    from autoprune.space.recipe import Recipe
    from autoprune.study.decode import Plan
    from tests.study.large import GROUPS, SPACE, draw, measured
    from tests.study.made import open_for_writing

    before_mb = _peak_mb()
    begun_s = time.perf_counter()
    store = open_for_writing(name)
    store.records()
    resumed_s = time.perf_counter() - begun_s
    proposed, recorded = [], []
    for number in range(MORE + 3):
        _, drawn = draw(10**6 + number)
        at_s = [time.perf_counter()]
        trial = store.ask(dict(drawn.params))
        recipe: Recipe = SPACE.suggest(trial, GROUPS)
        store.begin(trial, Plan(recipe, "walk"))
        at_s.append(time.perf_counter())
        store.complete(trial, measured(recipe, number), train_steps=40, duration_s=12.0)
        store.records()
        at_s.append(time.perf_counter())
        proposed.append(at_s[1] - at_s[0])
        recorded.append(at_s[2] - at_s[1])
    by_sampler = {f"{name}_ms": _sampled_ms(store, name) for name in SAMPLERS}
    store.release()
    both = [a + b for a, b in zip(proposed[3:], recorded[3:], strict=True)]
    return {
        "resume_s": resumed_s,
        "propose_ms": 1000 * statistics.median(proposed[3:]),
        "record_ms": 1000 * statistics.median(recorded[3:]),
        "trial_ms": 1000 * statistics.median(both),
        "trial_slowest_ms": 1000 * max(both),
        **by_sampler,
        "memory_mb": _peak_mb(),
        "memory_of_an_empty_driver_mb": before_mb,
    }


def _sampled_ms(store: Any, sampler: str) -> float:
    """Return the milliseconds of one more trial that a sampler proposes, the first ones left out.

    NSGA-II draws its first generation of 20 blindly, and has parents to choose among from the third on.
    """
    from autoprune.study.decode import Plan
    from tests.study.large import GROUPS, SPACE, measured

    store.sampler_name = sampler
    took = []
    before = 45 if sampler == "nsga2" else 2
    for number in range(FEW + before):
        begun_s = time.perf_counter()
        trial = store.ask()
        recipe = SPACE.suggest(trial, GROUPS)
        store.begin(trial, Plan(recipe, sampler))
        store.complete(trial, measured(recipe, number), train_steps=40, duration_s=12.0)
        store.records()
        took.append(time.perf_counter() - begun_s)
    return 1000 * statistics.median(took[before:])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def page() -> None:
    """Write the table and the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = record["rows"]
    head = "| record | trials | propose, ms | record, ms | both, ms | slowest, ms | random, ms | tpe, ms | nsga2, ms | resume, s | driver, MB | `front`, s | of it CPU | `report`, s | of it CPU |"
    lines = [
        "# A study of many trials",
        "",
        f"Generated by `python studies/scaling/storage.py page` from storage.json: medians of {record['more']} trials, on "
        f"{record['host']['cores']} cores ({record['host']['machine']}), with a load of "
        f"{record['host']['load_at_the_end']} at the end. Proposing is asking for a trial of a given recipe and recording "
        "its plan; recording is its result, until all records are read again. *random*, *tpe* and *nsga2* are both for a trial "
        f"that the sampler proposes, medians of {record['few']}. `front` and `report` are whole commands, "
        "Python's start included.",
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
    ]
    for row in rows:
        figures = [f"{row[name]:.0f}" for name in ("propose_ms", "record_ms", "trial_ms", "trial_slowest_ms")]
        figures += [f"{row[f'{name}_ms']:.0f}" for name in SAMPLERS]
        figures += [
            f"{row['resume_s']:.1f}",
            f"{row['memory_mb']:.0f}",
            *(f"{row[name]:.1f}" for name in ("front_s", "front_cpu_s", "report_s", "report_cpu_s")),
        ]
        lines.append(f"| {row['storage']} | {row['trials']:,} | " + " | ".join(figures) + " |")
    lines += ["", "![one more trial and the verbs](storage.png)", ""]
    (HERE / "storage.md").write_text("\n".join(lines), encoding="utf-8")
    picture = Figure(figsize=(9.0, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2)
    for kind in dict.fromkeys(row["storage"] for row in rows):
        own = [row for row in rows if row["storage"] == kind]
        sizes = [row["trials"] for row in own]
        left.plot(sizes, [row["trial_ms"] for row in own], "o-", label=kind)
        for verb, dash in (("front", "-"), ("report", "--")):
            right.plot(sizes, [row[f"{verb}_s"] for row in own], f"o{dash}", label=f"{verb}, {kind}")
    for axes, label, bar in ((left, "one more trial, ms", 100), (right, "the verb, s", 5)):
        axes.axhline(bar, color="#9ca3af", linestyle=":")
        axes.set(xscale="log", xlabel="trials in the study", ylabel=label, ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)
    picture.savefig(HERE / "storage.png")


if __name__ == "__main__":
    verb, *words = sys.argv[1:] or [""]
    if verb == "fill":
        print(json.dumps(fill(words[0], int(words[1]))))
    elif verb == "more":
        print(json.dumps(more(words[0])))
    elif verb in ("run", "page"):
        {"run": run, "page": page}[verb]()
    else:
        sys.exit(__doc__)
