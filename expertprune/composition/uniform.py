"""Widths that are the same in every layer: aligned, above the floor, and such that a stock config
can say them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from expertprune.composition.parameters import (
    removed_parameters,
    removed_with_rows,
    unreachable,
    wanted_parameters,
    wanted_rows,
)
from expertprune.composition.widths import (
    GONE_WIDTHS,
    LayerWidths,
    check_structures,
    common_shape,
    cuts_units,
    expressible,
    first_units,
    in_layer,
    least,
    legal_experts,
    legal_ffn,
    own_widths,
    removal,
    rounded_down,
    said,
    shareable,
)
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget
from expertprune.spec.values import Keep
from expertprune.units import LayerShape


def uniform_widths(budget: Budget, base: ResolvedBase, gone: Sequence[int] = ()) -> tuple[LayerWidths, ...]:
    """Legal widths, the same in every layer that stays, that meet a budget.

    A count must be legal as it stands. A fraction goes to the nearest legal width, and is refused
    where that would remove nothing. `parameters` is met from above by the smallest FFN cut that
    removes at least this fraction; `max_parameters` likewise. In a mixture whole routed experts go
    instead, or neurons inside them where the budget says how many routed experts go.

    Args:
        gone: the layers that go whole.

    Raises:
        PlanError: not reachable; the message names the nearest legal values.
    """
    if not cuts_units(budget):  # nothing goes of the layers that stay, so they need not be alike
        return tuple(own_widths(base, gone))
    shape = common_shape(base)
    whole = replace(shape, ffn=0, experts=0, expert_groups=1) if shape.experts else shape
    if set(base.layers) - {shape, whole}:
        raise PlanError(
            "compose.allocation: the layers of this base have different widths, so the same cut cannot be made in all of "
            "them; use allocation: global"
        )
    check_structures(budget, base)
    groups = _kept_groups(budget, base)
    heads = _kept_heads_per_group(budget, base, groups)
    layer = LayerWidths(_kept_ffn(budget, shape), heads, groups, _kept_experts(budget, base))
    wanted = wanted_parameters(budget, base)
    if wanted is not None:
        layer = _enough_parameters(wanted, budget, base, layer, gone)
    if layer.query_heads < least(shape.query_heads, budget.floor):
        raise PlanError(
            f"budget: kv_groups and query_heads together leave {layer.query_heads} of {shape.query_heads} query heads, "
            f"fewer than budget.floor ({budget.floor:g}) allows"
        )
    _check_heads(budget, shape, layer)
    widths = _everywhere(layer, base, gone)
    # The family's config must be able to say these widths: asked now, before any work.
    base.family.pruned_config(
        base.checkpoint.config, [first_units(*pair) for pair in zip(widths, base.layers, strict=True)]
    )
    return widths


def _everywhere(layer: LayerWidths, base: ResolvedBase, gone: Sequence[int]) -> tuple[LayerWidths, ...]:
    return tuple(GONE_WIDTHS if place in gone else in_layer(layer, shape) for place, shape in enumerate(base.layers))


def _check_heads(budget: Budget, shape: LayerShape, layer: LayerWidths) -> None:
    """Raises `PlanError` where the heads that stay cannot be shared among `budget.tensor_parallel` GPUs."""
    if shareable(budget, shape, layer.heads_per_group, layer.kv_groups):
        return
    legal = [
        f"{heads * groups} in {groups} KV groups"
        for groups in range(shape.kv_heads, 0, -1)
        for heads in range(shape.heads_per_group, 0, -1)
        if (heads, groups) != (shape.heads_per_group, shape.kv_heads) and shareable(budget, shape, heads, groups)
    ]
    raise PlanError(
        f"budget: {layer.query_heads} query heads in {layer.kv_groups} KV groups would stay, which cannot be shared among "
        f"{budget.tensor_parallel} GPUs (budget.tensor_parallel); legal: {'; '.join(legal[:4]) or 'no cut of heads'}"
    )


def _enough_parameters(
    wanted: float, budget: Budget, base: ResolvedBase, layer: LayerWidths, gone: Sequence[int]
) -> LayerWidths:
    """The layer with the most neurons, or routed experts, such that enough parameters go."""
    if base.family.has_ffn or budget.experts:
        legal = [replace(layer, ffn=width) for width in legal_ffn(common_shape(base), budget.ffn_step, budget.floor)]
    else:
        legal = [replace(layer, experts=count) for count in legal_experts(base, budget.floor)]
    rows = removed_with_rows(base, wanted_rows(budget, base))

    def removed(each: LayerWidths) -> int:
        return rows + removed_parameters(base, _everywhere(each, base, gone))

    for each in reversed(legal):
        if removed(each) >= wanted:
            return each
    raise PlanError(unreachable(wanted, removed(legal[0]), budget, base))


def _kept_ffn(budget: Budget, shape: LayerShape) -> int:
    legal = legal_ffn(shape, budget.ffn_step, budget.floor)
    removed = removal(budget.ffn, shape.ffn, "ffn")
    if not removed:
        return shape.ffn
    rule = f"kept widths are multiples of {budget.ffn_step} and at least {100 * budget.floor:.4g}% of {shape.ffn}"
    if isinstance(removed, int):
        if shape.ffn - removed not in legal:
            what = f"{said(budget.ffn)}: " if isinstance(budget.ffn, Keep) else ""
            raise PlanError(
                f"budget.ffn: {what}{removed} neurons cannot be removed ({rule}); "
                f"{_nearest_counts(removed, legal, isinstance(budget.ffn, Keep))}"
            )
        return shape.ffn - removed
    if len(legal) == 1:
        key = "floor" if len(legal_ffn(shape, budget.ffn_step, 0)) > 1 else "multiple_of"
        raise PlanError(f"budget.ffn: nothing can be removed from {shape.ffn} neurons ({rule}); lower budget.{key}")
    wanted = shape.ffn * (1 - removed)
    if wanted < legal[0] - budget.ffn_step / 2:
        largest = rounded_down((shape.ffn - legal[0]) / shape.ffn)
        raise PlanError(f"budget.ffn: {removed:g} is too much ({rule}); the largest legal one is {largest}")
    kept = min(legal, key=lambda width: (abs(width - wanted), -width))
    if kept == shape.ffn:
        smallest = shape.ffn - legal[-2]
        raise PlanError(
            f"budget.ffn: {removed:g} removes nothing ({rule}); the smallest legal one is {smallest} neurons, "
            f"{smallest / shape.ffn:.4g}, or lower budget.multiple_of"
        )
    return kept


def _nearest_counts(removed: int, legal: list[int], keep: bool) -> str:
    """The legal counts nearest to one that is not, as the user gave it: of what goes, or of what
    stays.
    """
    of, counts = legal[-1], sorted(legal[-1] - width for width in legal[:-1])
    if not counts:
        return "nothing can be removed: lower budget.multiple_of"
    near = sorted(sorted(counts, key=lambda count: abs(count - removed))[:2])
    if keep:
        return f"legal near it: {' and '.join(f'keep: {of - count}' for count in near)}"
    return f"legal counts near it: {' and '.join(map(str, near))}; the largest is {counts[-1]}"


def _kept_experts(budget: Budget, base: ResolvedBase) -> int:
    shape, legal = common_shape(base), legal_experts(base, budget.floor)
    of, groups = shape.experts, shape.expert_groups
    if not budget.experts:
        return of
    removed = removal(budget.experts, of, "experts")
    count = removed if isinstance(removed, int) else round(removed * of / groups) * groups
    largest, chosen = of - legal[0], base.family.experts_per_token(base.checkpoint.config)
    if count > largest:
        each = f", each of its {groups} groups keeps at least {legal[0] // groups}" if groups > 1 else ""
        raise PlanError(
            f"budget.experts: {count} of {of} routed experts cannot be removed: the router chooses {chosen} for each token"
            f"{each}, and budget.floor is {budget.floor:g}; at most {largest} can be ({rounded_down(largest / of)})"
        )
    if removed and not count:
        raise PlanError(
            f"budget.experts: {removed:g} of {of} is less than half a routed expert and removes nothing; the smallest "
            f"legal one is {groups / of:.4g}"
        )
    if count % groups:
        near = sorted({count - count % groups, min(count - count % groups + groups, largest)} - {0})
        raise PlanError(
            f"budget.experts: {count} of {of} routed experts is not the same number in each of the {groups} groups that the "
            f"router first chooses among; legal near it: {' and '.join(map(str, near))}"
        )
    return of - count


def _kept_groups(budget: Budget, base: ResolvedBase) -> int:
    shape = base.layers[0]
    if not budget.kv_groups:
        return shape.kv_heads

    def legal(removed: int) -> bool:
        return expressible(base, shape.heads_per_group, shape.kv_heads - removed)

    removed = removal(budget.kv_groups, shape.kv_heads, "kv_groups")
    return shape.kv_heads - _whole_units(removed, shape.kv_heads, budget.floor, "kv_groups", "KV groups", legal)


def _kept_heads_per_group(budget: Budget, base: ResolvedBase, groups: int) -> int:
    shape = base.layers[0]
    removed, per_group = removal(budget.query_heads, shape.query_heads, "query_heads"), shape.heads_per_group
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
    """A count or fraction of `of` units as a count of removed ones; `legal` says which the config
    can express.
    """
    largest = of - max(1, least(of, floor))
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
