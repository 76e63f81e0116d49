"""What a base's family allows to be cut at all, and which numbers of experts its router can work with."""

from __future__ import annotations

import math

from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget
from expertprune.units import Structure

ALIGNED = 8  # rows of 16 bytes in 16-bit weights, below which torch refuses grouped products


def check_structures(budget: Budget, base: ResolvedBase) -> None:
    """Raises `PlanError` where the budget names a structure that the base's family does not allow."""
    family = base.family
    allowed = ", ".join(each.value for each in family.structures)
    for structure in Structure:
        if getattr(budget, structure.value) and structure not in family.structures:
            why = f"heads of family {family.family!r} cannot be cut: {family.why_no_heads}"
            if structure is Structure.EXPERTS:
                why = f"layers of family {family.family!r} have none"
            raise PlanError(f"budget.{structure.value}: {why}; structures that can be cut: {allowed}")
    if family.has_ffn:
        return
    if _cuts_neurons(budget) and budget.multiple_of % ALIGNED:
        raise PlanError(
            f"budget.multiple_of: widths of experts are multiples of {ALIGNED}, which is what the products of many experts "
            f"at once need; {budget.multiple_of} is none"
        )
    if budget.retention is not None:
        raise PlanError(
            "budget.retention: tries widths of one FFN in each layer, and layers of this base have experts; give "
            "budget.experts, budget.ffn or budget.parameters"
        )


def _cuts_neurons(budget: Budget) -> bool:
    """Whether neurons inside experts go: by their number, or to make up parameters where experts have theirs."""
    return bool(budget.ffn) or (budget.overall and bool(budget.experts))


def check_uniform(budget: Budget, base: ResolvedBase) -> None:
    """Raises `PlanError` where experts would be cut and layers shall have widths of their own."""
    if not base.family.has_ffn and (budget.experts or budget.ffn or budget.overall):
        raise PlanError(
            "compose.allocation: every layer keeps the same number of experts and of neurons in each, which are one number "
            "each in the config; leave allocation out, or use allocation: uniform"
        )


def legal_experts(base: ResolvedBase, floor: float) -> list[int]:
    """Numbers of experts that a layer may keep, ascending: no fewer than the router chooses for each token."""
    of = base.layers[0].experts
    least = max(base.family.experts_per_token(base.checkpoint.config), math.ceil(floor * of - 1e-9))
    return list(range(least, of + 1))


def kept_experts(budget: Budget, base: ResolvedBase) -> int:
    """How many experts every layer keeps."""
    of, legal = base.layers[0].experts, legal_experts(base, budget.floor)
    if not budget.experts:
        return of
    count = budget.experts if isinstance(budget.experts, int) else round(budget.experts * of)
    largest, chosen = of - legal[0], base.family.experts_per_token(base.checkpoint.config)
    if count > largest:
        raise PlanError(
            f"budget.experts: {count} of {of} experts cannot be removed: the router chooses {chosen} for each token, and "
            f"budget.floor is {budget.floor:g}; at most {largest} can be ({rounded_down(largest / of)})"
        )
    if not count:
        raise PlanError(
            f"budget.experts: {budget.experts:g} of {of} is less than half an expert and removes nothing; the smallest "
            f"legal one is {1 / of:.4g}"
        )
    return of - count


def rounded_down(fraction: float) -> str:
    """Rounded so that the number, typed in, is legal."""
    return f"{math.floor(fraction * 1e4) / 1e4:g}"
