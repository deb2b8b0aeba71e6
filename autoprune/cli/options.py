"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="torchvision name, cifar_resnet20 … or file.py:function"),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="D", help="digits, cifar10, imagenette, imagefolder:DIR or file.py:function"
    ),
]
Weights = Annotated[str | None, typer.Option("--weights", metavar="F", help="DEFAULT, none or a file")]
Target = Annotated[
    str | None, typer.Option("--target", metavar="T", help="runtime; target.threads=2 sets its threads")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", help="of splits, sampler and training")]
TrustCode = Annotated[
    bool | None, typer.Option("--trust-code", help="run Python files given as model or data")
]
Settings = Annotated[
    Path | None, typer.Option("-c", "--config", metavar="FILE", help="YAML file of settings")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="settings, such as target.threads=2")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on the standard error")]
Study = Annotated[str, typer.Argument(metavar="STUDY", help="name of a study")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="where the record is: postgresql://USER@HOST/DB (a file in the folder)",
    ),
]
