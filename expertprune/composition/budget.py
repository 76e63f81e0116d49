"""From what the user asks to remove to legal widths: aligned, above the floor, and such that a config can say them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expertprune.composition.legality import check_structures, kept_experts, legal_experts, rounded_down
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.costs import row_parameters, unit_parameters
from expertprune.models.inventory import vocabulary_rows
from expertprune.spec.schema import Budget
from expertprune.units import ROW_MULTIPLE, KeptUnits, LayerShape, Structure


@dataclass(frozen=True)
class LayerWidths:
    """What one layer keeps, in units; `ffn` is of each expert where there are several."""

    ffn: int
    heads_per_group: int
    kv_groups: int
    experts: int = 0

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


@dataclass(frozen=True)
class Widths:
    """What every layer keeps, and what was asked for."""

    layers: tuple[LayerWidths, ...]
    requested: dict[str, Any] = field(hash=False)

    @classmethod
    def same(cls, layer: LayerWidths, count: int, requested: dict[str, Any] | None = None) -> Widths:
        """The same widths in `count` layers."""
        return cls((layer,) * count, requested or {})

    @property
    def uniform(self) -> bool:
        return len(set(self.layers)) == 1

    def summary(self, base: tuple[LayerShape, ...]) -> dict[str, dict[str, Any]]:
        """Per structure: what was `requested`, and of each layer the units it has (`of`), `kept` and `removed`.

        FFN neurons are those of one expert where there are several. A number where all layers agree, else a list with one
        number for each layer.
        """
        result = {}
        for structure in Structure:
            neurons = structure is Structure.FFN
            of = [shape.ffn if neurons else shape.units(structure) for shape in base]
            if not any(of):  # this model has none
                continue
            kept = [layer.ffn if neurons else layer.of(structure) for layer in self.layers]
            entries = {"of": of, "kept": kept, "removed": [a - b for a, b in zip(of, kept, strict=True)]}
            one = len(set(of)) == len(set(kept)) == 1
            numbers = {key: values[0] if one else values for key, values in entries.items()}
            result[structure.value] = {"requested": self.requested.get(structure.value, 0), **numbers}
        return result


def resolve_budget(budget: Budget, base: ResolvedBase) -> Widths:
    """Legal widths, the same in every layer, that meet a budget.

    A count must be legal as it stands. A fraction goes to the nearest legal width, and is refused where that would
    remove nothing. `parameters` is met from above by the smallest FFN cut that removes at least this fraction;
    `max_parameters` likewise. Of a base of experts, whole experts go instead, or neurons inside them where the budget says
    how many experts go.

    Raises:
        PlanError: not reachable; the message names the nearest legal values.
    """
    if len(set(base.layers)) > 1:
        raise PlanError(
            "compose.allocation: the layers of this base have different widths, so the same cut cannot be made in all of "
            "them; use allocation: global"
        )
    check_structures(budget, base)
    shape = base.layers[0]
    groups = _kept_groups(budget, base)
    heads = _kept_heads_per_group(budget, base, groups)
    wanted = wanted_parameters(budget, base)
    ffn, experts = _kept_ffn(budget, shape), kept_experts(budget, base)
    if wanted is not None and (base.family.has_ffn or budget.experts):
        ffn = _ffn_for_parameters(wanted, budget, base, LayerWidths(ffn, heads, groups, experts))
    elif wanted is not None:
        experts = _experts_for_parameters(wanted, budget, base, LayerWidths(ffn, heads, groups, experts))
    requested = budget.model_dump(
        include={"ffn", "query_heads", "kv_groups", "experts", "parameters", "max_parameters"}
    )
    layer = LayerWidths(ffn, heads, groups, experts)
    if layer.query_heads < math.ceil(budget.floor * shape.query_heads - 1e-9):
        raise PlanError(
            f"budget: kv_groups and query_heads together leave {layer.query_heads} of {shape.query_heads} query heads, "
            f"fewer than budget.floor ({budget.floor:g}) allows"
        )
    # The family's config must be able to say these widths: asked now, before any work.
    base.family.pruned_config(base.checkpoint.config, [first_units(layer, shape)] * len(base.layers))
    return Widths.same(layer, len(base.layers), requested)


def wanted_parameters(budget: Budget, base: ResolvedBase) -> float | None:
    """How many parameters are to be removed from the whole model, if the budget says so.

    Raises:
        PlanError: `max_parameters` is not below the base's own number.
    """
    if not budget.overall:
        return None
    total = base.checkpoint.parameters
    if budget.parameters is not None:
        return budget.parameters * total
    assert budget.max_parameters is not None
    if budget.max_parameters >= total:
        raise PlanError(
            f"budget.max_parameters: {budget.max_parameters:,} is no cut: the base has {total:,} parameters"
        )
    return float(total - budget.max_parameters)


def removed_parameters(base: ResolvedBase, widths: Widths) -> int:
    """How many parameters leave the whole model, less what it gains."""
    gone = sum(removed_from_layer(base, index, layer) for index, layer in enumerate(widths.layers))
    return gone - added_parameters(base, widths.layers)


def wanted_rows(budget: Budget, base: ResolvedBase) -> int | None:
    """How many vocabulary rows are written, as far as the budget itself says: not for a coverage.

    A number goes up to the next multiple of `ROW_MULTIPLE`, a fraction to the nearest.

    Raises:
        PlanError: that would be no cut.
        CheckpointError: the base's vocabulary disagrees with its config.
    """
    if budget.vocabulary is None or isinstance(budget.vocabulary, dict):
        return None
    of, asked = vocabulary_rows(base.checkpoint, base.family), budget.vocabulary
    if isinstance(asked, int):
        rows = -(-asked // ROW_MULTIPLE) * ROW_MULTIPLE
    else:
        rows = max(1, round(of * (1 - asked) / ROW_MULTIPLE)) * ROW_MULTIPLE
    if rows >= of:
        raise PlanError(
            f"budget.vocabulary: {asked:g} cuts nothing: the base has {of:,} rows, and {rows:,} would be kept "
            f"(a multiple of {ROW_MULTIPLE})"
        )
    return rows


def removed_with_rows(base: ResolvedBase, rows: int | None) -> int:
    """How many parameters leave where so many vocabulary rows stay; none go where the number is not given."""
    if rows is None:
        return 0
    return (vocabulary_rows(base.checkpoint, base.family) - rows) * row_parameters(base.checkpoint, base.family)


def added_parameters(base: ResolvedBase, layers: Sequence[LayerWidths]) -> int:
    """How many parameters every layer gains together, where the family is written as another once any heads change."""
    rewrite = base.family.when_heads_change
    pairs = zip(base.layers, layers, strict=True)
    if rewrite is None or all((s.query_heads, s.kv_heads) == (w.query_heads, w.kv_groups) for s, w in pairs):
        return 0
    return sum(shape.hidden * len(rewrite.zero_tensors) for shape in base.layers)


def removed_from_layer(base: ResolvedBase, index: int, widths: LayerWidths) -> int:
    """How many parameters leave one layer."""
    shape = base.layers[index]
    cost = {s: unit_parameters(base.checkpoint, base.family, shape, index, s) for s in Structure if shape.units(s)}
    total = cost.get(Structure.FFN, 0) * (shape.ffn - widths.ffn) * max(1, widths.experts)
    total += cost.get(Structure.EXPERTS, 0) * (shape.experts - widths.experts)
    total += cost[Structure.KV_GROUPS] * (shape.kv_heads - widths.kv_groups)
    return total + cost[Structure.QUERY_HEADS] * widths.kv_groups * (shape.heads_per_group - widths.heads_per_group)


def legal_ffn(shape: LayerShape, multiple_of: int, floor: float) -> list[int]:
    """FFN widths that may be kept, ascending; the base's own is always one of them."""
    least = max(1, math.ceil(floor * shape.ffn - 1e-9))
    return sorted({w for w in range(multiple_of, shape.ffn, multiple_of) if w >= least} | {shape.ffn})


def _kept_ffn(budget: Budget, shape: LayerShape) -> int:
    legal = legal_ffn(shape, budget.multiple_of, budget.floor)
    removed = budget.ffn
    if not removed:
        return shape.ffn
    rule = f"kept widths are multiples of {budget.multiple_of} and at least {budget.floor:g} of {shape.ffn}"
    largest = shape.ffn - legal[0]
    if isinstance(removed, int):
        if shape.ffn - removed not in legal:
            raise PlanError(
                f"budget.ffn: {removed} neurons cannot be removed ({rule}); {_nearest_counts(removed, legal)}"
            )
        return shape.ffn - removed
    if len(legal) == 1:
        raise PlanError(f"budget.ffn: nothing can be removed from {shape.ffn} neurons ({rule}); lower multiple_of")
    wanted = shape.ffn * (1 - removed)
    if wanted < legal[0] - budget.multiple_of / 2:
        raise PlanError(
            f"budget.ffn: {removed:g} is too much ({rule}); the largest legal one is {rounded_down(largest / shape.ffn)}"
        )
    kept = min(legal, key=lambda width: (abs(width - wanted), -width))
    if kept == shape.ffn:
        smallest = shape.ffn - legal[-2]
        raise PlanError(
            f"budget.ffn: {removed:g} removes nothing ({rule}); the smallest legal one is {smallest} neurons, "
            f"{smallest / shape.ffn:.4g}, or lower budget.multiple_of"
        )
    return kept


def _nearest_counts(removed: int, legal: list[int]) -> str:
    counts = sorted(legal[-1] - width for width in legal if width != legal[-1])
    if not counts:
        return "nothing can be removed: lower budget.multiple_of"
    near = sorted(sorted(counts, key=lambda count: abs(count - removed))[:2])
    return f"legal counts near it: {' and '.join(map(str, near))}; the largest is {counts[-1]}"


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


def _experts_for_parameters(wanted: float, budget: Budget, base: ResolvedBase, layer: LayerWidths) -> int:
    legal, total = legal_experts(base, budget.floor), base.checkpoint.parameters

    def removed(experts: int) -> int:
        layers = removed_parameters(base, Widths.same(replace(layer, experts=experts), len(base.layers)))
        return layers + removed_with_rows(base, wanted_rows(budget, base))

    for count in reversed(legal):
        if removed(count) >= wanted:
            return count
    raise PlanError(unreachable(wanted, removed(legal[0]), budget, total))


def _kept_groups(budget: Budget, base: ResolvedBase) -> int:
    shape = base.layers[0]

    def legal(removed: int) -> bool:
        return expressible(base, shape.heads_per_group, shape.kv_heads - removed)

    return shape.kv_heads - _whole_units(
        budget.kv_groups, shape.kv_heads, budget.floor, "kv_groups", "KV groups", legal
    )


def _kept_heads_per_group(budget: Budget, base: ResolvedBase, groups: int) -> int:
    shape = base.layers[0]
    removed, per_group = budget.query_heads, shape.heads_per_group
    if not removed:
        return per_group
    if per_group == 1:
        raise PlanError("budget.query_heads: each KV head has one query head here; use budget.kv_groups")
    if isinstance(removed, int):
        if removed % shape.kv_heads:
            counts = [n for n in range(per_group) if not n or expressible(base, per_group - n, groups)]
            named = ", ".join(str(n * shape.kv_heads) for n in counts)
            raise PlanError(
                f"budget.query_heads: {removed} of {shape.query_heads} is not the same number in each of "
                f"{shape.kv_heads} KV groups; legal: {named}"
            )
        removed = removed // shape.kv_heads

    def legal(count: int) -> bool:
        return expressible(base, per_group - count, groups)

    what = "query heads of each KV group"
    return per_group - _whole_units(removed, per_group, budget.floor, "query_heads", what, legal)


def _whole_units(removed: int | float, of: int, floor: float, key: str, what: str, legal: Callable[[int], bool]) -> int:
    """A count or fraction of `of` units as a count of removed ones; `legal` says which the config can express."""
    largest = of - max(1, math.ceil(floor * of - 1e-9))
    count = removed if isinstance(removed, int) else round(removed * of)
    if count > largest:
        raise PlanError(f"budget.{key}: at most {largest} of {of} {what} can be removed ({rounded_down(largest / of)})")
    if removed and not count:
        smallest = next((n for n in range(1, largest + 1) if legal(n)), None)
        hint = f"the smallest legal one is {smallest / of:.4g}" if smallest else "none can be removed here"
        raise PlanError(
            f"budget.{key}: {removed:g} of {of} {what} is less than half a unit and removes nothing; {hint}"
        )
    return count


def _ffn_for_parameters(wanted: float, budget: Budget, base: ResolvedBase, layer: LayerWidths) -> int:
    shape, total = base.layers[0], base.checkpoint.parameters
    legal = legal_ffn(shape, budget.multiple_of, budget.floor)

    def removed(width: int) -> int:
        layers = removed_parameters(base, Widths.same(replace(layer, ffn=width), len(base.layers)))
        return layers + removed_with_rows(base, wanted_rows(budget, base))

    for width in reversed(legal):
        if removed(width) >= wanted:
            return width
    raise PlanError(unreachable(wanted, removed(legal[0]), budget, total))


def unreachable(wanted: float, largest: int, budget: Budget, total: int) -> str:
    """The message for more parameters than can be removed."""
    hint = "with the heads as they are" if not budget.kv_groups else "with these heads"
    advice = "add budget.kv_groups, or lower budget.floor"
    if budget.max_parameters is not None:
        return (
            f"budget.max_parameters: {budget.max_parameters:,} cannot be reached; {hint}, the smallest legal one is "
            f"{total - largest:,}; {advice}"
        )
    return (
        f"budget.parameters: {wanted / total:g} of {total:,} parameters cannot be removed; {hint}, "
        f"the largest legal one is {rounded_down(largest / total)}; {advice}"
    )


def first_units(widths: LayerWidths, shape: LayerShape) -> KeptUnits:
    """Any units of the right number: enough to ask whether a config can say the widths."""
    heads = [
        group * shape.heads_per_group + head
        for group in range(widths.kv_groups)
        for head in range(widths.heads_per_group)
    ]
    ffn = [expert * shape.ffn + neuron for expert in range(max(1, widths.experts)) for neuron in range(widths.ffn)]
    return KeptUnits(tuple(ffn), tuple(heads), tuple(range(widths.kv_groups)), tuple(range(widths.experts)))
