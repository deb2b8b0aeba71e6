r"""Training that knows of integers: weights and inputs are rounded in every forward pass, and scales are learned.

What a layer computes then is what the deployed file computes of the same inputs: the same integers of weights, the same
grid of inputs, whose range the training keeps and the file takes over, and biases on the grid of the products. What the
training does not know of is the rounding of what lies between layers, such as the terms of a sum. TensorRT's grids are
symmetric around 0, and dynamic ranges are those of each inference there, of each batch here.

References:
    [Esser2020] Learned Step Size Quantization, ICLR 2020.
    [Jacob2018] Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018.
    [Bengio2013] Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation, 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.compress import quantizers
from autoprune.compress.finetune import Trainer
from autoprune.compress.formats import LAYER_KINDS, dynamic_layers, grid_bits, int8_layers
from autoprune.compress.lowrank import with_factors
from autoprune.compress.rounding import grid_between, input_grid, on_input_grid
from autoprune.space.groups import Groups
from autoprune.space.quantization import INTEGER_BITS
from autoprune.space.recipe import Recipe

_SCALE = "quantization_log_scale"
_RANGE = "quantization_range"
# Weight of a batch in the moving average of input ranges, of which trainings of 50 steps see some.
_OF_A_BATCH = 0.1
# Of shares of a training that are equal but for rounding.
_SAME = 1e-9


def learned(weight: Tensor, log_scale: Tensor, bits: int) -> Tensor:
    r"""Round weights with gradients for them and for their scales [Esser2020]_.

    Weights within the grid get the gradient of their rounded values as it is [Bengio2013]_, those beyond it none. The
    gradient of a scale is that of the paper, with its factor :math:`1 / \sqrt{N Q}` for ``N`` weights of a channel and
    the largest integer ``Q``. Unlike there, what is learned is the scale's logarithm, so that a step of any optimizer
    is a share of the scale, and every output channel has its own.

    Args:
        weight: Rows of output channels, ``(out, features)``.
        log_scale: Natural logarithms of the scales, ``(out, 1)``.
        bits: 2 to 8.

    Returns:
        Integers times scales, of the weight's shape.
    """
    top = quantizers.largest_code(bits)
    scale = log_scale.exp()
    factor = (weight.shape[1] * top) ** -0.5
    scale = scale.detach() + factor * (scale - scale.detach())
    within = (weight / scale).clamp(-top, top)
    made: Tensor = (within + (within.round() - within).detach()) * scale
    return made


class IntegerTraining:
    """Trains layers as integers from some share of a training on.

    Transposed convolutions and layers with weights of more than 8 bits are trained as they are.

    Args:
        model: The network that will be trained; every layer gets a scale, which :meth:`finish` takes away again.
        bits: Bit-width of weights by layer; names that the network lacks are left out.
        int8_layers: Layers whose inputs are rounded to 8 bits too, over a moving average of the batches' ranges
            [Jacob2018]_.
        share: Share of the training, at its end, that knows of integers, in ``(0, 1]``.
        dynamic: Those of ``int8_layers`` whose inputs are rounded over the range of each batch instead.

    Attributes:
        ranges: Ranges of inputs by layer that the training ended with, lowest and highest value; known once it is
            finished, and empty where it never came to integers.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: Mapping[str, int],
        int8_layers: Collection[str],
        share: float,
        dynamic: Collection[str] = (),
    ) -> None:
        self.share = share
        self.ranges: dict[str, tuple[float, float]] = {}
        self.layers: dict[str, int] = {}
        for name, module in model.named_modules():
            if name in bits and bits[name] <= INTEGER_BITS and _can_learn(module):
                self.layers[name] = bits[name]
                how = "" if name not in int8_layers else "dynamic" if name in dynamic else "static"
                _make_learn(module, bits[name], how)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        recipe: Recipe,
        groups: Groups,
        kinds: Collection[str] = LAYER_KINDS,
        int8_bits: int = INTEGER_BITS,
    ) -> IntegerTraining:
        """Return what trains the integers of a recipe; one that does nothing where it trains none.

        Args:
            model: The network that the recipe's cuts left.
            recipe: The candidate.
            groups: Groups of the network that it began with.
            kinds: Kinds of layers that run in int8 where the network is deployed.
            int8_bits: Most bits of the weights that int8 kernels add up rightly there.
        """
        if not recipe.trains_integers:
            return cls(model, {}, (), 0.0)
        eight = with_factors(model, int8_layers(recipe, groups, kinds))
        dynamic = dynamic_layers(model, recipe, groups)
        bits = grid_bits(model, recipe, groups, kinds, int8_bits)
        return cls(model, bits, eight, recipe.quantization.aware, dynamic)

    def watch(self, trainer: Trainer) -> None:
        """Follow a training, and begin with integers where the share says so."""
        if not self.layers:
            return

        def start(model: nn.Module) -> None:
            if trainer.progress >= 1.0 - self.share - _SAME:
                self._begin(model)

        trainer.observe(start=start, before=self._without_gaps)

    def _without_gaps(self, model: nn.Module) -> None:
        """Give scales that nothing used yet a gradient of 0: torch's fused SGD takes all or none."""
        for name in self.layers:
            scale = model.get_parameter(f"{name}.{_SCALE}")
            if scale.grad is None:
                scale.grad = torch.zeros_like(scale)

    @torch.no_grad()
    def _begin(self, model: nn.Module) -> None:
        for name, bits in self.layers.items():
            module: Any = model.get_submodule(name)
            if not module.quantizing:
                scale = quantizers.scales(module.weight.flatten(1), bits, "mse")
                getattr(module, _SCALE).copy_(scale.log())
                module.quantizing = True

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """Return the network with plain layers, whose weights lie on their grids if they were trained there."""
        for name, bits in self.layers.items():
            module: Any = model.get_submodule(name)
            if module.quantizing:
                rows = learned(module.weight.flatten(1), getattr(module, _SCALE), bits)
                module.weight.copy_(rows.view_as(module.weight))
                low, high = getattr(module, _RANGE).tolist()
                if low < high:
                    self.ranges[name] = (low, high)
            del module.forward, module.quantizing
            delattr(module, _SCALE)
            delattr(module, _RANGE)
        return model


def _can_learn(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and "weight" in module._parameters
    )


def _make_learn(module: nn.Module, bits: int, inputs: str) -> None:
    """Give a layer a scale and a forward pass that rounds once it is told to.

    Args:
        module: The layer.
        bits: Of its weights.
        inputs: ``static`` or ``dynamic`` where its inputs become 8 bits, else empty.
    """
    weight = module.get_parameter("weight")
    module.register_parameter(_SCALE, nn.Parameter(torch.zeros(len(weight), 1, device=weight.device)))
    module.register_buffer(_RANGE, torch.zeros(2, device=weight.device), persistent=False)
    plain: Any = module
    plain.quantizing = False

    plain_forward: Callable[[nn.Module, Tensor], Tensor] = type(module).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.quantizing:
            return plain_forward(self, x)
        weight, bias, log_scale = self.weight, self.bias, getattr(self, _SCALE)
        # Found before the parameters of that name, so that the layer's own forward pass reads them.
        self.__dict__["weight"] = learned(weight.flatten(1), log_scale, bits).view_as(weight)
        try:
            if inputs:
                grid = input_grid(x.detach()) if inputs == "dynamic" else _kept_grid(self, x.detach())
                x = _through(x, on_input_grid(x.detach(), *grid))
                if bias is not None and inputs == "static":
                    step = grid[0] * log_scale.detach().exp().flatten()
                    self.__dict__["bias"] = _through(bias, (bias.detach() / step).round() * step)
            return plain_forward(self, x)
        finally:
            del self.__dict__["weight"]
            self.__dict__.pop("bias", None)

    plain.forward = MethodType(forward, module)


@torch.no_grad()
def _kept_grid(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the grid of a layer's inputs; in training a batch moves its range first."""
    kept: Tensor = module.get_buffer(_RANGE)
    if module.training or not kept.any():
        batch = torch.stack([x.amin().clamp_max(0.0), x.amax().clamp_min(0.0)]).to(kept)
        kept.lerp_(batch, _OF_A_BATCH if kept.any() else 1.0)
    return grid_between(kept[0].to(x.dtype), kept[1].to(x.dtype))


def _through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return rounded values whose gradient passes as it is [Bengio2013]_."""
    return values + (rounded - values.detach())
