"""Networks and measurements that take milliseconds: what a study under fault runs on, installed by its own model file.

Everything but the runtime, the timing and the search for groups is the product's own: surgery, closed-form recovery,
training steps, artifacts, record, final phase. Model files hold the weights, so that a damaged one would give other
figures.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.compress import discovery
from autoprune.deploy.runtime import Artifact, Formats
from autoprune.measure.record import Executed, Latency, RunFigures
from autoprune.space.groups import Groups
from autoprune.target import Target
from autoprune.workloads.workload import Workload
from tests.faults import misbehaviour, records
from tests.study.made import make_latency

CLASSES = 4
SIDE = 8
_EXAMPLES = 400


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Return classes that differ in the place of a bright corner, and noise: ``train`` and ``test``."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(2 * _EXAMPLES) % CLASSES
    inputs = 1.5 * torch.randn(2 * _EXAMPLES, 1, SIDE, SIDE, generator=generator)
    for number in range(CLASSES):
        rows, columns = divmod(number, 2)
        inputs[targets == number, :, 4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] += 0.8
    order = torch.randperm(2 * _EXAMPLES, generator=generator)
    train, test = order[:_EXAMPLES], order[_EXAMPLES:]
    return {"train": (inputs[train], targets[train]), "test": (inputs[test], targets[test])}


def shaped(first: int, second: int) -> nn.Sequential:
    """Return the network with so many channels."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * second, CLASSES),
    )


@functools.cache
def network() -> nn.Sequential:
    """Return the dense network: random features, and a last layer that is solved for; nothing is trained."""
    torch.manual_seed(0)
    model = shaped(16, 24).eval()
    head = model[8]
    assert isinstance(head, nn.Linear)
    inputs, targets = data()["train"]
    with torch.no_grad():
        features = model[:8](inputs)
        wanted = 4.0 * nn.functional.one_hot(targets, CLASSES).float()
        ones = torch.ones(len(features), 1)
        solved = torch.linalg.lstsq(torch.cat([features, ones], 1), wanted, driver="gelsd").solution
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
    return model


@functools.cache
def groups() -> Groups:
    """Return the groups of the dense network as the product finds them."""
    return discovery.find_groups(network(), data()["train"][0][:2])


class PlainFiles:
    """A runtime whose files are the weights themselves, one byte each where a layer is to run in int8."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def prepare(self, dense: nn.Module, example: Tensor) -> None:
        """Nothing has to be known beforehand."""

    def build(
        self, model: nn.Module, path: Path, formats: Formats, calibration: Sequence[Tensor]
    ) -> Artifact:
        """Write the file."""
        misbehaviour.in_build()
        whole = {f"{name}.weight" for name in formats.int8}
        header: list[tuple[str, list[int], float]] = []
        content = b""
        for name, tensor in model.state_dict().items():
            values = tensor.detach().double().numpy()
            scale = float(np.abs(values).max() / 127) if name in whole and values.size else 0.0
            header.append((name, list(values.shape), scale))
            content += (
                np.rint(values / scale).astype(np.int8) if scale else values.astype(np.float32)
            ).tobytes()
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<I", len(text)) + text + content)
        layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
        int8 = len(set(formats.int8))
        executed = Executed(layers=layers, int8_layers=int8, asked_int8=int8, operators={"layer": layers})
        return Artifact(path, executed, 0.0)

    def predict(self, path: Path, batches: Iterable[Tensor]) -> Tensor:
        """Run the network that the file holds."""
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<I", raw)
        state, place = {}, 4 + length
        for name, shape, scale in json.loads(raw[4:place]):
            kind = np.dtype(np.int8 if scale else np.float32)
            count = math.prod(shape)
            values = np.frombuffer(raw, kind, count, place).astype(np.float64) * (scale or 1.0)
            place += count * kind.itemsize
            state[name] = torch.tensor(values, dtype=torch.float32).reshape(shape)
        state = {
            name: value.long() if name.endswith("num_batches_tracked") else value
            for name, value in state.items()
        }
        model = shaped(len(state["0.weight"]), len(state["3.weight"]))
        model.load_state_dict(state)
        with torch.no_grad():
            return torch.cat([model.eval()(batch) for batch in batches])


def timed(
    candidates: Sequence[Path], dense: Path, *_: object, **__: object
) -> list[tuple[Latency, RunFigures]]:
    """Stand in for :func:`autoprune.measure.latency.measure_front`: time follows from the size of the files."""
    found = []
    for path in candidates:
        ratio = misbehaviour.in_timing((path.stat().st_size / dense.stat().st_size) ** 0.7)
        found.append((make_latency(ratio), RunFigures()))
    return found


def timed_one(candidate: Path, dense: Path, *_: object, **__: object) -> tuple[Latency, RunFigures]:
    """Stand in for :func:`autoprune.measure.latency.measure_latency`."""
    return timed([candidate], dense)[0]


def layer_times(models: Sequence[Path], layers: Collection[str], *_: object) -> list[dict[str, float]]:
    """Stand in for :func:`autoprune.measure.node_times.layer_seconds`."""
    return [
        dict.fromkeys(layers, 1e-6 * (path.stat().st_size / 1000) ** 0.7 / len(layers)) for path in models
    ]


def picture(store: Any, path: Path, *rest: Any) -> None:
    """Stand in for the drawing of the front, which takes longer than the study."""
    from autoprune.study.artifacts import write_bytes_atomic

    write_bytes_atomic(path, b"picture")


def page(store: Any, *rest: Any) -> str:
    """Stand in for the report page."""
    return f"{len(store.records())} trials"


def install() -> None:
    """Put all this into the place of what takes long, for the rest of this process."""
    import autoprune.report.html as html
    import autoprune.report.plot as plot
    import autoprune.search.bench as bench
    import autoprune.search.points as points
    import autoprune.search.profiling as profiling
    import autoprune.search.run as run
    import autoprune.search.trial as trial

    def found(workload: Workload) -> tuple[Workload, Groups]:
        return workload, groups()

    changes: dict[Any, dict[str, Callable[..., Any]]] = {
        bench: {"make_runtime": PlainFiles},
        run: {"discover": found},
        trial: {"measure_latency": timed_one},
        points: {"measure_front": timed},
        profiling: {"measure_front": timed, "layer_seconds": layer_times},
        plot: {"write_png": picture},
        html: {"report_page": page},
    }
    for module, names in changes.items():
        for name, own in names.items():
            assert hasattr(module, name), name
            setattr(module, name, own)
    records.install()
