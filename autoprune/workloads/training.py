"""Training of the dense network where it is not trained for its data."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.clock import Clock, SystemClock
from autoprune.errors import UsageError
from autoprune.naming import cache_root
from autoprune.workloads.head import runs_channels_last
from autoprune.workloads.splits import Batch
from autoprune.workloads.splitting import content_hash
from autoprune.workloads.weights import apply_state, load_state, state_digest
from autoprune.workloads.workload import Workload

_VERSION = "1"
_SMOOTHING = 0.05
_WARM_UP = 0.25
_ATTEMPTS = 3
_MESSAGE_EVERY_S = 2.0
# A result with less than this share of the usual steps is trained anew by a run that has the time.
_ENOUGH = 0.8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How the dense network is trained.

    Attributes:
        steps: Gradient steps.
        epochs: Passes over the training images that these are.
        batch_size: Images in a step.
        adaptive: AdamW instead of SGD, for networks with layer normalisation.
        rate: Highest learning rate.
    """

    steps: int
    epochs: int
    batch_size: int
    adaptive: bool
    rate: float

    def rate_at(self, done: float) -> float:
        """Return the learning rate at a share of the training: up in a line for a quarter, then down by a cosine."""
        if done < _WARM_UP:
            return self.rate * done / _WARM_UP
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (done - _WARM_UP) / (1.0 - _WARM_UP)))


def plan_training(workload: Workload, batch_size: int, epochs: int | None = None) -> Schedule:
    """Choose the schedule by the network's layers and the number of images.

    Args:
        workload: The network and its data.
        batch_size: Most images in a step; small data takes smaller steps.
        epochs: Passes over the training images; by the number of images if not given.
    """
    count = len(workload.data.train)
    size = max(2, min(batch_size, max(16, count // 15)))
    epochs = epochs or min(12, max(5, math.ceil(40_000 / count)))
    steps = epochs * math.ceil(count / size)
    kinds = {type(module) for module in workload.model.modules()}
    batch_norm = any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    adaptive = any(issubclass(kind, nn.LayerNorm | nn.MultiheadAttention) for kind in kinds)
    fresh = workload.weights_source == "random"
    scale = size / 128
    if adaptive:
        rate = (1e-3 if fresh else 2e-4) * math.sqrt(scale)
    else:
        rate = (0.1 if batch_norm and fresh else 0.02) * scale
    return Schedule(steps, epochs, size, adaptive, rate)


def train_dense(
    workload: Workload,
    *,
    deadline: Callable[[], bool] | None = None,
    progress: Callable[[str], None],
    seed: int,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    epochs: int | None = None,
    time_limit_s: float | None = None,
    resuming: bool = False,
    clock: Clock | None = None,
) -> Workload:
    """Train the dense network for its data; an equal call later takes the result from the cache.

    Only the train split is trained on; nothing is selected on any split.

    Args:
        workload: A workload; returned as it is where its network is trained already.
        deadline: Returns True once training has to stop; what has been learned by then is kept.
        progress: Gets a line every few seconds.
        seed: Seed of the order of images and of their augmentation.
        batch_size: Most images in a step.
        device: Where to train; the GPU if there is one.
        epochs: Passes over the training images; by their number if not given.
        time_limit_s: Seconds in which the schedule ends, with fewer steps where they do not suffice for all.
        resuming: Take what is in the cache even where a deadline had cut it short, so that a study that goes
            on has the network that it began with.
        clock: Source of time.

    Raises:
        UsageError: If the loss does not stay finite at any learning rate that was tried.
    """
    if workload.dense_trained:
        return workload
    schedule = plan_training(workload, batch_size, epochs)
    path = _cache_path(workload, schedule, seed)
    found = _from_cache(workload, path, schedule, resuming, progress) if path is not None else None
    if found is not None:
        return found
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trainer = _Trainer(
        workload, schedule, seed, where, deadline, progress, time_limit_s, clock or SystemClock()
    )
    for attempt in range(_ATTEMPTS):
        model = trainer.run(0.2**attempt)
        if model is not None:
            break
        progress("the loss is not finite; beginning again at a fifth of the learning rate")
    else:
        raise UsageError(
            f"the network of {workload.name} cannot be trained: its loss does not stay finite",
            "give trained weights with --weights FILE",
        )
    progress(_verdict(workload, model, trainer.steps))
    if path is not None and trainer.steps:
        _save(model, path, trainer.steps)
    return _trained(workload, model, trainer.steps)


def trained_before(workload: Workload, weights: Path) -> Workload:
    """Return the workload with a network that was trained for it before.

    Args:
        workload: A workload whose network is not trained.
        weights: The trained weights, safetensors.

    Raises:
        UsageError: If they are not weights of this network; names the layers.
    """
    model = copy.deepcopy(workload.model)
    apply_state(model, load_state(weights), repr(str(weights)))
    source = f"trained before, sha256:{state_digest(model)[:16]}"
    return replace(workload, model=model.eval(), dense_trained=True, weights_source=source)


class _Trainer:
    """One training, which may be begun again at a lower rate."""

    def __init__(
        self,
        workload: Workload,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        deadline: Callable[[], bool] | None,
        progress: Callable[[str], None],
        time_limit_s: float | None,
        clock: Clock,
    ) -> None:
        self.workload, self.schedule, self.seed, self.device = workload, schedule, seed, device
        self.deadline, self.progress, self.clock = deadline, progress, clock
        self.steps = 0
        self._end_s = None if time_limit_s is None else self.clock.monotonic() + time_limit_s
        shape = workload.data.input_shape
        self._flat = len(shape) == 3
        self._layout = torch.contiguous_format
        if self._flat and runs_channels_last(workload.model, torch.zeros(1, *shape)):
            self._layout = torch.channels_last

    def run(self, factor: float) -> nn.Module | None:
        """Train a copy of the network; returns None where its loss or its weights are not finite."""
        model = copy.deepcopy(self.workload.model).to(self.device).train()
        if self._flat:
            model = model.to(memory_format=self._layout)
        optimizer = self._optimizer(model)
        started_s = said_s = self.clock.monotonic()
        self.steps = 0
        # Dropout draws from the global generator.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            while (done := self._done(started_s)) < 1.0 and not (self.deadline and self.deadline()):
                loss = self._step(model, optimizer, self.schedule.rate_at(done) * factor)
                if not math.isfinite(loss):
                    return None
                self.steps += 1
                now_s = self.clock.monotonic()
                if now_s - said_s >= _MESSAGE_EVERY_S:
                    said_s = now_s
                    self.progress(
                        f"training the dense network: step {self.steps} of at most {self.schedule.steps}, "
                        f"{self._done(started_s):.0%} done, loss {loss:.3f}"
                    )
        model = model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        finite = all(
            bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point()
        )
        return model if finite else None

    def _done(self, started_s: float) -> float:
        """Return the share of the training that is over, by steps or by time, whichever is further."""
        by_steps = (self.steps + 1) / (self.schedule.steps + 1)
        if self._end_s is None or by_steps >= 1.0:
            return by_steps
        if self._end_s <= started_s:
            return 1.0
        return max(by_steps, (self.clock.monotonic() - started_s) / (self._end_s - started_s))

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in weights if p.ndim > 1],
                "weight_decay": 0.05 if self.schedule.adaptive else 5e-4,
            },
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.schedule.adaptive:
            return torch.optim.AdamW(groups, lr=self.schedule.rate)
        return torch.optim.SGD(groups, lr=self.schedule.rate, momentum=0.9, nesterov=True)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> float:
        inputs, targets = self.workload.data.train.training_batch(
            self.steps, self.schedule.batch_size, self.seed
        )
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if self._flat:
            inputs = inputs.contiguous(memory_format=self._layout)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self._loss(model, (inputs, targets))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return float(loss.detach())

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.workload.training_step is not None:
            return self.workload.training_step(model, batch)
        outputs = model(batch[0])
        if self.workload.loss is F.cross_entropy:
            return F.cross_entropy(outputs.float(), batch[1], label_smoothing=_SMOOTHING)
        return self.workload.loss(outputs, batch[1])


def _trained(workload: Workload, model: nn.Module, steps: int) -> Workload:
    source = f"trained here, {steps} steps, sha256:{state_digest(model)[:16]}"
    return replace(workload, model=model, dense_trained=True, weights_source=source)


def _verdict(workload: Workload, model: nn.Module, steps: int) -> str:
    """Score the trained network on calibration images, which it has not seen."""
    outputs, targets = [], []
    with torch.no_grad():
        for inputs, target in workload.data.calibration.batches(64, limit=512):
            outputs.append(model(inputs))
            targets.append(target)
    value = workload.metric.score(torch.cat(outputs), torch.cat(targets))
    return (
        f"trained the dense network for {steps} steps: {workload.metric.name} {value:.3f} on calibration data"
    )


def _cache_path(workload: Workload, schedule: Schedule, seed: int) -> Path | None:
    """Return where the result is kept; None where a user's own loss decides, whose code has no hash."""
    if workload.training_step is not None or workload.loss is not F.cross_entropy:
        return None
    content = [
        _VERSION,
        repr(workload.model),
        state_digest(workload.model),
        workload.data.fingerprint,
        repr(schedule),
        str(seed),
    ]
    return cache_root() / "dense" / f"{content_hash(content)[:40]}.safetensors"


def _from_cache(
    workload: Workload, path: Path, schedule: Schedule, resuming: bool, progress: Callable[[str], None]
) -> Workload | None:
    """Return the workload with the weights of an earlier training; None where there are none that count."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            steps = int((file.metadata() or {}).get("steps", "0"))
        if not resuming and steps < _ENOUGH * schedule.steps:
            return None
        model = copy.deepcopy(workload.model)
        apply_state(model, load_state(path), repr(str(path)))
    except (UsageError, SafetensorError, OSError, ValueError) as error:
        progress(f"ignoring the damaged cache file {path}: {error}")
        return None
    progress(f"the dense network was trained before ({steps} steps): {path}")
    return _trained(workload, model.eval(), steps)


def _save(model: nn.Module, path: Path, steps: int) -> None:
    """Keep the trained weights; a disk that does not take them costs the next run a training, no more."""
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
            part = Path(folder) / path.name
            save_file(state, part, metadata={"steps": str(steps)})
            part.replace(path)
    except (OSError, SafetensorError) as error:
        _log.warning("the trained network cannot be kept in %s: %s", path.parent, error)
