"""The networks that the claims are tried on, each with its data, its groups and what the trials share."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.models import VisionTransformer  # noqa: E402

from autoprune.compress.discovery import cuttable, find_groups  # noqa: E402
from autoprune.compress.pipeline import Compressed, compress  # noqa: E402
from autoprune.compress.statistics import LayerStatistics, collect_statistics  # noqa: E402
from autoprune.compress.stream import TeacherStream  # noqa: E402
from autoprune.config import make_config  # noqa: E402
from autoprune.search.bench import Bench, discover  # noqa: E402
from autoprune.space.groups import Groups  # noqa: E402
from autoprune.space.recipe import Recipe, Recovery  # noqa: E402
from autoprune.workloads.data import load_data  # noqa: E402
from autoprune.workloads.workload import TOP1, Workload, load_workload  # noqa: E402

CACHE = HERE / "cache"
NAMES = ("resnet20", "vit", "lm")
_BATCH = 200


class NotHereError(Exception):
    """Data that this machine lacks."""


@dataclass
class Subject:
    """A trained network and what trials of it share.

    Attributes:
        name: Its name in the claims.
        groups: What can be removed.
        rate: Peak learning rate of its recovery.
        compressed: Carries a recipe out.
        accuracy: Scores a network on examples that nothing was trained or chosen on.
        calibration: Inputs and targets that decisions may read.
        test: Inputs and targets that only scores read.
        bench: Exports and measures images' networks; None for the language model.
    """

    name: str
    model: nn.Module
    groups: Groups
    rate: float
    compressed: Callable[[Recipe], Compressed]
    accuracy: Callable[[nn.Module], float]
    calibration: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    bench: Bench | None = None

    def recovery(self, steps: int) -> Recovery:
        """Return the recovery of all its trials."""
        return Recovery(finetune_steps=steps, learning_rate=self.rate)


def subject(name: str, settings: dict[str, Any]) -> Subject:
    """Return a network, trained first if it is one of our own and not in the cache.

    Raises:
        NotHereError: If its data is not on this machine.
    """
    torch.manual_seed(settings["seed"])
    if name == "resnet20":
        return _images(name, _resnet20(settings), 0.02, settings)
    if name == "vit":
        return _images(name, _vit(settings), 0.02, settings)
    return _language_model(settings)


def shared() -> Path:
    """Return the folder of the shared data.

    Raises:
        NotHereError: If there is none.
    """
    root = Path(os.environ.get("AUTOPRUNE_SHARED", HERE.parents[2] / "shared"))
    if not (root / "data" / "cifar_resnet20.safetensors").is_file():
        raise NotHereError("no shared data: set AUTOPRUNE_SHARED")
    return root / "data"


def cifar() -> Path:
    """Return the folder of CIFAR-10's images, unpacked once."""
    folder = CACHE / "cifar10"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with zipfile.ZipFile(shared() / "cifar10-jpeg.zip") as archive:
            archive.extractall(CACHE / "unpacking")
        found = next((CACHE / "unpacking").rglob("train")).parent
        found.rename(folder)
    return folder


# -- networks for images ----------------------------------------------------------------------


def _resnet20(settings: dict[str, Any]) -> tuple[Any, Workload]:
    config = make_config(
        {
            "model": "cifar_resnet20",
            "data": f"imagefolder:{cifar()}",
            "weights": str(shared() / "cifar_resnet20.safetensors"),
            "seed": settings["seed"],
            "report_examples": settings["test_examples"],
        }
    )
    return config, load_workload(config)


def _vit(settings: dict[str, Any]) -> tuple[Any, Workload]:
    config = make_config({"model": "resnet18", "data": "digits", "seed": settings["seed"]})
    data = load_data(config)
    torch.manual_seed(settings["seed"])
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=8, hidden_dim=96, mlp_dim=192, num_classes=10
    )
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    path = CACHE / f"vit-{settings['training']['vit']}-{settings['seed']}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        _train(model, data.train.training_batch, settings["training"]["vit"], 64, settings["seed"])
        CACHE.mkdir(exist_ok=True)
        save_file(model.state_dict(), path)
    return config, Workload(
        name="vit on digits",
        model=model.eval(),
        data=data,
        metric=TOP1,
        loss=F.cross_entropy,
        training_step=None,
        weights_source="trained here",
        search_split_seen=False,
        dense_trained=True,
    )


def _images(name: str, made: tuple[Any, Workload], rate: float, settings: dict[str, Any]) -> Subject:
    config, workload = made
    workload, groups = discover(workload)
    bench = Bench.build(config, workload, groups)
    test = list(workload.data.report.unseal().batches(_BATCH, limit=settings["test_examples"]))

    def accuracy(model: nn.Module) -> float:
        return _top1(model, test)

    return Subject(
        name, workload.model, groups, rate, bench.compressed, accuracy, bench.calibration, test, bench
    )


def with_seed(given: Subject, seed: int) -> Subject:
    """Return a network for images whose trials see their training examples in another order."""
    assert given.bench is not None  # noqa: S101
    data = given.bench.workload.data
    stream = TeacherStream(given.model, data.train, seed=seed, batch_size=given.bench.config.batch_size)
    bench = replace(given.bench, stream=stream, _networks={})
    return replace(given, compressed=bench.compressed, bench=bench)


# -- a language model ---------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, places, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, places, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Predicts the next letter: ``(n, places)`` to logits ``(n, letters, places)``."""

    def __init__(
        self, letters: int, places: int = 64, width: int = 128, heads: int = 8, layers: int = 4
    ) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Parameter(torch.zeros(1, places, width))
        nn.init.normal_(self.letters.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.head(self.norm(self.blocks(self.letters(tokens) + self.places)))
        return x.transpose(1, 2)


class _Text:
    """Windows of a text; the last tenth is for tests, the tenth before for calibration."""

    def __init__(self, path: Path, places: int) -> None:
        text = path.read_text(encoding="utf-8")
        letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
        self.count, self.places = len(letters), places
        self.tokens = torch.tensor([letters[letter] for letter in text])

    def training_batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return windows that depend on the step and the seed alone."""
        return self.windows(0.0, 0.8, size, seed * 1_000_003 + step)

    def windows(self, begin: float, end: float, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return random windows of a part of the text, and the letters that follow."""
        first, last = int(begin * len(self.tokens)), int(end * len(self.tokens)) - self.places - 1
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(first, last, (size,), generator=generator)
        index = starts[:, None] + torch.arange(self.places + 1)
        return self.tokens[index[:, :-1]], self.tokens[index[:, 1:]]


def _language_model(settings: dict[str, Any]) -> Subject:
    text = _Text(shared() / "tinyshakespeare.txt", 64)
    model = LanguageModel(text.count)
    path = CACHE / f"lm-{settings['training']['lm']}-{settings['seed']}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        _train(model, text.training_batch, settings["training"]["lm"], 32, settings["seed"])
        CACHE.mkdir(exist_ok=True)
        save_file(model.state_dict(), path)
    model.eval()
    calibration = [text.windows(0.8, 0.9, 32, seed) for seed in range(8)]
    test = [text.windows(0.9, 1.0, 100, seed) for seed in range(max(1, settings["test_examples"] // 500))]
    groups = find_groups(model, calibration[0][0][:2])
    network = cuttable(model, groups, calibration[0][0][:2]).eval()
    statistics: LayerStatistics = collect_statistics(
        network, groups, calibration, gradients=True, loss=F.cross_entropy
    )
    stream = TeacherStream(network, text, seed=settings["seed"], batch_size=32)

    def compressed(recipe: Recipe) -> Compressed:
        return compress(
            network,
            groups,
            recipe,
            statistics=statistics,
            calibration_batches=calibration,
            stream=stream,
            loss=F.cross_entropy,
            batch_size=32,
            device=torch.device("cpu"),
        )

    def accuracy(given: nn.Module) -> float:
        return _top1(given, test)

    return Subject("lm", network, groups, 0.02, compressed, accuracy, calibration, test)


# -- training and scoring -----------------------------------------------------------------------


def _train(
    model: nn.Module, batch: Callable[..., tuple[Tensor, Tensor]], steps: int, size: int, seed: int
) -> None:
    """Train a network of our own from random weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        inputs, targets = batch(step, size, seed)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"training: step {step} of {steps}", file=sys.stderr, flush=True)


@torch.no_grad()
def _top1(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    hits = torch.cat([(model(inputs).argmax(1) == targets).flatten() for inputs, targets in batches])
    return float(hits.float().mean())
