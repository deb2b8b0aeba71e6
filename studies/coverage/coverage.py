"""Takes networks of public libraries through discovery, cuts, training and export, and writes the ledger of it.

Each network runs in a process of its own and leaves a record in records/; the tables are made of the records.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import pandas as pd  # noqa: E402
from tables import markdown  # noqa: E402

from autoprune.yaml_io import read_yaml  # noqa: E402

RECORDS = HERE / "records"
SOURCES = ("torchvision", "torchvision segmentation", "timm", "transformers")
LIMIT_S = 900
# Largest difference from the network that ignores the same units, as a share of the largest output.
EXACT = 1e-4
# The same for an exported file.
PARITY = 1e-3


def main() -> None:
    """Run what is asked for and has no record yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="names such as 'timm/*' or 'torchvision/resnet*'"
    )
    parser.add_argument("--again", action="store_true", help="run also what has a record")
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the tables from the records"
    )
    parser.add_argument("--one", metavar="NAME", help="run one network in this process and print its record")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(examine(given.one)))
        return
    settings: Any = read_yaml(HERE / "models.yaml").values
    names = [] if given.report else [n for n in all_names(settings) if fnmatch.fnmatchcase(n, given.only)]
    RECORDS.mkdir(exist_ok=True)
    for name in names:
        path = RECORDS / f"{name.replace('/', '.').replace(' ', '_')}.json"
        if given.again or not path.is_file():
            record = run_one(name)
            path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(summary(record), file=sys.stderr, flush=True)
    write_tables([json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))])


def all_names(settings: dict[str, Any]) -> list[str]:
    """Return the networks as ``source/name``."""
    import torchvision

    names = [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    names += [f"torchvision segmentation/{name}" for name in segmentation]
    names += [f"timm/{name}" for name in settings["timm"]]
    return names + [f"transformers/{name}" for name in settings["transformers"]]


def run_one(name: str) -> dict[str, Any]:
    """Examine one network in a process of its own, which may fail in any way."""
    command = [sys.executable, str(HERE / "coverage.py"), "--one", name]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done after {LIMIT_S} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"name": name, "error": lines[-1][:300]}
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


# -- one network -----------------------------------------------------------------------------


def build(name: str) -> tuple[Any, Any]:
    """Return a network with random weights, and two of its inputs."""
    import torch

    torch.manual_seed(0)
    source, _, own = name.partition("/")
    if source == "transformers":
        return _transformer(own)
    if source == "timm":
        import timm

        model = timm.create_model(own, pretrained=False)
        return model.eval(), torch.randn(2, *model.default_cfg["input_size"])
    import torchvision

    if source == "torchvision segmentation":
        model = torchvision.models.get_model(own, weights=None, weights_backbone=None)
        return model.eval(), torch.randn(2, 3, 128, 128)
    options = {"init_weights": False} if own in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(own, weights=None, **options)
    # Convolutions take any size, and what can be removed does not depend on it; attention has its own.
    size = 224 if own.startswith(("vit", "swin", "maxvit")) else 299 if own == "inception_v3" else 96
    return model.eval(), torch.randn(2, 3, size, size)


def _transformer(name: str) -> tuple[Any, Any]:
    """Return a tiny transformer of the usual shape."""
    import torch
    import transformers as t

    words: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    tokens = torch.randint(0, 64, (2, 12))
    made: Any
    if name == "bert":
        config = t.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **words
        )
        made = t.BertModel(config)
    elif name == "distilbert":
        made = t.DistilBertModel(t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **words))
    elif name == "gpt2":
        made = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, use_cache=False, **words))
    elif name == "llama":
        config = t.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, use_cache=False, **words,
        )  # fmt: skip
        made = t.LlamaForCausalLM(config)
    else:
        config = t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
        )  # fmt: skip
        made, tokens = t.ViTModel(config), torch.randn(2, 3, 32, 32)
    return _First(made).eval(), tokens


def _First(model: Any) -> Any:  # noqa: N802
    """Return a network that gives the first output of ``model`` alone."""
    from torch import nn

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(x)[0]

    return First()


def examine(name: str) -> dict[str, Any]:
    """Find groups, cut at every ratio, compare, train a step, export; return what was seen."""
    import torch

    from autoprune.compress.discovery import cuttable, find_groups
    from autoprune.compress.graph.find import trace
    from autoprune.compress.surgery import make_plan, prune
    from autoprune.compress.verification import compare
    from autoprune.space.recipe import uniform_recipe

    settings: Any = read_yaml(HERE / "models.yaml").values
    model, example = build(name)
    threads = torch.get_num_threads()
    begun = time.perf_counter()
    groups = find_groups(model, example)
    seconds = time.perf_counter() - begun
    network = cuttable(model, groups, example)
    record: dict[str, Any] = {
        "name": name,
        "versions": _versions(name),
        "host": {"python": platform.python_version(), "threads": threads},
        "input": list(example.shape[1:]),
        "discovery_s": round(seconds, 2),
        "groups": len(groups.groups),
        "prunable": len(groups.prunable),
        "blocks": sum(bool(g.block) for g in groups.groups),
        "rewritten": groups.rewritten,
        "params": sum(p.numel() for p in network.parameters()),
        "macs": _macs(network, example),
        "reachable": _reachable(network, groups),
        "left_alone": {g.name: g.reason for g in groups.groups if not g.prunable},
        "ratios": {},
    }
    plans = {
        ratio: make_plan(network, groups, uniform_recipe(groups, ratio, 32), None)
        for ratio in settings["ratios"]
    }
    differences = compare(model, trace(model, example), groups, example, list(plans.values()))
    unused = _without_gradient(network, example)
    for (ratio, plan), difference in zip(plans.items(), differences, strict=True):
        begun = time.perf_counter()
        cut = prune(network, groups, plan).eval()
        record["ratios"][str(ratio)] = {
            "surgery_s": round(time.perf_counter() - begun, 2),
            "params": sum(p.numel() for p in cut.parameters()),
            "macs": _macs(cut, example),
            "difference": difference,
            # The smallest network alone: an export takes as long as all the rest.
            "export": _export(cut, example) if ratio == max(plans) else None,
            "backward": _backward(cut, example, unused),
        }
    return record


def _versions(name: str) -> dict[str, str]:
    from importlib.metadata import version

    library = name.partition("/")[0].partition(" ")[0]
    return {each: version(each) for each in sorted({"torch", library})}


def _macs(model: Any, example: Any) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(example)
    return int(counter.get_total_flops()) // 2 // len(example)


def _reachable(model: Any, groups: Any) -> float:
    """Return the share of parameters that some group can remove: of a layer that is cut on any side all."""
    held = {name: p.numel() for name, p in model.named_parameters()}
    members = {m.layer for g in groups.prunable for m in g.members if m.kind != "size"}
    reached = {name for name in held if name in members or name.rpartition(".")[0] in members}
    return round(sum(held[name] for name in reached) / max(1, sum(held.values())), 4)


def _backward(model: Any, example: Any, unused: set[str]) -> str:
    """Run one step of training; return what went wrong."""
    try:
        lacking = sorted(_without_gradient(model, example) - unused)
    except Exception as error:  # whatever the network raises
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return f"{len(lacking)} parameters without gradient, such as {lacking[0]}" if lacking else ""


def _without_gradient(model: Any, example: Any) -> set[str]:
    """Return the parameters that one step of training gives no gradient."""
    from autoprune.compress.outputs import flat_outputs

    outputs = flat_outputs(model.train()(example))
    sum(output.float().square().mean() for output in outputs).backward()
    lacking = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    model.zero_grad(set_to_none=True)
    model.eval()
    return lacking


def _export(model: Any, example: Any) -> float | str:
    """Return how far the exported network is from the network, as a share of the largest output; or what failed."""
    import onnxruntime
    import torch

    from autoprune.compress.outputs import flat_outputs
    from autoprune.deploy.parity import relative_error
    from autoprune.deploy.template import export_fresh

    try:
        with torch.no_grad():
            wanted = [output.numpy() for output in flat_outputs(model(example))]
        raw = export_fresh(model, example).proto.SerializeToString()
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        made = session.run(None, {name: example.numpy()})
        return max(relative_error(got, want) for got, want in zip(made, wanted, strict=True))
    except Exception as error:  # the exporter and the runtime raise whatever they meet
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# -- tables ----------------------------------------------------------------------------------


def summary(record: dict[str, Any]) -> str:
    """Return one line for people."""
    if "error" in record:
        return f"{record['name']}: {record['error']}"
    return (
        f"{record['name']}: {record['prunable']} of {record['groups']} groups, {record['discovery_s']} s, "
        f"{'exact' if is_exact(record) else 'NOT EXACT'}, {'exported' if is_exported(record) else 'NOT EXPORTED'}"
    )


def is_exact(record: dict[str, Any]) -> bool:
    """Whether all cuts compute what the network that ignores the same units does."""
    return all(
        isinstance(r["difference"], float) and r["difference"] <= EXACT for r in record["ratios"].values()
    )


def is_exported(record: dict[str, Any]) -> bool:
    """Whether all cuts run in onnxruntime and give the network's outputs."""
    seen = [r["export"] for r in record["ratios"].values() if r["export"] is not None]
    return bool(seen) and all(isinstance(error, float) and error <= PARITY for error in seen)


def is_trained(record: dict[str, Any]) -> bool:
    """Whether a step of training of all cuts ran."""
    return all(r["backward"] == "" for r in record["ratios"].values())


def write_tables(records: list[dict[str, Any]]) -> None:
    """Write coverage.csv and README.md."""
    ratios = [str(r) for r in read_yaml(HERE / "models.yaml").values["ratios"]]  # type: ignore[index,call-overload]
    good = [r for r in records if "error" not in r]
    rows = [
        {
            "network": r["name"],
            "groups": r["groups"],
            "can be cut": r["prunable"],
            "blocks": r["blocks"],
            "graph": "yes" if r["rewritten"] else "",
            "parameters reachable": f"{r['reachable']:.1%}",
            **{f"MACs at {x}": f"{r['ratios'][x]['macs'] / r['macs']:.3f}" for x in ratios},
            **{f"parameters at {x}": f"{r['ratios'][x]['params'] / r['params']:.3f}" for x in ratios},
            "exact": "yes" if is_exact(r) else "NO",
            "training": "yes" if is_trained(r) else "NO",
            "export": "yes" if is_exported(r) else "NO",
            "discovery, s": r["discovery_s"],
        }
        for r in good
    ]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "coverage.csv", index=False)
    parts = [
        "# What can be cut",
        "Networks of public libraries with random weights, taken through `groups`, uniform cuts by l2, one step of "
        "training and export to onnxruntime. Generated by `python studies/coverage/coverage.py` from `records/`; the "
        "networks are listed in `models.yaml`; `pip install '.[zoo]'` brings timm and transformers.",
        "*graph*: the network's code holds sizes, so that it is cut as a graph of its layers. *blocks*: residual "
        "blocks that can be taken out whole. *exact*: the cut network computes what the dense one does that ignores the same units, "
        f"up to {EXACT:g} of the largest output. *export*: the file of the deepest cut gives the network's outputs in onnxruntime. "
        "*parameters reachable*: those of layers that some group cuts.",
        totals(records),
        "## Networks\n\n" + markdown(table),
        "## What is left alone\n\n" + left_alone(good),
    ]
    failures = [f"- {r['name']}: {text}" for r in records for text in faults(r)]
    parts.append("## What failed\n\n" + ("\n".join(failures) if failures else "Nothing."))
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def totals(records: list[dict[str, Any]]) -> str:
    """Return how many networks of each source pass."""
    rows = []
    for source in SOURCES:
        own = [r for r in records if r["name"].partition("/")[0] == source]
        good = [r for r in own if "error" not in r]
        if not own:
            continue
        slowest = max((r["discovery_s"] for r in good), default=0.0)
        rows.append(
            {
                "source": source,
                "networks": len(own),
                "something can be cut": sum(r["prunable"] > 0 for r in good),
                "exact": sum(is_exact(r) for r in good),
                "training": sum(is_trained(r) for r in good),
                "export": sum(is_exported(r) for r in good),
                "groups": sum(r["groups"] for r in good),
                "can be cut": sum(r["prunable"] for r in good),
                "parameters reachable, mean": f"{sum(r['reachable'] for r in good) / max(1, len(good)):.1%}",
                "slowest discovery, s": slowest,
            }
        )
    return "## Totals\n\n" + markdown(pd.DataFrame(rows))


def left_alone(records: list[dict[str, Any]]) -> str:
    """Return what stops groups from being cut, the networks' outputs aside."""
    kinds: Counter[str] = Counter()
    where: dict[str, str] = {}
    for record in records:
        for name, reason in record["left_alone"].items():
            kind = _kind(reason)
            kinds[kind] += 1
            where.setdefault(kind, f"{record['name']}, {name}: {reason}")
    rows = [
        {"reason": kind, "groups": count, "for example": where[kind]} for kind, count in kinds.most_common()
    ]
    return markdown(pd.DataFrame(rows)) if rows else "Nothing."


def _kind(reason: str) -> str:
    """Return a reason without the names of layers."""
    import re

    return re.sub(r"'[^']*'", "…", reason).replace(" (and", "\0").partition("\0")[0]


def faults(record: dict[str, Any]) -> list[str]:
    """Return what went wrong with a network."""
    if "error" in record:
        return [record["error"]]
    found = []
    for ratio, seen in record["ratios"].items():
        if not (isinstance(seen["difference"], float) and seen["difference"] <= EXACT):
            found.append(f"ratio {ratio}: differs by {seen['difference']}")
        if seen["backward"]:
            found.append(f"ratio {ratio}, training: {seen['backward']}")
        if not (seen["export"] is None or (isinstance(seen["export"], float) and seen["export"] <= PARITY)):
            found.append(f"ratio {ratio}, export: {seen['export']}")
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
