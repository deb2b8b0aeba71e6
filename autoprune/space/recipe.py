"""Recipe: one whole candidate, frozen and serialisable. Torch-free."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoprune.errors import UsageError
from autoprune.naming import unknown_name
from autoprune.space.groups import Group, Groups, kept_count
from autoprune.space.mask import Mask, Sparsity
from autoprune.space.quantization import INTEGER_BITS, ActivationBits, Bits, Quantization
from autoprune.space.schedule import Schedule

GroupType = Literal["conv", "linear"]
Ranking = Literal["group", "global", "alike"]
_TYPES: tuple[GroupType, ...] = ("conv", "linear")
Order = Literal["prune-tune-quantize", "tune-prune-quantize"]
ORDERS: tuple[Order, ...] = ("prune-tune-quantize", "tune-prune-quantize")
CRITERIA: tuple[str, ...] = (
    "l1",
    "l2",
    "fpgm",
    "bn_scale",
    "activation",
    "taylor",
    "fisher",
    "lamp",
    "random",
)
# Those that need gradients of the loss on calibration data.
GRADIENT_CRITERIA: tuple[str, ...] = ("taylor", "fisher")
# Those whose scores are shares of their own group's already: a mean of a group would take their sense away.
SHARE_CRITERIA: tuple[str, ...] = ("lamp",)


class GroupChoice(BaseModel):
    """What is done to one group.

    Attributes:
        ratio: Share of units removed, in ``[0, 1]``; 1 takes out the block that the group lies in.
        bits: Bit-width of the weights of the layers that make the group's channels: 2 to 6 and 8 are integers, 16 and
            32 floating-point numbers.
        activation_bits: Bit-width of the inputs of layers whose weights are integers: 8 runs them in int8 where the
            runtime can, 16 rounds inputs so, and 32 leaves the arithmetic in float, so that the weights are only
            stored in fewer bytes.
        criterion: How this group's units are ranked; empty for the criterion of its type.
        sparsity: Share of single weights of the layers that make the group's channels that become zero, in ``[0, 1)``,
            of those left after channels are cut; which ones is the recipe's ``mask``.
        rank_ratio: Share of the full rank that is removed in each layer that makes the group's channels, in
            ``[0, 1)``, after units were removed; the full rank is the smaller side of the layer's weight as a matrix
            ``(out, in * taps)``. A layer that does not win by it is left whole; 0 leaves all of them whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    bits: Bits = 32
    activation_bits: ActivationBits = 8
    criterion: str = ""
    sparsity: Sparsity = 0.0
    rank_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @property
    def runs_int8(self) -> bool:
        """Whether the layers are to run in int8, whatever their weights are stored in."""
        return self.has_integers and self.activation_bits <= INTEGER_BITS

    @property
    def has_integers(self) -> bool:
        """Whether the weights are integers."""
        return self.bits <= INTEGER_BITS


class Recovery(BaseModel):
    """What is done after the cut, in this order.

    Attributes:
        least_squares: Solve the following layers' weights on calibration data.
        batchnorm: Estimate BatchNorm statistics anew on calibration data.
        finetune_steps: Gradient steps with distillation from the dense network; 0 for none.
        learning_rate: Peak learning rate.
        schedule: Course of the rate over the steps.
        distill: Weight of the distillation loss against the task's loss, in ``[0, 1]``.
        temperature: Temperature of the distillation's softmax.
        clip_norm: Largest gradient norm; larger gradients are scaled down to it.
        feature_distill: Weight of the distance between the places that the network and the dense one attend to at the
            end of each stage, which is added to the loss; 0 for none. A few units are usual.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_squares: bool = True
    batchnorm: bool = True
    finetune_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 40
    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 0.02
    schedule: Literal["cosine", "onecycle"] = "cosine"
    distill: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 4.0
    clip_norm: Annotated[float, Field(gt=0.0)] = 5.0
    feature_distill: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0


_UNTOUCHED = GroupChoice()


class Recipe(BaseModel):
    """One candidate: everything that turns the dense network into a compressed one.

    Attributes:
        groups: Choice for each group by name; a group that is not named stays dense and float.
        criterion: Criterion for each group type (``conv``, ``linear``).
        width: Step of kept channel counts.
        recovery: What is done after the cut.
        mask: How single weights are chosen that become zero; groups with a sparsity of 0 have none.
        schedule: When channels and single weights are removed.
        ranking: Which units are compared with each other. ``group``: those of one group, of which its ratio goes.
            ``global``: those of all groups with a ratio above 0, of which as many go in all as their ratios say
            together. ``alike``: the same among groups of one size and kind. Groups of ratio 0 stay whole.
        order: ``prune-tune-quantize``: the cut network is fine-tuned; ``tune-prune-quantize``: the dense network is,
            for as many steps, and what the cut loses is recovered in closed form alone.
        quantization: How integer weights are made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: dict[str, GroupChoice] = Field(default_factory=dict)
    criterion: dict[GroupType, str] = Field(default_factory=lambda: dict.fromkeys(_TYPES, "l2"))
    width: Annotated[int, Field(ge=1, le=1024)] = 8
    recovery: Recovery = Recovery()
    mask: Mask = Mask()
    schedule: Schedule = Schedule()
    ranking: Ranking = "group"
    order: Order = "prune-tune-quantize"
    quantization: Quantization = Quantization()

    def choice(self, group: str) -> GroupChoice:
        """Return the choice for ``group``."""
        return self.groups.get(group, _UNTOUCHED)

    def criterion_of(self, group: Group) -> str:
        """Return the criterion by which the units of ``group`` are ranked."""
        return self.choice(group.name).criterion or self.criterion.get(group.type, "l2")

    def kept_counts(self, groups: Groups) -> dict[str, int]:
        """Return the units that each group keeps by its own ratio.

        Under another ranking than ``group`` scores decide, see :func:`autoprune.compress.ranking.kept_counts`; these
        are then what the number of units removed in all is taken from. Which blocks go is the same under all.
        """
        return {g.name: kept_count(g.size, self.choice(g.name).ratio, self.width) for g in groups.groups}

    @property
    def prunes(self) -> bool:
        """Whether anything is removed or integers are trained; else the network is the dense one, untrained."""
        return (
            self.masks
            or self.factorises
            or self.trains_integers
            or any(choice.ratio > 0 for choice in self.groups.values())
        )

    @property
    def trains_integers(self) -> bool:
        """Whether a part of the fine-tuning knows of integers."""
        few = self.quantization.aware_bits
        integers = any(choice.has_integers and choice.bits <= few for choice in self.groups.values())
        trains = self.order == "prune-tune-quantize" and self.recovery.finetune_steps > 0
        return integers and trains and self.quantization.aware > 0

    @property
    def masks(self) -> bool:
        """Whether single weights become zero."""
        return any(choice.sparsity > 0 for choice in self.groups.values())

    @property
    def factorises(self) -> bool:
        """Whether any layer is to be replaced by two of lower rank."""
        return any(choice.rank_ratio > 0 for choice in self.groups.values())

    def content(self) -> dict[str, Any]:
        """Return the recipe as plain data, as files and records hold it.

        Settings that came after the first studies were recorded are left out where they have their defaults.
        """
        content = self.model_dump(mode="json")
        parts: list[tuple[BaseModel, dict[str, Any]]] = [
            (self, content),
            (self.recovery, content["recovery"]),
        ]
        parts += [(choice, content["groups"][name]) for name, choice in self.groups.items()]
        for part, values in parts:
            fresh = type(part)()
            for name in _LATER[type(part)]:
                if getattr(part, name) == getattr(fresh, name):
                    del values[name]
        if "quantization" in content:
            content["quantization"] = self.quantization.content()
        return content

    def canonical_json(self) -> str:
        """Return the recipe as JSON with sorted keys; equal recipes give equal text."""
        return json.dumps(self.content(), sort_keys=True, separators=(",", ":"))

    def check(self, groups: Groups) -> None:
        """Refuse a recipe that these groups cannot carry out, before any work is done.

        Raises:
            UsageError: If a group or criterion is unknown, a group that is left alone is to be pruned, or the
                schedule needs steps that there are none of, or integers cannot be made as it says.
        """
        self.schedule.check(self.recovery.finetune_steps)
        self._check_integers()
        for name, choice in self.groups.items():
            if name not in groups.by_name:
                raise unknown_name("group", name, groups.by_name)
            group = groups.by_name[name]
            if choice.ratio > 0 and not group.prunable:
                raise UsageError(
                    f"group {name!r} cannot be pruned: {group.reason}",
                    "set its ratio to 0; `autoprune groups` lists what can be pruned",
                )
            if choice.ratio >= 1.0 and not group.block:
                raise UsageError(
                    f"group {name!r} has ratio {choice.ratio:g}, but it lies in no block that can be taken out; "
                    "allowed: below 1",
                    "`autoprune groups` lists the groups that can be removed whole",
                )
        own = (choice.criterion for choice in self.groups.values() if choice.criterion)
        for criterion in (*self.criterion.values(), *own):
            if criterion not in CRITERIA:
                raise unknown_name("criterion", criterion, CRITERIA)
        if self.masks:
            sparsities = [choice.sparsity for choice in self.groups.values()]
            steps = self.recovery.finetune_steps
            # With channels masks are set at the last cut, without them in the midst of the steps.
            cuts = any(choice.ratio > 0 for choice in self.groups.values())
            self.mask.check(sparsities, self.schedule.steps_after(steps) if cuts else steps)
        if self.ranking != "group":
            self._check_comparable(groups)
        self._check_order()

    def _check_integers(self) -> None:
        """Refuse integers that no kernel takes, and weights that would leave the grids that they were trained on."""
        how = self.quantization
        in_int8 = next((name for name, choice in self.groups.items() if choice.runs_int8), None)
        if how.block_size is not None and in_int8 is not None:
            raise UsageError(
                f"group {in_int8!r} has blocks of {how.block_size} weights with scales of their own, and inputs of 8 "
                "bits, whose kernels take one scale for each channel; allowed with blocks: activation bits 16, 32",
                "set the group's activation_bits to 32, or leave block_size out",
            )
        if how.equalize != "none" and self.trains_integers:
            raise UsageError(
                f"equalize {how.equalize!r} rescales weights after all training, which aware {how.aware:g} has put on "
                "grids; allowed with it: aware 0",
                "leave out one of the two",
            )

    def _check_order(self) -> None:
        """Refuse what has to be trained after the cut where nothing is."""
        if self.order == "prune-tune-quantize" or not self.prunes:
            return
        late = "schedule " + repr(self.schedule.kind) if self.schedule.kind != "one_shot" else ""
        if self.masks and self.mask.criterion == "movement":
            late = "mask criterion 'movement'"
        if late:
            raise UsageError(
                f"{late} trains after the cut, which order {self.order!r} does not; "
                "allowed with it: order 'prune-tune-quantize'"
            )

    def _check_comparable(self, groups: Groups) -> None:
        """Refuse to compare scores that are shares of a group with scores that are not."""
        names = {self.criterion_of(g) for g in groups.groups if 0 < self.choice(g.name).ratio < 1}
        if names & set(SHARE_CRITERIA) and len(names) > 1:
            raise UsageError(
                f"ranking {self.ranking!r} compares units of several groups, but the criteria {sorted(names)} give "
                "scores of different scales; allowed: one of them for all, or any without "
                + ", ".join(SHARE_CRITERIA),
                "give conv and linear the same criterion, or ranking group",
            )


# Settings that came after the first studies were recorded, which compare recipes by their text.
_LATER: dict[type[BaseModel], tuple[str, ...]] = {
    GroupChoice: ("sparsity", "rank_ratio", "activation_bits"),
    Recovery: ("feature_distill",),
    Recipe: ("mask", "schedule", "ranking", "order", "quantization"),
}


def groups_left(recipe: Recipe, groups: Groups) -> Groups:
    """Return the groups that are still there once the recipe's blocks are taken out."""
    return groups.without(groups.removed_blocks(recipe.kept_counts(groups)))


def uniform_recipe(
    groups: Groups,
    ratio: float,
    bits: Bits,
    criterion: str = "l2",
    width: int = 8,
    recovery: Recovery | None = None,
    ranking: Ranking = "group",
    *,
    sparsity: float = 0.0,
    mask: Mask | None = None,
    rank_ratio: float = 0.0,
    order: Order = "prune-tune-quantize",
    schedule: Schedule | None = None,
    activation_bits: ActivationBits = 8,
    quantization: Quantization | None = None,
) -> Recipe:
    """Return the recipe that treats all groups alike.

    Args:
        groups: Groups of the model.
        ratio: Share removed from every prunable group, in ``[0, 1)``.
        bits: Bit-width of the weights of every group.
        criterion: Criterion for every group type.
        width: Step of kept channel counts.
        recovery: What is done after the cut; the defaults if not given.
        ranking: Which units are compared with each other.
        sparsity: Share of single weights of every group that become zero, in ``[0, 1)``.
        mask: How they are chosen; by magnitude in every layer if not given.
        rank_ratio: Share of the rank removed from every layer but those that make the network's output, in ``[0, 1)``.
        order: Order of the stages.
        schedule: When channels and weights are removed; at once if not given.
        activation_bits: Bit-width of the inputs of layers with integer weights.
        quantization: How integer weights are made; the nearest of a grid up to the largest magnitude if not given.

    Returns:
        A recipe that passes :meth:`Recipe.check` for these groups.
    """
    return Recipe(
        groups={
            g.name: GroupChoice(
                ratio=ratio if g.prunable else 0.0,
                bits=bits if g.producers else 32,
                activation_bits=activation_bits if g.producers else 8,
                sparsity=sparsity,
                rank_ratio=rank_ratio if g.prunable or g.consumers else 0.0,
            )
            for g in groups.groups
        },
        criterion={"conv": criterion, "linear": criterion},
        width=width,
        recovery=recovery or Recovery(),
        mask=mask or Mask(),
        ranking=ranking,
        order=order,
        schedule=schedule or Schedule(),
        quantization=quantization or Quantization(),
    )
