"""Mask: how single weights are chosen that become zero. Torch-free.

References:
    [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015.
    [Mocanu2018] Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity, Nature
        Communications 2018.
    [Evci2020] Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    [Lee2021] Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    [Sun2024] A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024.
    [Sanh2020] Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020.
    [Mishra2021] Accelerating Sparse Deep Neural Networks, 2021.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from autoprune.errors import UsageError

Allocation = Literal["layer", "global", "erk", "lamp"]
MaskCriterion = Literal["magnitude", "activation", "taylor", "fisher", "movement", "random"]
ALLOCATIONS: tuple[Allocation, ...] = ("layer", "global", "erk", "lamp")
MASK_CRITERIA: tuple[MaskCriterion, ...] = (
    "magnitude",
    "activation",
    "taylor",
    "fisher",
    "movement",
    "random",
)
UNSTRUCTURED = "unstructured"
_BLOCKS = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")
# A share that was rounded to a few digits in a file, such as 0.667 for 1:3, still means the pattern's.
_SAME_SHARE = 1e-3


def block_pattern(pattern: str) -> tuple[int, int] | None:
    """Return ``(N, M)`` of a pattern ``"N:M"``; None for ``"unstructured"``.

    Raises:
        ValueError: If the text is neither.
    """
    if pattern == UNSTRUCTURED:
        return None
    found = _BLOCKS.fullmatch(pattern)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(
            f"pattern {pattern!r} cannot be used; allowed: {UNSTRUCTURED!r}, or 'N:M' with N below M, such as '2:4': "
            "N of every M consecutive inputs stay"
        )
    return int(found[1]), int(found[2])


def _checked_pattern(pattern: str) -> str:
    block_pattern(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_checked_pattern)]


class Mask(BaseModel):
    """How the weights that become zero are chosen; how many is each group's ``sparsity``.

    Attributes:
        pattern: ``unstructured``: any weight may go; ``N:M`` such as ``2:4``: at most N of every M consecutive inputs
            of an output stay, at every place of a kernel [Mishra2021]_. A group's sparsity is then 0 or 1 - N/M. Of
            inputs at the end that fill no block, N stay as well, so that a layer with fewer inputs loses less.
        allocation: How the zeros are spread over layers. ``layer``: every layer has its group's sparsity. Else the
            number of zeros that the groups' sparsities come to is spread over the layers of the groups whose sparsity
            is not 0: ``global`` by one threshold on all scores; ``erk`` by the layers' shapes (Erdos-Renyi-Kernel
            [Mocanu2018]_ [Evci2020]_); ``lamp`` by one threshold on magnitudes that count for more the fewer large
            ones a layer has [Lee2021]_. A pattern ``N:M`` leaves no choice: ``layer``.
        criterion: How weights are ranked within a layer. ``magnitude`` [Han2015]_; ``activation``: magnitude times the
            root mean square of the input, ranked within each output [Sun2024]_; ``taylor``: first-order change of the
            loss; ``fisher``: second-order change; ``movement``: whether the first third of the fine-tuning moved a
            weight away from zero [Sanh2020]_; ``random``: the control.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Pattern = UNSTRUCTURED
    allocation: Allocation = "layer"
    criterion: MaskCriterion = "magnitude"

    @property
    def block(self) -> tuple[int, int] | None:
        """``(N, M)``; None where any weight may go."""
        return block_pattern(self.pattern)

    def check(self, sparsities: Iterable[float], finetune_steps: int) -> None:
        """Refuse what this mask cannot do.

        Args:
            sparsities: Those of the groups.
            finetune_steps: Steps of the recovery that follow the last cut.

        Raises:
            UsageError: If a sparsity is not the pattern's, the pattern leaves no choice to the allocation, or
                ``movement`` has no steps to watch.
        """
        block = self.block
        if block is not None:
            for sparsity in sparsities:
                check_share(self.pattern, sparsity)
            if self.allocation != "layer":
                raise UsageError(
                    f"allocation {self.allocation!r} cannot be used with pattern {self.pattern!r}, which fixes how "
                    "many weights of every layer stay; allowed: 'layer'",
                    "or set the pattern to 'unstructured'",
                )
        if self.criterion == "movement" and finetune_steps == 0:
            raise UsageError(
                "mask criterion 'movement' ranks weights by how fine-tuning moves them, but no step follows the last "
                "cut; allowed: at least 1",
                "set finetune_steps (--steps), lower the schedule's sparse_steps, or take another criterion such as "
                "'magnitude'",
            )


def pattern_share(pattern: str) -> float | None:
    """Return the share that a pattern zeroes, ``1 - N/M``; None for ``unstructured``, which has any."""
    block = block_pattern(pattern)
    return None if block is None else 1.0 - block[0] / block[1]


def check_share(pattern: str, sparsity: float) -> None:
    """Refuse a sparsity that is not the pattern's.

    Raises:
        UsageError: If the pattern fixes the share and ``sparsity`` is neither that nor 0.
    """
    share = pattern_share(pattern)
    if share is not None and sparsity != 0.0 and abs(sparsity - share) > _SAME_SHARE:
        raise UsageError(
            f"sparsity {sparsity:g} cannot be used with pattern {pattern!r}; allowed: 0 or {share:g}",
            "set the sparsity to one of these, or the pattern to 'unstructured'",
        )


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity that leaves nothing or is no share.

    Raises:
        UsageError: If it is not in ``[0, 1)``.
    """
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(
            f"sparsity {sparsity:g} cannot be used; allowed: the share of weights that become zero, from 0 to below 1"
        )


Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
