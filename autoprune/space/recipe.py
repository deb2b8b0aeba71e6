"""Recipe: one whole candidate, frozen and serialisable. Torch-free."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoprune.errors import UsageError
from autoprune.naming import unknown_name
from autoprune.space.groups import Group, Groups, kept_count

Bits = Literal[8, 32]
GroupType = Literal["conv", "linear"]
_TYPES: tuple[GroupType, ...] = ("conv", "linear")
Order = Literal["prune-tune-quantize", "tune-prune-quantize"]
ORDERS: tuple[Order, ...] = ("prune-tune-quantize", "tune-prune-quantize")
CRITERIA: tuple[str, ...] = ("l1", "l2", "fpgm", "bn_scale", "activation", "taylor", "fisher", "random")
# Those that need gradients of the loss on calibration data.
GRADIENT_CRITERIA: tuple[str, ...] = ("taylor", "fisher")


# Settings that came after the first studies were recorded, which compare recipes by their text.
_LATER = frozenset({"rank_ratio", "feature_distill", "order"})


class GroupChoice(BaseModel):
    """What is done to one group.

    Attributes:
        ratio: Share of units removed, in ``[0, 1]``; 1 takes out the block that the group lies in.
        bits: Bit-width of the weights and inputs of the layers that make the group's channels; 32 is float.
        criterion: How this group's units are ranked; empty for the criterion of its type.
        rank_ratio: Share of the full rank that is removed in each layer that makes the group's channels, in
            ``[0, 1)``, after units were removed; the full rank is the smaller side of the layer's weight as a matrix
            ``(out, in * taps)``. A layer that does not win by it is left whole; 0 leaves all of them whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    bits: Bits = 32
    criterion: str = ""
    rank_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


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


class Recipe(BaseModel):
    """One candidate: everything that turns the dense network into a compressed one.

    Attributes:
        groups: Choice for each group by name; a group that is not named stays dense and float.
        criterion: Criterion for each group type (``conv``, ``linear``).
        width: Step of kept channel counts.
        recovery: What is done after the cut.
        order: ``prune-tune-quantize``: the cut network is fine-tuned; ``tune-prune-quantize``: the dense network is,
            for as many steps, and what the cut loses is recovered in closed form alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: dict[str, GroupChoice] = Field(default_factory=dict)
    criterion: dict[GroupType, str] = Field(default_factory=lambda: dict.fromkeys(_TYPES, "l2"))
    width: Annotated[int, Field(ge=1, le=1024)] = 8
    recovery: Recovery = Recovery()
    order: Order = "prune-tune-quantize"

    def choice(self, group: str) -> GroupChoice:
        """Return the choice for ``group``."""
        return self.groups.get(group, GroupChoice())

    def criterion_of(self, group: Group) -> str:
        """Return the criterion by which the units of ``group`` are ranked."""
        return self.choice(group.name).criterion or self.criterion.get(group.type, "l2")

    def kept_counts(self, groups: Groups) -> dict[str, int]:
        """Return the units that each group keeps."""
        return {g.name: kept_count(g.size, self.choice(g.name).ratio, self.width) for g in groups.groups}

    @property
    def prunes(self) -> bool:
        """Whether the network is cut: any channel or any layer's rank is removed."""
        return self.factorises or any(choice.ratio > 0 for choice in self.groups.values())

    @property
    def factorises(self) -> bool:
        """Whether any layer is to be replaced by two of lower rank."""
        return any(choice.rank_ratio > 0 for choice in self.groups.values())

    def canonical_json(self) -> str:
        """Return the recipe as JSON with sorted keys; equal recipes give equal text.

        Settings that came after the first studies were recorded are left out where they have their defaults.
        """
        content = self.model_dump(mode="json")
        parts: list[tuple[BaseModel, dict[str, Any]]] = [
            (self, content),
            (self.recovery, content["recovery"]),
        ]
        parts += [(choice, content["groups"][name]) for name, choice in self.groups.items()]
        for part, values in parts:
            for name in _LATER & set(values):
                if values[name] == type(part).model_fields[name].default:
                    del values[name]
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def check(self, groups: Groups) -> None:
        """Refuse a recipe that these groups cannot carry out, before any work is done.

        Raises:
            UsageError: If a group or criterion is unknown, or a group that is left alone is to be pruned.
        """
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


def uniform_recipe(
    groups: Groups,
    ratio: float,
    bits: Bits,
    criterion: str = "l2",
    width: int = 8,
    recovery: Recovery | None = None,
    *,
    rank_ratio: float = 0.0,
    order: Order = "prune-tune-quantize",
) -> Recipe:
    """Return the recipe that treats all groups alike.

    Args:
        groups: Groups of the model.
        ratio: Share removed from every prunable group, in ``[0, 1)``.
        bits: Bit-width of every group.
        criterion: Criterion for every group type.
        width: Step of kept channel counts.
        recovery: What is done after the cut; the defaults if not given.
        rank_ratio: Share of the rank removed from every layer but those that make the network's output, in ``[0, 1)``.
        order: Order of the stages.

    Returns:
        A recipe that passes :meth:`Recipe.check` for these groups.
    """
    return Recipe(
        groups={
            g.name: GroupChoice(
                ratio=ratio if g.prunable else 0.0,
                bits=bits,
                rank_ratio=rank_ratio if g.prunable or g.consumers else 0.0,
            )
            for g in groups.groups
        },
        criterion={"conv": criterion, "linear": criterion},
        width=width,
        recovery=recovery or Recovery(),
        order=order,
    )
