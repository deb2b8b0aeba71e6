"""Schedule: when, over the fine-tuning steps of a recipe, channels and single weights are removed. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from autoprune.errors import UsageError

ScheduleKind = Literal["one_shot", "iterative", "gradual", "sparse"]
SCHEDULES: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
# Settings that mean something to a kind; the others have no effect on it.
SETTINGS_OF: dict[ScheduleKind, tuple[str, ...]] = {
    "one_shot": (),
    "iterative": ("rounds",),
    "gradual": ("rounds", "sparse_steps"),
    "sparse": ("strength", "sparse_steps"),
}
# These prune by training, so that without a step they could do nothing.
TRAINED: tuple[ScheduleKind, ...] = ("gradual", "sparse")


class Schedule(BaseModel):
    """When channels and weights are removed; all kinds take the same gradient steps and end at the same kept counts.

    ``one_shot`` removes all at once and then recovers. ``iterative`` removes a part, recovers with a part of the
    steps, and goes on with the smaller network [Han2015]_. ``gradual`` zeroes ever more channels while it trains,
    chosen anew each time, and then removes them [Zhu2017]_. ``sparse`` trains under a penalty that draws whole groups
    of coupled weights to zero, and then removes the smallest by ``l2`` whatever the recipe's criteria are [Wen2016]_,
    [Fang2023]_.

    Single weights follow the schedule where no channel is removed: masked ever further in rounds or by a rising share,
    and never back once they are zero; or masked after a training under a penalty on their magnitudes. Where channels
    are removed too, masks are set with the last cut.

    Attributes:
        kind: One of the four.
        rounds: Parts in which channels or weights are removed (``iterative``) or zeroed (``gradual``).
        strength: What the penalty of ``sparse`` takes in all from a group's strongest channel, as a share of the mean
            norm of the group's channels; the weakest loses up to 16 times as much. The same for weights of a layer.
        sparse_steps: Share of the steps that ``gradual`` and ``sparse`` take before the cut; the rest comes after.

    References:
        [Han2015] Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015, section 3.3.
        [Zhu2017] Zhu and Gupta, To prune, or not to prune, 2017.
        [Wen2016] Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016.
        [Fang2023] DepGraph: Towards Any Structural Pruning, CVPR 2023.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ScheduleKind = "one_shot"
    rounds: Annotated[int, Field(ge=2, le=100)] = 3
    strength: Annotated[float, Field(gt=0.0, le=10.0)] = 0.05
    sparse_steps: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5

    def check(self, finetune_steps: int) -> None:
        """Refuse a schedule that prunes by training where there is none.

        Raises:
            UsageError: If ``gradual`` or ``sparse`` has no step.
        """
        if self.kind in TRAINED and finetune_steps == 0:
            raise UsageError(
                f"schedule kind {self.kind!r} prunes while it trains, but recovery.finetune_steps is 0; "
                "allowed: at least 1 step, or the kinds one_shot and iterative",
                "raise the steps (--steps N of `autoprune compress`), or choose another schedule",
            )

    def steps_after(self, finetune_steps: int) -> int:
        """Return the steps that are taken after the last cut."""
        return finetune_steps - (self.first_steps(finetune_steps) if self.kind in TRAINED else 0)

    def first_steps(self, finetune_steps: int) -> int:
        """Return the steps that ``gradual`` and ``sparse`` take before the cut: at least one where there are any."""
        return min(finetune_steps, max(1, round(self.sparse_steps * finetune_steps)))
