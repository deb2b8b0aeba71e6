"""Times discovery, surgery and recovery of two networks against torch-pruning's own pruner, interleaved in one process.

pip install torch-pruning==1.6.1 first; the project itself does not need it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from tables import markdown  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from autoprune.compress.discovery import cuttable, find_groups  # noqa: E402
from autoprune.compress.graph.find import trace  # noqa: E402
from autoprune.compress.recovery import refresh_batchnorm, solve_following_layers  # noqa: E402
from autoprune.compress.statistics import collect_statistics  # noqa: E402
from autoprune.compress.surgery import make_plan, prune  # noqa: E402
from autoprune.space.recipe import uniform_recipe  # noqa: E402

NETWORKS = ("resnet50", "vit_b_16")
RATIO = 0.5
ROUNDS = 3
BATCH = 8


def main() -> None:
    """Time everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="run nothing, write the table from the record")
    path = HERE / "against.json"
    if not parser.parse_args().report:
        record = {
            "versions": {name: version(name) for name in ("torch", "torchvision", "torch-pruning")},
            "threads": torch.get_num_threads(),
            "networks": {name: timed(name) for name in NETWORKS},
        }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write(json.loads(path.read_text(encoding="utf-8")))


def timed(name: str) -> dict[str, Any]:
    """Return the seconds of each stage for both, one list of rounds each, and what both leave."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(2, 3, 224, 224)
    images = [(torch.randn(BATCH, 3, 224, 224), torch.randint(0, 1000, (BATCH,))) for _ in range(2)]
    groups = find_groups(model, example)
    network = cuttable(model, groups, example)
    recipe = uniform_recipe(groups, RATIO, 32)
    seconds: dict[str, list[float]] = {}
    left: dict[str, Any] = {}

    def clock(what: str, run: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = run()
        seconds.setdefault(what, []).append(time.perf_counter() - begun)
        return made

    for _ in range(ROUNDS):
        clock("discovery, autoprune", lambda: trace(model, example))
        theirs = deepcopy(model)
        pruner = clock("discovery, torch-pruning", lambda theirs=theirs: _pruner(theirs, example))
        plan = make_plan(network, groups, recipe, None)
        ours = clock(
            "surgery, autoprune", lambda: prune(network, groups, make_plan(network, groups, recipe, None))
        )
        clock("surgery, torch-pruning", pruner.step)
        clock("discovery with proof, autoprune", lambda: find_groups(model, example))
        clock(
            "closed-form recovery, autoprune",
            lambda ours=ours, plan=plan: _recover(network, ours, groups, plan, images),
        )
        for who, cut in (("autoprune", ours), ("torch-pruning", theirs)):
            clock(f"training step, {who}", lambda cut=cut: _step(cut, images[0]))
            left[who] = {
                "parameters": sum(p.numel() for p in cut.parameters())
                / sum(p.numel() for p in model.parameters()),
            }
    return {"seconds": seconds, "left": left, "groups": len(groups.prunable)}


def _pruner(model: nn.Module, example: Tensor) -> Any:
    import torch_pruning as tp

    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[last],
        round_to=8,
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
    )
    list(pruner.DG.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]))
    return pruner


def _recover(dense: nn.Module, cut: nn.Module, groups: Any, plan: Any, images: Any) -> None:
    statistics = collect_statistics(dense, groups, images)
    solve_following_layers(dense, cut, groups, plan, statistics)
    refresh_batchnorm(cut, [inputs for inputs, _ in images])


def _step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.train()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    model.eval()


def write(record: dict[str, Any]) -> None:
    """Write the table."""
    rows = []
    for name, own in record["networks"].items():
        times = {what: median(values) for what, values in own["seconds"].items()}
        for stage in (
            "discovery",
            "discovery with proof",
            "surgery",
            "closed-form recovery",
            "training step",
        ):
            ours, theirs = times.get(f"{stage}, autoprune"), times.get(f"{stage}, torch-pruning")
            rows.append(
                {
                    "network": name,
                    "stage": stage,
                    "autoprune, s": f"{ours:.2f}",
                    "torch-pruning, s": f"{theirs:.2f}" if theirs is not None else "has none",
                    "ratio": f"{ours / theirs:.2f}" if theirs is not None else "",
                }
            )
        shares = ", ".join(f"{who} {left['parameters']:.3f}" for who, left in own["left"].items())
        rows.append({"network": name, "stage": f"parameters left at {RATIO}: {shares}"})
    table = pd.DataFrame(rows).fillna("")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = (
        "# Against torch-pruning\n\nGenerated by `python studies/coverage/against.py`: the median of "
        f"{ROUNDS} rounds, interleaved in one process ({versions}, {record['threads']} threads). A single machine's "
        "seconds say little; the ratio is what to read. Cutting both by l2 in steps of 8.\n\n"
    )
    (HERE / "against.md").write_text(text + markdown(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
