"""How many units a layer keeps, and which numbers the base's family and the budget allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertprune.artifacts.plan import StructureBudget
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget
from expertprune.spec.values import Keep
from expertprune.units import GONE, KeptUnits, LayerShape, Structure

ALIGNED = 8  # rows of 16 bytes in 16-bit weights, below which torch refuses grouped products


@dataclass(frozen=True)
class LayerWidths:
    """What one layer keeps, in units; `ffn` is of each routed expert where there are several.

    A layer that goes whole is `gone`, and keeps none.
    """

    ffn: int
    heads_per_group: int
    kv_groups: int
    experts: int = 0
    gone: bool = False

    @classmethod
    def own(cls, shape: LayerShape) -> LayerWidths:
        """The widths of a layer that loses nothing."""
        return cls(shape.ffn, shape.heads_per_group, shape.kv_heads, shape.experts)

    @property
    def query_heads(self) -> int:
        return self.heads_per_group * self.kv_groups

    def of(self, structure: Structure) -> int:
        return {
            Structure.FFN: self.ffn * max(1, self.experts),
            Structure.QUERY_HEADS: self.query_heads,
            Structure.KV_GROUPS: self.kv_groups,
            Structure.EXPERTS: self.experts,
        }[structure]


# What a step of each structure changes.
FIELDS = {Structure.FFN: "ffn", Structure.QUERY_HEADS: "heads_per_group", Structure.KV_GROUPS: "kv_groups"}

GONE_WIDTHS = LayerWidths(0, 0, 0, gone=True)


def own_widths(base: ResolvedBase, gone: Sequence[int]) -> list[LayerWidths]:
    """The widths of all layers if only some whole layers go."""
    return [GONE_WIDTHS if layer in gone else LayerWidths.own(shape) for layer, shape in enumerate(base.layers)]


def summary(budget: Budget, base: Sequence[LayerShape], widths: Sequence[LayerWidths]) -> dict[str, StructureBudget]:
    """By structure that the base has: what was requested, and what each layer has, keeps and loses.

    A single number is that of every layer that stays and has such units; a list has all layers, and 0 for
    those that go.
    """
    result = {}
    if gone := sum(layer.gone for layer in widths):
        counts = {"of": len(base), "kept": len(base) - gone, "removed": gone}
        result["layers"] = StructureBudget(requested=budget.layers, **counts)
    for structure in Structure:
        neurons = structure is Structure.FFN
        of = [shape.ffn if neurons else shape.units(structure) for shape in base]
        if not any(of):
            continue
        kept = [layer.ffn if neurons else layer.of(structure) for layer in widths]
        there = {(a, b) for a, b, layer in zip(of, kept, widths, strict=True) if a and not layer.gone}
        requested = getattr(budget, structure.value)
        if len(there) == 1:
            ((own, left),) = there
            result[structure.value] = StructureBudget(requested=requested, of=own, kept=left, removed=own - left)
            continue
        removed = [a - b for a, b in zip(of, kept, strict=True)]
        result[structure.value] = StructureBudget(requested=requested, of=of, kept=kept, removed=removed)
    return result


def cuts_units(budget: Budget) -> bool:
    """Whether units inside layers are to go, which a criterion scores."""
    return any(getattr(budget, each.value) for each in Structure) or budget.overall or budget.retention is not None


def removal(amount: int | float | Keep, of: int, key: str) -> int | float:
    """What goes of so many units, as a count or a fraction. Raises `PlanError` where more would
    stay than there are.
    """
    if not isinstance(amount, Keep):
        return amount
    if amount.keep > of:
        raise PlanError(f"budget.{key}: keep: {amount.keep} is more than the {of} that there are")
    return of - amount.keep


def said(amount: int | float | Keep) -> str:
    """An amount as a spec says it."""
    return f"keep: {amount.keep}" if isinstance(amount, Keep) else f"{amount:g}"


# --- what may be cut at all -----------------------------------------------------------------------------------------


def check_structures(budget: Budget, base: ResolvedBase) -> None:
    """Raises `PlanError` where the budget names a structure that the base's family does not allow."""
    family = base.family
    allowed = ", ".join(each.value for each in family.structures)
    for structure in Structure:
        if getattr(budget, structure.value) and structure not in family.structures:
            why = f"heads of family {family.family!r} cannot be cut: {family.why_no_heads}"
            if structure is Structure.EXPERTS:
                why = f"layers of family {family.family!r} have none"
            if structure is Structure.FFN:
                why = f"neurons of family {family.family!r} cannot be cut: {family.why_no_neurons}"
            raise PlanError(f"budget.{structure.value}: {why}; structures that can be cut: {allowed}")
    _check_shared(budget, base)
    if family.has_ffn:
        return
    if budget.overall and budget.experts and family.why_no_neurons:
        raise PlanError(
            f"budget: parameters beside experts are met by neurons, and those of family {family.family!r} cannot be cut: "
            f"{family.why_no_neurons}; leave one of the two out"
        )
    if (budget.ffn or (budget.overall and budget.experts)) and budget.multiple_of % ALIGNED:
        raise PlanError(
            f"budget.multiple_of: {budget.multiple_of} is no multiple of {ALIGNED}; widths of routed experts must be, "
            "because grouped matrix products need it"
        )
    if budget.retention is not None:
        raise PlanError(
            "budget.retention: it tries widths of one FFN in each layer, and layers of this base have routed experts; give "
            "budget.experts, budget.ffn or budget.parameters"
        )


def _check_shared(budget: Budget, base: ResolvedBase) -> None:
    """Raises `PlanError` where the base itself cannot be shared among `budget.tensor_parallel` GPUs."""
    gpus = budget.tensor_parallel
    for layer, shape in enumerate(base.layers):
        if problems := shape.indivisible(gpus):
            raise PlanError(
                f"budget.tensor_parallel: layer {layer} of this base has {' and '.join(problems)}, which cannot be shared "
                f"among {gpus} GPUs; take fewer"
            )


def shareable(budget: Budget, shape: LayerShape, heads_per_group: int, groups: int) -> bool:
    """Whether these heads can be shared among `budget.tensor_parallel` GPUs.

    Where GPUs outnumber KV heads, each KV head is on several, so cutting one would save nothing.
    """
    gpus = budget.tensor_parallel
    kv_heads = groups % gpus == 0 or groups == shape.kv_heads
    return kv_heads and heads_per_group * groups % gpus == 0


def check_own_widths(budget: Budget, base: ResolvedBase) -> None:
    """Raises `PlanError` where routed experts would be cut and layers shall have widths of their
    own.
    """
    if not base.family.has_ffn and (budget.experts or budget.ffn or budget.overall):
        raise PlanError(
            "compose.allocation: the config of this base has one number of routed experts and one of neurons in each, for "
            "all layers; leave allocation out, or use allocation: uniform"
        )


def common_shape(base: ResolvedBase) -> LayerShape:
    """The shape of the layers that can be cut; in a mixture, some layers may have an FFN that stays whole."""
    return max(base.layers, key=lambda shape: shape.neurons)


def in_layer(widths: LayerWidths, shape: LayerShape) -> LayerWidths:
    """Widths of a layer that may have nothing but heads to cut."""
    return widths if shape.ffn else replace(widths, ffn=0, experts=0)


# --- legal widths ---------------------------------------------------------------------------------------------------


def least(of: int, floor: float) -> int:
    """The smallest number of units that `budget.floor` allows."""
    return math.ceil(floor * of - 1e-9)


def legal_ffn(shape: LayerShape, multiple_of: int, floor: float) -> list[int]:
    """FFN widths that may be kept, ascending; the base's own is always one of them."""
    smallest = max(1, least(shape.ffn, floor))
    return sorted({width for width in range(multiple_of, shape.ffn, multiple_of) if width >= smallest} | {shape.ffn})


def legal_experts(base: ResolvedBase, floor: float) -> list[int]:
    """Numbers of routed experts that a layer may keep, ascending: no fewer than the router chooses
    for each token, and as many of each group that it chooses among.
    """
    shape = common_shape(base)
    smallest = max(base.family.least_experts(base.checkpoint.config), least(shape.experts, floor))
    return [count for count in range(smallest, shape.experts + 1) if count % shape.expert_groups == 0]


def legal_widths(base: ResolvedBase, budget: Budget, layer: int, structure: Structure) -> list[int]:
    """Widths of a structure that one layer may keep, descending from its own; heads as heads of
    each KV group.
    """
    shape = base.layers[layer]
    if structure is Structure.FFN:
        return legal_ffn(shape, budget.ffn_step, budget.floor)[::-1]
    if structure is Structure.EXPERTS:
        return legal_experts(base, budget.floor)[::-1]
    own = shape.kv_heads if structure is Structure.KV_GROUPS else shape.heads_per_group

    def can_say(width: int) -> bool:
        heads, groups = (shape.heads_per_group, width) if structure is Structure.KV_GROUPS else (width, shape.kv_heads)
        return shareable(budget, shape, heads, groups) and expressible(base, heads, groups)

    smallest = max(1, least(own, budget.floor))
    return [own, *(width for width in range(own - 1, smallest - 1, -1) if can_say(width))]


def narrowed(
    base: ResolvedBase, budget: Budget, layer: int, present: LayerWidths, structure: Structure, width: int
) -> LayerWidths | None:
    """What a layer keeps with another legal width of one structure; `None` where heads and groups may not be so."""
    changed: dict[str, Any] = {FIELDS[structure]: width}
    narrow = replace(present, **changed)
    return narrow if structure is Structure.FFN or may_keep(base, budget, layer, narrow) else None


def may_keep(base: ResolvedBase, budget: Budget, layer: int, widths: LayerWidths) -> bool:
    """Whether the heads and groups of a layer, each of them legal, are legal together."""
    shape = base.layers[layer]
    enough = widths.query_heads >= least(shape.query_heads, budget.floor)
    shared = shareable(budget, shape, widths.heads_per_group, widths.kv_groups)
    return enough and shared and expressible(base, widths.heads_per_group, widths.kv_groups)


def expressible(base: ResolvedBase, heads_per_group: int, groups: int) -> bool:
    """Whether the family's config can say these heads."""
    kept = {
        shape: first_units(LayerWidths(shape.ffn, heads_per_group, groups, shape.experts), shape)
        for shape in dict.fromkeys(base.layers)
    }
    try:
        base.family.pruned_config(base.checkpoint.config, [kept[shape] for shape in base.layers])
    except PlanError:
        return False
    return True


def first_units(widths: LayerWidths, shape: LayerShape) -> KeptUnits:
    """Any units of the right number: enough to ask whether a config can say the widths."""
    if widths.gone:
        return GONE
    heads = [
        group * shape.heads_per_group + head
        for group in range(widths.kv_groups)
        for head in range(widths.heads_per_group)
    ]
    ffn = [expert * shape.ffn + neuron for expert in range(max(1, widths.experts)) for neuron in range(widths.ffn)]
    return KeptUnits(tuple(ffn), tuple(heads), tuple(range(widths.kv_groups)), tuple(range(widths.experts)))


def rounded_down(fraction: float) -> str:
    """Rounded so that the number, typed in, is legal."""
    return f"{math.floor(fraction * 1e4) / 1e4:g}"
