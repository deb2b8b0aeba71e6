"""What can be named as model and data, and the checks of such names that need no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.naming import unknown_name
from autoprune.workloads.folders import scan_folder
from autoprune.workloads.user_code import check_user_code

CIFAR_RESNETS = tuple(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110))
DATA_NAMES = ("digits", "cifar10", "imagenette", "imagenet")
FOLDER_PREFIX = "imagefolder:"
WEIGHTS_WORDS = ("DEFAULT", "none")
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

_REGISTERED = re.compile(r"@register_model\(\)\n(?:@.*\n(?:.*\n)*?)??def (\w+)\(")
_USER_CODE = re.compile(r"(?P<path>.+\.py):(?P<function>[^:]*)")


@dataclass(frozen=True)
class Spec:
    """A model or data specification, taken apart.

    Attributes:
        kind: ``torchvision``, ``cifar_resnet``, ``folder``, ``code``, or the name of a built-in data set.
        name: The name, the folder, or the Python file.
        function: The function in the Python file; empty for the other kinds.
    """

    kind: str
    name: str
    function: str = ""


@lru_cache(maxsize=1)
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification models without importing torchvision.

    They are read from the decorators in its source, because the import takes seconds.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return ()
    names: set[str] = set()
    for path in (Path(found.origin).parent / "models").glob("*.py"):
        names.update(_REGISTERED.findall(path.read_text(encoding="utf-8")))
    return tuple(sorted(names))


def model_names() -> tuple[str, ...]:
    """Return every model that can be given by name."""
    return (*CIFAR_RESNETS, *torchvision_names())


def parse_model(text: str) -> Spec:
    """Take a model specification apart.

    Raises:
        UsageError: If the name is unknown; holds near matches.
    """
    code = _USER_CODE.fullmatch(text)
    if code:
        return Spec("code", code["path"], code["function"])
    if text in CIFAR_RESNETS:
        return Spec("cifar_resnet", text)
    if text in torchvision_names():
        return Spec("torchvision", text)
    raise unknown_name(
        "model", text, model_names(), "a network of your own: --model file.py:function --trust-code"
    )


def parse_data(text: str) -> Spec:
    """Take a data specification apart.

    Raises:
        UsageError: If the name is unknown; holds near matches.
    """
    if text.startswith(FOLDER_PREFIX):
        folder = text[len(FOLDER_PREFIX) :]
        if not folder:
            raise UsageError(f"data {text!r} names no folder; allowed: {FOLDER_PREFIX}DIR")
        return Spec("folder", folder)
    code = _USER_CODE.fullmatch(text)
    if code:
        return Spec("code", code["path"], code["function"])
    if text in DATA_NAMES:
        return Spec(text, text)
    known = (*DATA_NAMES, f"{FOLDER_PREFIX}DIR", "file.py:function")
    raise unknown_name("data", text, known, "`digits` needs no download; a folder of images: imagefolder:DIR")


def check_weights_name(weights: str | None) -> None:
    """Check that ``weights`` is a word that is known, or a file that exists and has a known suffix.

    Raises:
        UsageError: If it is neither.
    """
    if weights is None or weights in WEIGHTS_WORDS:
        return
    allowed = f"{', '.join(WEIGHTS_WORDS)} or a file ({', '.join(WEIGHTS_SUFFIXES)})"
    path = Path(weights)
    if "\0" in weights or not path.exists():
        raise UsageError(f"weights {weights!r}: there is no such file; allowed: {allowed}")
    if path.is_dir():
        raise UsageError(f"weights {weights!r} is a folder; allowed: {allowed}")
    if path.suffix.lower() not in WEIGHTS_SUFFIXES:
        raise UsageError(f"weights {weights!r} have the suffix {path.suffix!r}; allowed: {allowed}")


def check_inputs(config: StudyConfig) -> None:
    """Check model, data and weights as far as that goes without torch and without building anything.

    Takes well under a second, so that a typing error is named before torch is even imported.

    Raises:
        UsageError: If a name is unknown, a file or folder is missing or unusable, or code is not trusted.
    """
    model = parse_model(config.model)
    data = parse_data(config.data) if config.data is not None else None
    check_weights_name(config.weights)
    if config.weights == "DEFAULT" and model.kind != "torchvision":
        raise UsageError(
            f"weights 'DEFAULT' are torchvision's own; model {config.model!r} has none; allowed: none or a file"
        )
    for spec, option in ((model, "--model"), (data, "--data")):
        if spec is not None and spec.kind == "code":
            check_user_code(spec.name, spec.function, option, trusted=config.trust_code)
    if data is not None and data.kind == "folder":
        scan_folder(Path(data.name))
    if data is None and model.kind == "code":
        raise UsageError(
            f"model {config.model!r} needs data: --data", "try --data digits or --data imagefolder:DIR"
        )
