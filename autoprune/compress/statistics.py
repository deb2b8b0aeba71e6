"""Statistics of a dense network on calibration data, collected once for all recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprune.compress.layers import BatchNorm, Conv, device_of, submodule, weight_rows
from autoprune.errors import CompressionError
from autoprune.space.groups import Axis, Groups

# Places of an image whose patches enter a Gram matrix; half of them where patches are long, to bound its cost.
_PLACES = 32
_LONG_PATCH = 1152
# Gram matrices of longer patches are kept in float32 to bound memory.
_MOST_DOUBLE = 2048


@dataclass
class LayerStatistics:
    """What was seen of the layers of one network.

    Attributes:
        second_moment: For each layer that reads a prunable group, the mean square of every input channel
            over examples and places, ``(in,)``.
        gram: For the same layers, unless their patches are too long or their kind is not covered,
            :math:`E[z z^T]` of the unfolded input with a constant 1 appended,
            :math:`z = (x, 1)`, ``(features + 1, features + 1)``; features in the order of
            ``weight.flatten(1)``.
        products: For each weighted layer of a prunable group, the sums of gradient times weight over each
            channel's weights, one row for each batch, ``(batches, channels)`` by axis. Empty unless asked for.
        squares: The same with the squares of the products added up, ``(batches, channels)`` by axis.
        before_batchnorm: Layers whose very outputs a BatchNorm reads.
    """

    second_moment: dict[str, Tensor] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)
    products: dict[tuple[str, Axis], Tensor] = field(default_factory=dict)
    squares: dict[tuple[str, Axis], Tensor] = field(default_factory=dict)
    before_batchnorm: frozenset[str] = frozenset()

    def moment_of(self, layer: str) -> Tensor:
        """Return the second moments of a layer's inputs.

        Raises:
            CompressionError: If they were not collected.
        """
        if layer not in self.second_moment:
            raise CompressionError(f"no statistics of the inputs of layer {layer!r} were collected")
        return self.second_moment[layer]

    def products_of(self, layer: str, axis: Axis) -> Tensor:
        """Return gradient times weight of a layer's channels.

        Raises:
            CompressionError: If they were not collected.
        """
        return _collected(self.products, layer, axis)

    def squares_of(self, layer: str, axis: Axis) -> Tensor:
        """Return the squares of gradient times weight of a layer's channels.

        Raises:
            CompressionError: If they were not collected.
        """
        return _collected(self.squares, layer, axis)


def _collected(values: dict[tuple[str, Axis], Tensor], layer: str, axis: Axis) -> Tensor:
    if (layer, axis) not in values:
        raise CompressionError(
            f"no gradients of layer {layer!r} were collected", "collect statistics with gradients=True"
        )
    return values[layer, axis]


def collect_statistics(
    model: nn.Module,
    groups: Groups,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    gram_limit: int = 4608,
    gradients: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> LayerStatistics:
    """Run the dense network over calibration batches and collect what criteria and recovery need.

    Args:
        model: The dense network; its weights, mode and gradients are as before afterwards.
        groups: Its groups.
        batches: Inputs and targets, on any device.
        gram_limit: Longest patch (features of one output's input) that gets a Gram matrix.
        gradients: Whether to differentiate ``loss``, which the criteria ``taylor`` and ``fisher`` need.
        loss: ``(outputs, targets)`` to a scalar; only used with ``gradients``.

    Returns:
        The statistics, on the CPU.

    Raises:
        CompressionError: If there are no batches.
    """
    if not batches:
        raise CompressionError(
            "statistics need at least one calibration batch", "the calibration split is empty"
        )
    device = device_of(model)
    weighted = ("conv", "depthwise", "linear")
    members = {(m.layer, m.axis) for g in groups.prunable for m in g.members if m.kind in weighted}
    collectors = {
        layer: _InputCollector(submodule(model, layer), gram_limit)
        for layer, axis in sorted(members)
        if axis == "in"
    }
    rows: dict[tuple[str, Axis], list[tuple[Tensor, Tensor]]] = {}
    with kept_as_was(model), _hooked(model, collectors):
        model.eval()
        for inputs, targets in batches:
            with torch.set_grad_enabled(gradients):
                outputs = model(inputs.to(device))
            if gradients:
                model.zero_grad(set_to_none=True)
                loss(outputs, targets.to(device)).backward()  # type: ignore[no-untyped-call]
                _note_products(model, members, rows)
    return LayerStatistics(
        second_moment={layer: c.second_moment() for layer, c in collectors.items() if c.seen},
        gram={
            layer: c.gram / c.patches for layer, c in collectors.items() if c.gram is not None and c.patches
        },
        products={key: torch.stack([sums for sums, _ in values]) for key, values in rows.items()},
        squares={key: torch.stack([squares for _, squares in values]) for key, values in rows.items()},
        before_batchnorm=_before_batchnorm(model, batches[0][0][:2].to(device)),
    )


def input_grams(
    model: nn.Module, layers: Iterable[str], batches: Sequence[Tensor], gram_limit: int = 4608
) -> dict[str, Tensor]:
    """Return the Gram matrices of layers' inputs, as :class:`LayerStatistics` has them.

    Args:
        model: The network; it is as before afterwards.
        layers: Names of convolution and linear layers; kinds that have no such matrix are left out.
        batches: Inputs, on any device.
        gram_limit: Longest patch that gets one.
    """
    collectors = {name: _InputCollector(submodule(model, name), gram_limit) for name in layers}
    device = device_of(model)
    with kept_as_was(model), _hooked(model, collectors), torch.no_grad():
        model.eval()
        for inputs in batches:
            model(inputs.to(device))
    return {n: c.gram / c.patches for n, c in collectors.items() if c.gram is not None and c.patches}


@torch.no_grad()
def _before_batchnorm(model: nn.Module, inputs: Tensor) -> frozenset[str]:
    """Return the layers whose outputs go into a BatchNorm as they are, seen in one run over ``inputs``."""
    # Held, so that no later tensor takes their identity; the version tells of a change in place.
    made: dict[int, tuple[str, Tensor, int]] = {}
    found: set[str] = set()
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, outputs: object) -> None:
            if isinstance(outputs, Tensor):
                made[id(outputs)] = (name, outputs, outputs._version)

        return hook

    def look(_: nn.Module, arguments: tuple[object, ...]) -> None:
        name, tensor, version = made.get(id(arguments[0]), ("", None, 0))
        if tensor is arguments[0] and tensor is not None and tensor._version == version:
            found.add(name)

    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            handles.append(module.register_forward_pre_hook(look))
        elif isinstance(module, Conv | nn.Linear):
            handles.append(module.register_forward_hook(note(name)))
    try:
        with kept_as_was(model):
            model.eval()
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


class _InputCollector:
    """Accumulates the statistics of one layer's inputs."""

    def __init__(self, module: nn.Module, gram_limit: int) -> None:
        self.module = module
        self.generator = torch.Generator().manual_seed(0)
        self.squares: Tensor | None = None
        self.seen = 0
        self.gram: Tensor | None = None
        self.patches = 0
        self.features = module.weight[0].numel() if isinstance(module, Conv | nn.Linear) else 0
        covered = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        self.wants_gram = covered and self.features <= gram_limit
        self.places = _PLACES if self.features <= _LONG_PATCH else _PLACES // 2

    @torch.no_grad()
    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        channels = x.movedim(-1 if isinstance(self.module, nn.Linear) else 1, -1).flatten(0, -2)
        squares = channels.square().sum(0).double().cpu()
        self.squares = squares if self.squares is None else self.squares + squares
        self.seen += channels.shape[0]
        if not self.wants_gram:
            return
        if isinstance(self.module, nn.Conv2d):
            self._add(sample_patches(self.module, x, self.places, self.generator))
        else:
            most = self.places * x.shape[0]
            chosen = torch.randperm(len(channels), generator=self.generator)[:most].to(x.device)
            self._add(channels if len(channels) <= most else channels[chosen])

    def second_moment(self) -> Tensor:
        """Return the mean square of each input channel."""
        if self.squares is None:
            raise CompressionError("the layer was never run")
        return self.squares / self.seen

    def _add(self, patches: Tensor) -> None:
        z = torch.cat([patches, patches.new_ones(patches.shape[0], 1)], 1)
        product = (z.T @ z).cpu()
        if self.gram is None:
            dtype = torch.float64 if len(product) <= _MOST_DOUBLE else torch.float32
            self.gram = torch.zeros_like(product, dtype=dtype)
        self.gram += product
        self.patches += z.shape[0]


def sample_patches(conv: nn.Conv2d, x: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Cut the patches that ``conv`` sees at random places of its output.

    Args:
        conv: An ungrouped convolution.
        x: Its input, ``(n, channels, height, width)``.
        places: Most places for each image; all of them if there are fewer.
        generator: Source of the places, which all images of the batch share.

    Returns:
        ``(n * places, channels * kernel height * kernel width)``, in the order of ``weight.flatten(1)``.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (high, wide), (down, across), (step_y, step_x) = conv.kernel_size, conv.dilation, conv.stride
    windows = padded.unfold(2, (high - 1) * down + 1, step_y).unfold(3, (wide - 1) * across + 1, step_x)
    windows = windows[..., ::down, ::across]
    rows, columns = windows.shape[2:4]
    chosen = torch.randperm(rows * columns, generator=generator)[:places].to(x.device)
    patches = windows[:, :, chosen // columns, chosen % columns]
    return patches.movedim(2, 1).flatten(0, 1).flatten(1)


def _note_products(
    model: nn.Module,
    members: set[tuple[str, Axis]],
    rows: dict[tuple[str, Axis], list[tuple[Tensor, Tensor]]],
) -> None:
    """Add one batch's sums of gradient times weight, and of its square."""
    for layer, axis in members:
        module = submodule(model, layer)
        if not isinstance(module, Conv | nn.Linear):
            continue
        gradient = module.weight.grad
        product = torch.zeros_like(module.weight) if gradient is None else gradient * module.weight.detach()
        each = weight_rows(module, axis, product).double()
        rows.setdefault((layer, axis), []).append((each.sum(1).cpu(), each.square().sum(1).cpu()))


@contextmanager
def kept_as_was(model: nn.Module) -> Iterator[None]:
    """Put the modes and gradients of ``model`` back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient, required in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(required)


@contextmanager
def _hooked(model: nn.Module, collectors: dict[str, _InputCollector]) -> Iterator[None]:
    handles = [submodule(model, layer).register_forward_pre_hook(c) for layer, c in collectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
