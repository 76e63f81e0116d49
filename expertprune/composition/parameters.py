"""How many parameters a budget wants removed, and how many go with units and vocabulary rows."""

from __future__ import annotations

from collections.abc import Sequence

from expertprune.composition.widths import LayerWidths, rounded_down
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.costs import layer_parameters, row_parameters, unit_parameters
from expertprune.models.inventory import vocabulary_rows
from expertprune.spec.schema import Budget
from expertprune.spec.values import Coverage, Keep, Remove
from expertprune.units import ROW_MULTIPLE, Structure


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


def aligned(rows: int) -> int:
    """The next multiple of `ROW_MULTIPLE`."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def wanted_rows(budget: Budget, base: ResolvedBase) -> int | None:
    """How many vocabulary rows are written, as far as the budget itself says: not for a coverage.

    What stays of a count goes up to the next multiple of `ROW_MULTIPLE`, a fraction to the nearest.

    Raises:
        PlanError: that would be no cut.
        CheckpointError: the base's vocabulary disagrees with its config.
    """
    asked = budget.vocabulary
    if asked is None or isinstance(asked, Coverage):
        return None
    of = vocabulary_rows(base.checkpoint, base.family)
    if isinstance(asked, Keep):
        rows = aligned(asked.keep)
    elif isinstance(asked, Remove):
        rows = aligned(max(0, of - asked.remove))
    else:
        rows = max(1, round(of * (1 - asked) / ROW_MULTIPLE)) * ROW_MULTIPLE
    if rows >= of:
        raise PlanError(
            f"budget.vocabulary: nothing would go: the base has {of:,} rows, and {rows:,} would stay "
            f"(a multiple of {ROW_MULTIPLE})"
        )
    return rows


def removed_with_rows(base: ResolvedBase, rows: int | None) -> int:
    """How many parameters leave where so many vocabulary rows stay; none go where the number is not
    given.
    """
    if rows is None:
        return 0
    return (vocabulary_rows(base.checkpoint, base.family) - rows) * row_parameters(base.checkpoint, base.family)


def removed_parameters(base: ResolvedBase, widths: Sequence[LayerWidths]) -> int:
    """How many parameters leave the layers of the whole model, less what it gains."""
    gone = sum(removed_from_layer(base, index, layer) for index, layer in enumerate(widths))
    return gone - added_parameters(base, widths)


def removed_from_layer(base: ResolvedBase, index: int, widths: LayerWidths) -> int:
    """How many parameters leave one layer."""
    if widths.gone:
        return layer_parameters(base.checkpoint, base.family, index)
    shape = base.layers[index]
    cost = {s: unit_parameters(base.checkpoint, base.family, shape, index, s) for s in Structure if shape.units(s)}
    total = cost.get(Structure.FFN, 0) * (shape.ffn - widths.ffn) * max(1, widths.experts)
    total += cost.get(Structure.EXPERTS, 0) * (shape.experts - widths.experts)
    total += cost.get(Structure.KV_GROUPS, 0) * (shape.kv_heads - widths.kv_groups)
    heads = widths.kv_groups * (shape.heads_per_group - widths.heads_per_group)
    return total + cost.get(Structure.QUERY_HEADS, 0) * heads


def added_parameters(base: ResolvedBase, layers: Sequence[LayerWidths]) -> int:
    """How many parameters every layer gains together, where the family is written as another once
    any heads change.
    """
    rewrite = base.family.when_heads_change
    pairs = [(shape, widths) for shape, widths in zip(base.layers, layers, strict=True) if not widths.gone]
    if rewrite is None or all((s.query_heads, s.kv_heads) == (w.query_heads, w.kv_groups) for s, w in pairs):
        return 0
    return sum(shape.hidden * len(rewrite.zero_tensors) for shape, _ in pairs)


def unreachable(wanted: float, largest: int, budget: Budget, base: ResolvedBase, heads: bool = False) -> str:
    """The message for more parameters than can be removed; `heads` says that KV groups compete for them."""
    total, family = base.checkpoint.parameters, base.family
    hint = "with these heads" if budget.kv_groups else "with the heads as they are"
    if heads:
        hint = "of FFN neurons and KV groups together"
    whole = family.experts is not None and not family.why_no_neurons  # neurons meet what whole experts leave
    more = {"kv_groups": family.heads_are_units and not heads, "experts": whole, "layers": True}
    ways = [f"budget.{key}" for key, legal in more.items() if legal and not getattr(budget, key)]
    ways += ["budget.vocabulary"] if budget.vocabulary is None else []
    advice = f"add {' or '.join(ways)}" if ways else "remove less"
    if budget.floor and family.experts is None:
        advice += ", or lower budget.floor"
    if budget.max_parameters is not None:
        return (
            f"budget.max_parameters: {budget.max_parameters:,} cannot be reached; {hint}, the smallest legal one is "
            f"{total - largest:,}; {advice}"
        )
    return (
        f"budget.parameters: {wanted / total:g} of {total:,} parameters cannot be removed; {hint}, "
        f"the largest legal one is {rounded_down(largest / total)}; {advice}"
    )
