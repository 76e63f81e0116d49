"""How many units each layer keeps, from one ranking over layers and structures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from expertprune.composition.parameters import (
    added_parameters,
    removed_from_layer,
    removed_with_rows,
    unreachable,
    wanted_parameters,
    wanted_rows,
)
from expertprune.composition.scoring import Fused
from expertprune.composition.widths import (
    FIELDS,
    LayerWidths,
    check_own_widths,
    check_structures,
    legal_widths,
    narrowed,
    own_widths,
    removal,
    rounded_down,
    said,
)
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.costs import unit_parameters
from expertprune.spec.schema import Budget
from expertprune.spec.values import Keep
from expertprune.units import LayerShape, Structure

FusedScores = Mapping[Structure, Sequence[Fused]]


@dataclass(frozen=True)
class WidthStep:
    """One legal step of a layer's width: from a legal width to the next smaller one.

    `price` is what the units that go are worth, per parameter; along a layer's steps it never
    falls.
    """

    price: float
    layer: int
    structure: Structure
    width: int
    parameters: int
    units: int


def steps(base: ResolvedBase, budget: Budget, scores: FusedScores, *structures: Structure) -> list[WidthStep]:
    """Every step of some structures in every layer, cheapest price first.

    Within a layer the least relevant units go first, so a larger budget never keeps what a smaller
    one dropped. Where some score is below zero (a distance from a mean), no price is per parameter:
    dividing would turn the order of such scores round.
    """
    every = [fused.score for structure in structures for fused in scores[structure]]
    per_parameter = not any(bool((score < 0).any()) for score in every)
    found = [step for structure in structures for step in _steps(base, budget, scores, structure, per_parameter)]
    return sorted(found, key=lambda step: (step.price, step.layer, -step.width))


def _steps(
    base: ResolvedBase, budget: Budget, scores: FusedScores, structure: Structure, per_parameter: bool
) -> Iterator[WidthStep]:
    """The steps of one structure, those of each layer from its own width down."""
    for layer, (shape, fused) in enumerate(zip(base.layers, scores[structure], strict=True)):
        score = fused.score.double()
        if structure is Structure.QUERY_HEADS:  # the n-th head of every KV group goes at once
            score = score.unflatten(0, (shape.kv_heads, -1)).sort(1).values.sum(0)
        ordered = score.sort().values
        cost = unit_parameters(base.checkpoint, base.family, shape, layer, structure)
        cost *= shape.kv_heads if structure is Structure.QUERY_HEADS else 1
        widths = legal_widths(base, budget, layer, structure)
        highest = -math.inf
        for wide, narrow in itertools.pairwise(widths):
            gone = ordered[widths[0] - wide : widths[0] - narrow]
            worth = float(gone.mean())
            highest = max(highest, worth / cost if per_parameter else worth)
            yield WidthStep(highest, layer, structure, narrow, cost * (wide - narrow), wide - narrow)


def global_widths(
    budget: Budget, base: ResolvedBase, scores: FusedScores, gone: Sequence[int] = ()
) -> tuple[LayerWidths, ...]:
    """Widths of every layer from one ranking by score per parameter, with floors.

    A fraction or count of a structure is met over all layers that stay: as many units go as if each
    of them lost it. With `parameters` or `max_parameters`, FFN neurons and KV groups stand in one
    ranking.

    Args:
        scores: of every structure that may be cut.
        gone: the layers that go whole.

    Raises:
        PlanError: not reachable; the message names the largest legal value.
    """
    check_structures(budget, base)
    check_own_widths(budget, base)
    layers = own_widths(base, gone)
    for structure in (Structure.KV_GROUPS, Structure.QUERY_HEADS, Structure.FFN):
        if getattr(budget, structure.value):
            _take_units(layers, base, budget, steps(base, budget, scores, structure), structure)
    wanted = wanted_parameters(budget, base)
    if wanted is not None:
        heads = not budget.kv_groups and Structure.KV_GROUPS in scores  # compete with neurons
        every = steps(base, budget, scores, Structure.FFN, *([Structure.KV_GROUPS] if heads else []))
        rows = removed_with_rows(base, wanted_rows(budget, base))
        removed = rows + sum(removed_from_layer(base, index, layer) for index, layer in enumerate(layers))
        for step in every:
            if removed - added_parameters(base, layers) >= wanted:
                break
            narrow = _narrowed(base, budget, layers, step)
            if narrow is not None:
                removed -= removed_from_layer(base, step.layer, layers[step.layer])
                removed += removed_from_layer(base, step.layer, narrow)
                layers[step.layer] = narrow
        removed -= added_parameters(base, layers)
        if removed < wanted:
            raise PlanError(unreachable(wanted, removed, budget, base, heads))
    return tuple(layers)


def _wanted_units(shapes: Sequence[LayerShape], structure: Structure, amount: int | float | Keep) -> float:
    """How many units are to go over all layers that stay."""
    own = sum(shape.units(structure) for shape in shapes)
    if isinstance(amount, float):
        return amount * own
    if isinstance(amount, int):
        return amount * len(shapes)
    removal(amount, own // len(shapes), structure.value)  # raises where so many cannot stay
    return own - amount.keep * len(shapes)


def _narrowed(base: ResolvedBase, budget: Budget, layers: Sequence[LayerWidths], step: WidthStep) -> LayerWidths | None:
    """What a layer keeps after a step; `None` where it is as narrow already, or may not be."""
    present = layers[step.layer]
    if getattr(present, FIELDS[step.structure]) <= step.width:
        return None
    return narrowed(base, budget, step.layer, present, step.structure, step.width)


def _take_units(
    layers: list[LayerWidths], base: ResolvedBase, budget: Budget, ranked: list[WidthStep], structure: Structure
) -> None:
    """Go down the ranking until as many units as wanted are gone, to the nearest step."""
    field, amount = FIELDS[structure], getattr(budget, structure.value)
    staying = [shape for shape, layer in zip(base.layers, layers, strict=True) if not layer.gone]
    wanted = _wanted_units(staying, structure, amount)
    own = sum(shape.units(structure) for shape in staying)
    # A step of heads takes as many of every KV group that the layer had.
    each = [shape.kv_heads if structure is Structure.QUERY_HEADS else 1 for shape in base.layers]
    removed = own - sum(number * getattr(layer, field) for number, layer in zip(each, layers, strict=True))
    smallest = 0
    for step in ranked:
        narrow = _narrowed(base, budget, layers, step)
        if narrow is None:
            continue
        smallest = each[step.layer] * (getattr(layers[step.layer], field) - step.width)
        if removed + smallest / 2 > wanted:
            break
        layers[step.layer] = narrow
        removed += smallest
    else:
        if wanted > removed + smallest / 2:
            largest = (
                f"the largest legal one is {rounded_down(removed / own)} removed, {removed} of {own}"
                if removed
                else "nothing can be removed"
            )
            raise PlanError(
                f"budget.{structure.value}: {said(amount)} is too much; {largest} (by budget.floor, budget.multiple_of "
                "and what the config can say)"
            )
    if not removed:
        raise PlanError(
            f"budget.{structure.value}: {said(amount)} removes nothing; the smallest legal one is {smallest / own:.4g} "
            f"removed, {smallest} of {own}"
        )
