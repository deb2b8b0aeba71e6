"""Search spaces: what a search may try, read from YAML, and how a trial's parameters become a recipe."""

from __future__ import annotations

import fnmatch
import math
from typing import Annotated, Any, Self

import optuna
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from autoprune.errors import UsageError
from autoprune.naming import unknown_name
from autoprune.space.choices import IntRange, Parameters, RecoverySpace, choice_params, suggest_choice
from autoprune.space.groups import Group, Groups, kept_count
from autoprune.space.mask import Mask
from autoprune.space.mask_space import MaskSpace
from autoprune.space.quantization import INTEGER_BITS, ActivationBits, Bits
from autoprune.space.quantization_space import QuantizationSpace
from autoprune.space.recipe import (
    CRITERIA,
    SHARE_CRITERIA,
    GroupChoice,
    Ranking,
    Recipe,
    Recovery,
)
from autoprune.space.schedule import Schedule
from autoprune.space.schedule_space import ScheduleSpace
from autoprune.space.space_parts import (
    AUTO,
    BaselineSpace,
    BitChoices,
    CriterionChoices,
    GroupType,
    Orders,
    Override,
    RankingChoices,
    Ratios,
    Rung,
    Shares,
    Width,
    each_once,
)

_TYPES: tuple[GroupType, ...] = ("conv", "linear")
_DEFAULT_CRITERION = "l2"

_LATER = (
    "activation_bits",
    "quantization",
    "rankings",
    "sparsities",
    "masks",
    "schedules",
    "rank_ratios",
    "orders",
)


def _default_criteria() -> dict[GroupType, tuple[str, ...]]:
    return dict.fromkeys(_TYPES, (_DEFAULT_CRITERION,))


class SearchSpace(BaseModel):
    """What a search may try.

    Attributes:
        description: For people.
        width: Step of kept channel counts; ``auto`` is what was measured of the target, 8 where nothing was.
        ratios: Shares of a group that may be removed, each in ``[0, 1]``; 1 takes out the block that a group lies in,
            and is left out for groups that lie in none.
        bits: Bit-widths that the weights of a group may get; 32 is float.
        activation_bits: Bit-widths of what layers with integer weights read: 8, 16 or 32.
        quantization: How integer weights are made.
        criteria: Importance criteria for each group type.
        sparsities: Shares of single weights of a group that may become zero, each in ``[0, 1)``.
        masks: How these weights are chosen.
        recovery: What is done after the cut.
        schedules: When channels and single weights are removed.
        overrides: Other ratios, bits, sparsities and ranks for some groups.
        rank_ratios: Shares of the full rank that may be removed from the layers that make a group's channels, each in
            ``[0, 1)``.
        orders: Orders of the stages.
        baselines: Points that are measured first.
        rungs: Fidelities of the default search: a screen, then ever longer trainings of ever fewer recipes. The plain
            samplers have one fidelity, that of ``recovery``.
        rankings: Which units are compared with each other; see :class:`~autoprune.space.recipe.Recipe`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: Annotated[str, Field(max_length=1000)] = ""
    width: Width = 8
    ratios: Ratios = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8)
    bits: BitChoices = (8, 32)
    activation_bits: Annotated[tuple[ActivationBits, ...], Field(min_length=1)] = (8,)
    quantization: QuantizationSpace = QuantizationSpace()
    criteria: dict[GroupType, CriterionChoices] = Field(default_factory=_default_criteria)
    sparsities: Shares = (0.0,)
    masks: MaskSpace = MaskSpace()
    recovery: RecoverySpace = RecoverySpace()
    schedules: ScheduleSpace = ScheduleSpace()
    overrides: Annotated[tuple[Override, ...], Field(max_length=1000)] = ()
    rank_ratios: Shares = (0.0,)
    orders: Orders = ("prune-tune-quantize",)
    baselines: BaselineSpace = BaselineSpace()
    rungs: Annotated[tuple[Rung, ...], Field(min_length=2, max_length=6)] = (
        Rung(steps=0, examples=500),
        Rung(steps=50),
        Rung(steps=200),
    )
    rankings: RankingChoices = ("group",)
    _automatic_width: bool = PrivateAttr(default=False)

    _once = field_validator(
        "ratios", "bits", "activation_bits", "sparsities", "rankings", "rank_ratios", "orders"
    )(each_once)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_auto(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        space = handler(values)
        space._automatic_width = isinstance(values, dict) and values.get("width") == AUTO
        return space

    @field_validator("criteria")
    @classmethod
    def _known_criteria(cls, criteria: dict[GroupType, tuple[str, ...]]) -> dict[GroupType, tuple[str, ...]]:
        for names in criteria.values():
            for name in names:
                if name not in CRITERIA:
                    raise unknown_name("criterion", name, CRITERIA)
            each_once(names)
        return _default_criteria() | criteria

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[Rung, ...]) -> tuple[Rung, ...]:
        steps = [rung.steps for rung in rungs]
        if steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"steps must start with 0, the screen, and rise from rung to rung; got {steps}")
        if any(rung.examples is not None for rung in rungs[1:]):
            raise ValueError(
                "examples is for the screen alone: what is exported is scored on the whole search split"
            )
        return rungs

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        steps = self.recovery.finetune_steps
        fewest = steps.low if isinstance(steps, IntRange) else min(steps)
        self.masks.check(self.every_sparsity, [self.schedules.fewest_steps_after(fewest)])
        return self

    @model_validator(mode="after")
    def _steps_where_needed(self) -> Self:
        steps = self.recovery.finetune_steps
        if (kind := self.schedules.needs_steps()) and (
            0 in steps if isinstance(steps, tuple) else steps.low <= 0
        ):
            raise ValueError(
                f"schedules.kind {kind!r} prunes while it trains, but recovery.finetune_steps may be 0; "
                "allowed with it: steps of at least 1"
            )
        return self

    @model_validator(mode="after")
    def _orders_fit(self) -> Self:
        if "tune-prune-quantize" in self.orders and self.schedules.kind != ("one_shot",):
            raise ValueError(
                f"schedules.kind {list(self.schedules.kind)} train after the cut, which order 'tune-prune-quantize' "
                "does not; allowed with it: schedules.kind one_shot"
            )
        if (
            "tune-prune-quantize" in self.orders
            and "movement" in self.masks.criterion
            and any(self.every_sparsity)
        ):
            raise ValueError(
                "masks.criterion 'movement' trains after the cut, which order 'tune-prune-quantize' does not"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        names = {name for names in self.criteria.values() for name in names}
        shares = names & set(SHARE_CRITERIA)
        if shares and shares != names and self.rankings != ("group",):
            raise ValueError(
                f"rankings {list(self.rankings)} compare scores of several groups, and {sorted(shares)} cannot be "
                f"compared with {sorted(names - shares)}; give conv and linear criteria of one sort"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        widths = {*self.bits, *(b for o in self.overrides for b in o.bits or ())}
        if self.quantization.blocks and 8 in self.activation_bits and min(widths) <= INTEGER_BITS:
            raise ValueError(
                f"quantization.block_size {self.quantization.blocks} gives blocks of weights scales of their own, but "
                f"activation_bits {list(self.activation_bits)} holds 8, whose kernels take one scale for each channel; "
                "allowed with blocks: activation_bits 16, 32"
            )
        return self

    @property
    def has_automatic_width(self) -> bool:
        """Whether the width is to be what was measured of the target; until then it is the usual one."""
        return self._automatic_width

    def with_width(self, width: int) -> Self:
        """Return the space with a width that is settled."""
        space = self.model_copy(update={"width": width})
        space._automatic_width = False
        return space

    @property
    def every_sparsity(self) -> tuple[float, ...]:
        """All sparsities that some group may get."""
        own = (sparsity for o in self.overrides for sparsity in o.sparsities or ())
        return tuple(dict.fromkeys((*self.sparsities, *own)))

    @property
    def trains(self) -> bool:
        """Whether recipes are fine-tuned at all."""
        return self.default_recovery().finetune_steps > 0

    def default_recovery(self) -> Recovery:
        """Return the recovery made of every first choice, which the baselines use."""
        return self.recovery.default()

    def ratios_of(self, group: Group) -> tuple[float, ...]:
        """Return the ratios that make a difference for ``group``, from the smallest on.

        Of ratios that keep the same count the smallest is listed. A group that cannot be pruned has ``(0.0,)``.
        """
        if not group.prunable:
            return (0.0,)
        ratios = next(
            (o.ratios for o in reversed(self._overrides_of(group)) if o.ratios is not None), self.ratios
        )
        by_count: dict[int, float] = {}
        for ratio in sorted(r for r in ratios if r < 1.0 or group.block) or [0.0]:
            by_count.setdefault(kept_count(group.size, ratio, self.width), ratio)
        return tuple(by_count.values())

    def bits_of(self, group: Group) -> tuple[Bits, ...]:
        """Return the bit-widths that ``group`` may get, from the smallest on."""
        if not group.producers:  # the width of heads: their layers' bits are another group's
            return (32,)
        bits = next((o.bits for o in reversed(self._overrides_of(group)) if o.bits is not None), self.bits)
        return tuple(sorted(bits))

    def _formats_of(self, group: Group) -> tuple[int, int, int]:
        """Return how many pairs of bits ``group`` may get: weights of 32, of 16, and integers, by what reads them."""
        widths = self.bits_of(group)
        integers = sum(b <= INTEGER_BITS for b in widths) * len(self.activation_bits)
        return widths.count(32), widths.count(16), integers

    def sparsities_of(self, group: Group) -> tuple[float, ...]:
        """Return the sparsities that ``group`` may get, from the smallest on."""
        own = (o.sparsities for o in reversed(self._overrides_of(group)) if o.sparsities is not None)
        return tuple(sorted(next(own, self.sparsities)))

    def rank_ratios_of(self, group: Group) -> tuple[float, ...]:
        """Return the shares of the rank that may be removed in the layers of ``group``, from the smallest on."""
        own = (o.rank_ratios for o in reversed(self._overrides_of(group)) if o.rank_ratios is not None)
        return tuple(sorted(next(own, self.rank_ratios)))

    def check(self, groups: Groups) -> Self:
        """Refuse overrides that cannot take effect on these groups, before any work is done.

        Raises:
            UsageError: If a pattern matches no group, or asks to prune groups none of which can be pruned.
        """
        for override in self.overrides:
            matched = [g for g in groups.groups if fnmatch.fnmatchcase(g.name, override.groups)]
            if not matched:
                raise unknown_name(
                    "group", override.groups, groups.by_name, "`autoprune groups` lists the groups of a model"
                )
            if override.ratios == (1.0,) and not any(g.block for g in matched):
                raise UsageError(
                    f"the override of group {override.groups!r} gives ratio 1.0 alone, but {matched[0].name!r} lies in "
                    "no block that can be taken out; allowed: ratios below 1",
                    "`autoprune groups` lists the groups that can be removed whole",
                )
            if override.ratios and any(override.ratios) and not any(g.prunable for g in matched):
                raise UsageError(
                    f"the override of group {override.groups!r} gives ratios {list(override.ratios)}, but "
                    f"{matched[0].name!r} cannot be pruned: {matched[0].reason}; allowed: [0.0]",
                    "`autoprune groups` lists what can be pruned",
                )
        return self

    def suggest(self, trial: optuna.trial.BaseTrial, groups: Groups) -> Recipe:
        """Let ``trial`` choose a recipe.

        Parameters: ``ratio:<group>`` (index into :meth:`ratios_of`), ``bits:<group>`` (8 or 32), ``sparsity:<group>``
        and ``rank:<group>`` (indices too), and, only where something is removed, ``criterion:<type>``, ``ranking``,
        ``order`` and the settings of the mask, the schedule and the recovery. One choice makes no parameter.
        """
        chosen: dict[str, GroupChoice] = {}
        for group in groups.groups:
            ratio = suggest_choice(trial, f"ratio:{group.name}", self.ratios_of(group))
            options = self.bits_of(group)
            bits: Any = options[0]
            if len(options) > 1:
                bits = trial.suggest_categorical(f"bits:{group.name}", options)
            inputs: Any = self.activation_bits[0]
            if bits <= INTEGER_BITS and group.producers:
                inputs = suggest_choice(trial, f"activation_bits:{group.name}", self.activation_bits)
            sparsity = suggest_choice(trial, f"sparsity:{group.name}", self.sparsities_of(group))
            rank = suggest_choice(trial, f"rank:{group.name}", self.rank_ratios_of(group))
            chosen[group.name] = GroupChoice(
                ratio=ratio, bits=bits, activation_bits=inputs, sparsity=sparsity, rank_ratio=rank
            )
        criterion: dict[GroupType, str] = {kind: self.criteria[kind][0] for kind in _TYPES}
        pruned = _pruned_types(chosen, groups)
        for kind in pruned:
            criterion[kind] = suggest_choice(trial, f"criterion:{kind}", self.criteria[kind])
        masked = any(choice.sparsity > 0 for choice in chosen.values())
        mask = self.masks.suggest(trial) if masked else Mask()
        cut = bool(pruned) or masked or any(choice.rank_ratio > 0 for choice in chosen.values())
        integers = any(choice.has_integers for choice in chosen.values())
        halves = any(choice.bits == 16 for choice in chosen.values())
        quantization = self.quantization.suggest(trial, integers=integers, halves=halves)
        cut = cut or quantization.aware > 0
        recovery = self.recovery.suggest(trial) if cut else self.default_recovery()
        ranking: Ranking = suggest_choice(trial, "ranking", self.rankings) if pruned else self.rankings[0]
        schedule = self.schedules.suggest(trial) if pruned or masked else Schedule()
        order: Any = self.orders[0]
        if cut and recovery.finetune_steps > 0:
            order = suggest_choice(trial, "order", self.orders)
        return Recipe(
            groups=chosen,
            criterion=criterion,
            width=self.width,
            recovery=recovery,
            ranking=ranking,
            mask=mask,
            schedule=schedule,
            order=order,
            quantization=quantization,
        )

    def params_of(self, recipe: Recipe, groups: Groups) -> Parameters | None:
        """Return the parameters with which :meth:`suggest` gives ``recipe`` or one of equal effect.

        Two ratios that keep the same count have the same effect, and so have a criterion and a recovery where
        nothing is pruned.

        Returns:
            Parameters by name; None if the recipe lies outside of the space, as one with criteria for single groups.
        """
        pruned = _pruned_types(recipe.groups, groups)
        if not set(recipe.groups) <= set(groups.by_name) or (
            (pruned or recipe.factorises) and recipe.width != self.width
        ):
            return None
        if any(
            c.criterion not in ("", recipe.criterion.get(groups.by_name[n].type))
            for n, c in recipe.groups.items()
        ):
            return None
        found: Parameters = {}
        parts: list[Parameters | None] = []
        for group in groups.groups:
            parts += self._group_params(group, recipe.choice(group.name))
        parts += [
            choice_params(f"criterion:{kind}", self.criteria[kind], recipe.criterion.get(kind))
            for kind in pruned
        ]
        if recipe.masks:
            parts.append(self.masks.params_of(recipe.mask))
        widths = {choice.bits for choice in recipe.groups.values()}
        made = self.quantization.params_of(
            recipe.quantization, integers=min(widths, default=32) <= INTEGER_BITS, halves=16 in widths
        )
        parts.append(made)
        if recipe.prunes:
            parts.append(self.recovery.params_of(recipe.recovery))
        if pruned:
            parts.append(choice_params("ranking", self.rankings, recipe.ranking))
        if pruned or recipe.masks:
            parts.append(self.schedules.params_of(recipe.schedule))
        if recipe.prunes and recipe.recovery.finetune_steps > 0:
            parts.append(choice_params("order", self.orders, recipe.order))
        for part in parts:
            if part is None:
                return None
            found |= part
        return found

    def size(self, groups: Groups) -> float:
        """Return the decimal logarithm of the number of recipes that differ; a range counts as 100 choices."""
        uncut, any_criterion = 1, 1
        for kind in _TYPES:
            of_kind = [g for g in groups.groups if g.type == kind]
            combinations = math.prod(len(self.ratios_of(g)) for g in of_kind)
            without = int(all(self.ratios_of(g)[0] == 0.0 for g in of_kind))
            uncut *= without
            any_criterion *= without + (combinations - without) * len(self.criteria[kind])
        choices = [self.sparsities_of(g) for g in groups.groups]
        unmasked = int(all(0.0 in of_group for of_group in choices))
        masked = (math.prod(map(len, choices)) - unmasked) * self.masks.count()
        ranks = [self.rank_ratios_of(g) for g in groups.groups]
        # Only what loses channels or weights has a schedule, only channels have a ranking, and only what loses anything
        # is recovered.
        schedules = self.schedules.count()
        cut = (any_criterion - uncut) * len(self.rankings) * schedules * (unmasked + masked)
        untouched = uncut * unmasked * int(all(0.0 in of_group for of_group in ranks))
        recovered = (cut + uncut * (unmasked + masked * schedules)) * math.prod(map(len, ranks)) - untouched
        recoveries = self.recovery.count(len(self.orders))
        bit_choices = self.quantization.combinations([self._formats_of(g) for g in groups.groups])
        return math.log10(bit_choices * (untouched + recovered * recoveries))

    def content(self) -> str:
        """Return the space as text, by which a study knows it again; newer settings count where they are set."""
        fresh = SearchSpace()
        newer = {name for name in _LATER if getattr(self, name) == getattr(fresh, name)}
        exclude: dict[str, Any] = {"quantization": self.quantization.unset, **dict.fromkeys(newer, True)}
        if self.recovery.feature_distill == fresh.recovery.feature_distill:
            exclude["recovery"] = {"feature_distill"}
        exclude["overrides"] = {
            place: {name for name in ("sparsities", "rank_ratios") if getattr(override, name) is None}
            for place, override in enumerate(self.overrides)
        }
        return self.model_dump_json(exclude=exclude) + (" width: auto" if self._automatic_width else "")

    def _overrides_of(self, group: Group) -> list[Override]:
        return [override for override in self.overrides if fnmatch.fnmatchcase(group.name, override.groups)]

    def _group_params(self, group: Group, choice: GroupChoice) -> list[Parameters | None]:
        """Return the parameters of one group's choice, None for each that lies outside."""
        name, widths = group.name, self.bits_of(group)
        bits: Parameters | None = {f"bits:{name}": choice.bits} if len(widths) > 1 else {}
        parts = [
            self._ratio_params(group, choice.ratio),
            choice_params(f"sparsity:{name}", self.sparsities_of(group), choice.sparsity),
            bits if choice.bits in widths else None,
            choice_params(f"rank:{name}", self.rank_ratios_of(group), choice.rank_ratio),
        ]
        if choice.bits <= INTEGER_BITS and group.producers:
            known = choice_params(f"activation_bits:{name}", self.activation_bits, choice.activation_bits)
            parts.append(known)
        return parts

    def _ratio_params(self, group: Group, ratio: float) -> Parameters | None:
        options = self.ratios_of(group)
        kept = kept_count(group.size, ratio, self.width)
        for index, option in enumerate(options):
            if kept_count(group.size, option, self.width) == kept:
                return {f"ratio:{group.name}": index} if len(options) > 1 else {}
        return None


def _pruned_types(choices: dict[str, GroupChoice], groups: Groups) -> list[GroupType]:
    found = {
        groups.by_name[name].type
        for name, choice in choices.items()
        if name in groups.by_name and choice.ratio > 0
    }
    return [kind for kind in _TYPES if kind in found]
