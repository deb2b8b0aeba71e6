"""The classifier of a network, fitted to the classes of the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.errors import UsageError

IMAGENET_CLASSES = 1000

# Places of Imagenette's ten classes among ImageNet's, from torchvision's list of ImageNet's categories.
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Fitted:
    """What became of a classifier.

    Attributes:
        kept: Whether what it had learned is still there.
        note: One line for people; empty where nothing was done.
    """

    kept: bool
    note: str = ""


def imagenet_places(classes: Sequence[str]) -> list[int] | None:
    """Return where the data's classes are among ImageNet's 1,000; None where they are not ImageNet's."""
    if len(classes) == IMAGENET_CLASSES and all(_WORDNET.fullmatch(name) for name in classes):
        return list(range(IMAGENET_CLASSES))
    if classes and all(name in IMAGENETTE for name in classes):
        return [IMAGENETTE[name] for name in classes]
    return None


def probe(model: nn.Module, input_shape: Sequence[int], example: Tensor | None = None) -> Tensor:
    """Return what a network gives for two inputs, and check that it takes them.

    Args:
        model: The network; left in eval mode.
        input_shape: Shape of one input.
        example: Inputs ``(n, *input_shape)``; zeros if not given.

    Raises:
        UsageError: If it raises, or does not return one tensor with one row for each input.
    """
    model.eval()
    inputs = torch.zeros(2, *input_shape) if example is None else example
    try:
        with torch.no_grad():
            outputs = model(inputs)
    except Exception as error:  # a layer may refuse its input in any way; the fault is named
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"the network does not take inputs of shape {tuple(inputs.shape)}: {type(error).__name__}: {reason}",
            "another size of images: image_size=224",
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or outputs.shape[0] != inputs.shape[0]:
        shown = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(
            f"the network returns {shown} for inputs {tuple(inputs.shape)}; allowed: one tensor, a row for each input"
        )
    return outputs


def runs_channels_last(model: nn.Module, inputs: Tensor) -> bool:
    """Return whether a network runs in ``channels_last``; one that flattens feature maps by ``view`` does not.

    Args:
        model: A network; it is not changed.
        inputs: ``(n, ...)``.
    """
    copy = deepcopy(model).cpu().eval().to(memory_format=torch.channels_last)
    inputs = inputs[:1].cpu()
    try:
        with torch.no_grad():
            copy(inputs.to(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs)
    except RuntimeError:
        return False
    return True


def find_head(model: nn.Module, outputs: int) -> str:
    """Return the name of the layer that makes the outputs: the last linear or convolution of that width.

    Raises:
        UsageError: If there is none.
    """
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.out_features == outputs:
            return str(name)
        if isinstance(module, nn.Conv2d) and module.out_channels == outputs and module.groups == 1:
            return str(name)
    raise UsageError(
        f"the network has no linear layer or convolution with {outputs} outputs to fit to the data"
    )


def resize_head(model: nn.Module, name: str, outputs: int) -> None:
    """Put a new layer with random weights and ``outputs`` outputs in the place of ``name``."""
    old = model.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(
            old.in_channels,
            outputs,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            bias=old.bias is not None,
        )
    else:
        raise UsageError(
            f"layer {name!r} is a {type(old).__name__}; allowed: a linear layer or a convolution"
        )
    model.set_submodule(name, new)


def restrict_head(model: nn.Module, name: str, places: Sequence[int]) -> None:
    """Keep the rows ``places`` of the layer ``name``, so that the network scores these classes alone."""
    old = model.get_submodule(name)
    weight, bias = old.weight, old.bias
    resize_head(model, name, len(places))
    new = model.get_submodule(name)
    index = torch.as_tensor(list(places))
    with torch.no_grad():
        new.weight.copy_(weight[index])  # type: ignore[operator, index]
        if bias is not None:
            new.bias.copy_(bias[index])  # type: ignore[operator, index]


def fit_head(
    model: nn.Module, classes: Sequence[str], input_shape: Sequence[int], *, of_imagenet: bool
) -> Fitted:
    """Fit the classifier to the data's classes, in place.

    Args:
        model: The network, in eval mode.
        classes: The data's classes.
        input_shape: Shape of one input.
        of_imagenet: Whether the network was trained for ImageNet's classes, so that 1,000 outputs are theirs.

    Returns:
        What was done. A restricted classifier keeps what it had learned, a replaced one does not.
    """
    outputs = probe(model, input_shape)
    count = int(outputs.shape[1]) if outputs.ndim == 2 else 0
    places = imagenet_places(classes)
    if count == len(classes) and (places is not None or not of_imagenet):
        return Fitted(kept=True)
    name = find_head(model, count)
    if count == IMAGENET_CLASSES and places is not None:
        restrict_head(model, name, places)
        return Fitted(
            True, f"classifier {name!r} restricted from {count} to the data's {len(classes)} classes"
        )
    resize_head(model, name, len(classes))
    return Fitted(
        False, f"classifier {name!r} replaced: {count} outputs, now the data's {len(classes)} classes"
    )
