"""Networks by name: torchvision's, the built-in ones, and a user's own function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.disk import file_digest
from autoprune.errors import UsageError
from autoprune.workloads.catalog import WEIGHTS_WORDS, Spec
from autoprune.workloads.cifar_resnet import cifar_resnet
from autoprune.workloads.download import Say, fetch
from autoprune.workloads.head import find_head, fit_head, imagenet_places, probe, resize_head
from autoprune.workloads.user_code import accepted, call_user, load_function
from autoprune.workloads.weights import apply_state, load_state


@dataclass(frozen=True)
class Preset:
    """What a network expects of its images.

    Attributes:
        mean: Mean of each channel, for values in 0..1.
        std: Standard deviation of each channel.
        side: Side of the images, in pixels.
        resize: Length that the shorter side is scaled to before the centre is cut.
        interpolation: ``bilinear`` or ``bicubic``.
        min_side: Least side that the network takes.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    side: int = 224
    resize: int = 256
    interpolation: str = "bilinear"
    min_side: int = 1


@dataclass(frozen=True)
class Loaded:
    """A network with what is known of its weights.

    Attributes:
        model: The network, in eval mode, on the CPU.
        source: Where the weights are from.
        trained: Whether they are trained for the data; None where only a trial tells.
        seen: Whether they may have been trained on the images of the search split.
        notes: Lines for people, such as a replaced classifier.
    """

    model: nn.Module
    source: str
    trained: bool | None
    seen: bool
    notes: tuple[str, ...] = ()


def choose_weights(spec: Spec, weights: str | None, classes: Sequence[str]) -> str | None:
    """Return the weights to take where none are named: torchvision's for ImageNet's classes, else none."""
    if weights is not None or spec.kind == "code":
        return weights
    if spec.kind == "torchvision" and imagenet_places(classes) is not None:
        return "DEFAULT"
    return "none"


def preset(spec: Spec, weights: str | None) -> Preset:
    """Return what the network expects of its images."""
    if spec.kind != "torchvision":
        return Preset()
    entry = _default_entry(spec.name)
    least = int(max(entry.meta.get("min_size", (1, 1))))
    if weights != "DEFAULT":
        return Preset(min_side=least)
    transform = entry.transforms()
    return Preset(
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        side=int(transform.crop_size[0]),
        resize=int(transform.resize_size[0]),
        interpolation=str(transform.interpolation.value),
        min_side=least,
    )


def load_network(
    spec: Spec,
    weights: str | None,
    classes: Sequence[str],
    input_shape: Sequence[int],
    *,
    seed: int,
    trusted: bool,
    say: Say,
    state: dict[str, Tensor] | None = None,
) -> Loaded:
    """Build a network and give it its weights.

    Args:
        spec: What was named.
        weights: ``DEFAULT``, ``none``, a file, or None for a user's function that gives them.
        classes: The data's classes.
        input_shape: Shape of one input, ``(3, side, side)``.
        seed: Seed of random weights.
        trusted: Whether a user's file may be run.
        say: Gets progress of a download.
        state: The tensors of the weights file, if they have been read already.

    Raises:
        UsageError: If the network cannot be built, or the weights cannot be loaded or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights == "DEFAULT":
            return _pretrained(spec.name, classes, input_shape, say)
        model = _build(spec, len(classes), input_shape, trusted)
        if weights is None or weights in WEIGHTS_WORDS:
            fitted = fit_head(model, classes, input_shape, of_imagenet=False)
            given = weights is None
            trained = None if given and fitted.kept else False
            source = "given by the function" if given else "random"
            return Loaded(model, source, trained, seen=given and fitted.kept, notes=_notes(fitted.note))
        path = Path(weights)
        state = load_state(path) if state is None else state
        _match_head(model, state, input_shape)
        apply_state(model, state, repr(weights))
        fitted = fit_head(model, classes, input_shape, of_imagenet=False)
        source = f"file {path.name} sha256:{file_digest(path)[:16]}"
        return Loaded(model, source, fitted.kept, seen=fitted.kept, notes=_notes(fitted.note))


def rebuild_network(
    spec: Spec,
    weights: str | None,
    classes: Sequence[str],
    input_shape: Sequence[int],
    *,
    seed: int,
    trusted: bool,
) -> nn.Module:
    """Build the network that :func:`load_network` returns, with weights that have no meaning: others follow.

    No weights are read and nothing is downloaded.

    Args:
        spec: What was named.
        weights: The weights that it had, as :func:`choose_weights` returns them; torchvision's own decide on more
            than numbers.
        classes: The data's classes.
        input_shape: Shape of one input.
        seed: Seed of random weights.
        trusted: Whether a user's file may be run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(spec, len(classes), input_shape, trusted, pretrained=weights == "DEFAULT")
        fit_head(model, classes, input_shape, of_imagenet=False)
    return model.eval()


def _notes(note: str) -> tuple[str, ...]:
    return (note,) if note else ()


def _build(
    spec: Spec, classes: int, input_shape: Sequence[int], trusted: bool, *, pretrained: bool = False
) -> nn.Module:
    """Build a network with random weights, or with those that a user's function gives it.

    ``pretrained`` builds one of torchvision's as its own weights need it.
    """
    if spec.kind == "code":
        what = f"--model {spec.name}:{spec.function}"
        function = load_function(spec.name, spec.function, "--model", trusted=trusted)
        offered = {"num_classes": classes, "input_shape": tuple(input_shape)}
        model = call_user(function, what, **accepted(function, offered, what))
        if not isinstance(model, nn.Module):
            raise UsageError(f"{what} returned a {type(model).__name__}; allowed: a torch.nn.Module")
        return model.cpu().float().eval()
    if spec.kind == "cifar_resnet":
        return cifar_resnet(spec.name, classes).eval()
    import torchvision

    options = _options(spec.name, input_shape, pretrained)
    try:
        model = torchvision.models.get_model(spec.name, weights=None, num_classes=classes, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"model {spec.name!r} cannot be built for images of shape {tuple(input_shape)}: {error}",
            f"its own size: image_size={preset(spec, 'DEFAULT').side}",
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def _options(name: str, input_shape: Sequence[int], pretrained: bool) -> dict[str, Any]:
    """Return what some of torchvision's builders need to know."""
    side = int(input_shape[-1])
    if name in ("googlenet", "inception_v3"):
        # The auxiliary classifiers make a tuple of the outputs in training mode.
        # Their own weights are for inputs that the network normalises once more.
        return {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
    if name.startswith("vit_"):
        return {"image_size": side}
    if name.startswith("maxvit"):
        return {"input_size": (side, side)}
    return {}


def _match_head(model: nn.Module, state: dict[str, Tensor], input_shape: Sequence[int]) -> None:
    """Give the network as many outputs as the weights have, where only their number differs."""
    outputs = probe(model, input_shape)
    name = find_head(model, int(outputs.shape[-1]))
    stored = state.get(f"{name}.weight")
    own = model.get_submodule(name).weight
    if stored is None or not isinstance(own, Tensor) or stored.ndim != own.ndim:
        return
    if stored.shape[0] != own.shape[0] and stored.shape[1:] == own.shape[1:]:
        resize_head(model, name, int(stored.shape[0]))


def _default_entry(name: str) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(name).DEFAULT


def _pretrained(name: str, classes: Sequence[str], input_shape: Sequence[int], say: Say) -> Loaded:
    """Load torchvision's best weights, downloaded if need be, and fit the classifier to the data."""
    import torchvision

    entry = _default_entry(name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    # torchvision's files carry the beginning of their hash in their name.
    digest = file.stem.rpartition("-")[2]
    fetch(
        entry.url,
        file,
        purpose=f"model {name!r}",
        offline=f"without a network: put the file at {str(file)!r}, or --weights FILE, or --weights none "
        "(trains on the data, for example --data digits)",
        digest=("sha256", digest),
        say=say,
    )
    # Refuses a file with code in it; torchvision itself would run it.
    load_state(file)
    try:
        model = torchvision.models.get_model(name, weights=entry)
    except RuntimeError as error:
        raise UsageError(
            f"weights {str(file)!r} cannot be loaded: {error}", "delete the file and try again"
        ) from error
    for auxiliary in ("aux1", "aux2", "AuxLogits"):
        if getattr(model, auxiliary, None) is not None:
            setattr(model, auxiliary, None)
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
    fitted = fit_head(model.eval(), classes, input_shape, of_imagenet=True)
    return Loaded(model, f"torchvision {entry}", fitted.kept, seen=fitted.kept, notes=_notes(fitted.note))
