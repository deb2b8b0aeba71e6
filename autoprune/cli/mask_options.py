"""Options of the command line for masks of single weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from autoprune.errors import UsageError
from autoprune.naming import unknown_name

Sparsity = Annotated[
    float | None, typer.Option(metavar="S", help="share of single weights of every group that become zero")
]
Pattern = Annotated[
    str | None, typer.Option(metavar="P", help="unstructured, or N:M: N of every M inputs stay")
]
Allocation = Annotated[
    str | None, typer.Option(metavar="A", help="zeros over layers: layer|global|erk|lamp (layer)")
]
MaskCriterion = Annotated[
    str | None,
    typer.Option(metavar="C", help="magnitude|activation|taylor|fisher|movement|random (magnitude)"),
]


def gathered(
    sparsity: float | None, pattern: str | None, allocation: str | None, criterion: str | None
) -> dict[str, Any]:
    """Return what was given as ``sparsity`` and ``mask``; empty where nothing was.

    A pattern ``N:M`` alone gives its sparsity, ``1 - N/M``.

    Raises:
        UsageError: If a value is not allowed, or a mask is described that has no zeros.
    """
    given = {"pattern": pattern, "allocation": allocation, "mask-criterion": criterion}
    named = [name for name, value in given.items() if value is not None]
    if sparsity is None and not named:
        return {}
    from autoprune.space.mask import (
        ALLOCATIONS,
        MASK_CRITERIA,
        UNSTRUCTURED,
        Mask,
        block_pattern,
        check_sparsity,
        pattern_share,
    )

    if allocation is not None and allocation not in ALLOCATIONS:
        raise unknown_name("allocation", allocation, ALLOCATIONS)
    if criterion is not None and criterion not in MASK_CRITERIA:
        raise unknown_name("mask criterion", criterion, MASK_CRITERIA)
    pattern = pattern or UNSTRUCTURED
    try:
        block_pattern(pattern)
    except ValueError as error:
        raise UsageError(str(error)) from None
    sparsity = pattern_share(pattern) if sparsity is None else sparsity
    if sparsity is None or (named and sparsity == 0.0):
        raise UsageError(
            f"--{named[0]} says how weights are masked, but none are: the sparsity is 0", "give --sparsity S"
        )
    check_sparsity(sparsity)
    values = {"pattern": pattern, "allocation": allocation or "layer", "criterion": criterion or "magnitude"}
    return {"sparsity": sparsity, "mask": Mask.model_validate(values)}
