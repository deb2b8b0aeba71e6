"""What kinds of layers there are and along which axes their tensors lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.errors import CompressionError
from autoprune.space.groups import Axis, LayerKind

Conv = nn.modules.conv._ConvNd
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind that surgery knows ``module`` as; None for one that it cannot cut.

    ``norm`` is every layer that has its own parameters for each channel and mixes no channels, and those that
    normalise over channels.
    """
    if isinstance(module, Conv):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        return "depthwise" if depthwise else "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, BatchNorm | InstanceNorm):
        return "norm"
    if isinstance(module, nn.PReLU):
        return "norm" if module.num_parameters > 1 else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "norm" if len(module.normalized_shape) == 1 else None
    if isinstance(module, nn.GroupNorm):
        return "norm"
    return "embedding" if isinstance(module, nn.Embedding) else None


def channel_count(module: nn.Module, axis: Axis) -> int:
    """Return how many channels ``module`` has along ``axis``.

    Raises:
        CompressionError: If the module's kind has no channels.
    """
    if isinstance(module, Conv):
        return int(module.out_channels if axis == "out" else module.in_channels)
    if isinstance(module, nn.Linear):
        return int(module.out_features if axis == "out" else module.in_features)
    if isinstance(module, BatchNorm | InstanceNorm):
        return int(module.num_features)
    if isinstance(module, nn.PReLU):
        return int(module.num_parameters)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.GroupNorm):
        return int(module.num_channels)
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    raise CompressionError(f"{type(module).__name__} has no channels that can be cut")


def weight_rows(module: nn.Module, axis: Axis, weight: Tensor | None = None) -> Tensor:
    """Return all weights that belong to each channel, one row for each channel along ``axis``.

    Args:
        module: A convolution (grouped ones too) or a linear layer.
        axis: ``out``: the filters; ``in``: the slices that read each input channel.
        weight: A tensor of the weight's shape to be seen so instead of the weight, such as its gradient.

    Returns:
        ``(channels, weights of each channel)``.

    Raises:
        CompressionError: For any other module.
    """
    if not isinstance(module, Conv | nn.Linear):
        raise CompressionError(f"{type(module).__name__} has no weight matrix")
    tensor = module.weight.detach() if weight is None else weight
    groups = module.groups if isinstance(module, Conv) else 1
    if isinstance(module, Conv) and module.transposed:
        if groups > 1:
            raise CompressionError("grouped transposed convolutions are not supported")
        tensor = tensor.transpose(0, 1)
    if axis == "out":
        return tensor.flatten(1)
    per_group = (
        tensor.reshape(groups, -1, *tensor.shape[1:]).flatten(3)
        if tensor.dim() > 2
        else tensor[None, :, :, None]
    )
    return per_group.transpose(1, 2).flatten(0, 1).flatten(1)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module called ``name``.

    Raises:
        CompressionError: If the model has none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CompressionError(
            f"the model has no layer {name!r}", "the groups belong to another model; find them afresh"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """Split a dotted name into its owner's and its own."""
    owner, _, own = name.rpartition(".")
    return owner, own


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer normalises by the statistics of a batch."""
    return any(isinstance(module, BatchNorm) for module in model.modules())


def has_layernorm(model: nn.Module) -> bool:
    """Whether any layer normalises by the statistics of an example."""
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())
