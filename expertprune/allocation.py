"""How many units each layer keeps: one ranking over layers and structures, or a search over widths."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from expertprune.budgets import (
    LayerWidths,
    Widths,
    expressible,
    legal_ffn,
    removed_from_layer,
    removed_parameters,
    resolve_budget,
    unreachable,
    wanted_parameters,
)
from expertprune.errors import PlanError
from expertprune.models import BaseModel
from expertprune.scoring import Fused
from expertprune.spec import Budget, Search
from expertprune.units import Structure

Scores = Mapping[Structure, Sequence[Fused]]
Fitness = Callable[[Widths], float]
_FIELD = {Structure.FFN: "ffn", Structure.QUERY_HEADS: "heads_per_group", Structure.KV_GROUPS: "kv_groups"}


@dataclass(frozen=True)
class Step:
    """One legal step of a layer's width: from a legal width to the next smaller one.

    `price` is what the units that go are worth, per parameter; along a layer's steps it never falls.
    """

    price: float
    layer: int
    structure: Structure
    width: int
    parameters: int
    units: int


def legal_widths(base: BaseModel, budget: Budget, layer: int, structure: Structure) -> list[int]:
    """Widths of a structure that one layer may keep, descending from its own; heads as heads of each KV group."""
    shape = base.layers[layer]
    if structure is Structure.FFN:
        return legal_ffn(shape, budget.multiple_of, budget.floor)[::-1]
    own = shape.kv_heads if structure is Structure.KV_GROUPS else shape.heads_per_group
    least = max(1, math.ceil(budget.floor * own - 1e-9))

    def can_say(width: int) -> bool:
        heads, groups = (shape.heads_per_group, width) if structure is Structure.KV_GROUPS else (width, shape.kv_heads)
        return expressible(base, heads, groups)

    return [own, *(width for width in range(own - 1, least - 1, -1) if can_say(width))]


def steps(base: BaseModel, budget: Budget, scores: Scores, structure: Structure) -> list[Step]:
    """Every step of a structure in every layer, cheapest price first.

    Within a layer the least relevant units go first, so a larger budget never keeps what a smaller one dropped.
    """
    found = []
    for layer, (shape, fused) in enumerate(zip(base.layers, scores[structure], strict=True)):
        score = fused.score.double()
        if structure is Structure.QUERY_HEADS:  # the n-th head of every KV group goes at once
            score = score.unflatten(0, (shape.kv_heads, -1)).sort(1).values.sum(0)
        ordered = score.sort().values
        cost = base.checkpoint.unit_parameters(base.family, shape, layer, structure)
        cost *= shape.kv_heads if structure is Structure.QUERY_HEADS else 1
        widths = legal_widths(base, budget, layer, structure)
        highest = -math.inf
        for wide, narrow in itertools.pairwise(widths):
            gone = ordered[widths[0] - wide : widths[0] - narrow]
            worth = float(gone.mean())
            # Scores below zero (distances from a mean) are ranked as they are: dividing would turn their order round.
            price = worth / cost if float(ordered[0]) >= 0 else worth
            highest = max(highest, price)
            found.append(Step(highest, layer, structure, narrow, cost * (wide - narrow), wide - narrow))
    return sorted(found, key=lambda step: (step.price, step.layer, -step.width))


def global_widths(budget: Budget, base: BaseModel, scores: Scores, part: float = 1.0) -> Widths:
    """Widths of every layer from one ranking by score per parameter, with floors.

    A fraction or count of a structure is met over the whole model: as many units go as if every layer lost it. With
    `parameters` or `max_parameters`, FFN neurons and KV groups stand in one ranking.

    Args:
        scores: of every structure that may be cut.
        part: of the budget, for cutting in rounds.

    Raises:
        PlanError: not reachable; the message names the largest legal value.
    """
    layers = [LayerWidths(shape.ffn, shape.heads_per_group, shape.kv_heads) for shape in base.layers]
    for structure in (Structure.KV_GROUPS, Structure.QUERY_HEADS, Structure.FFN):
        amount = getattr(budget, structure.value)
        if amount:
            ranked = steps(base, budget, scores, structure)
            _take_units(layers, ranked, _wanted_units(base, structure, amount) * part, structure)
    wanted = wanted_parameters(budget, base)
    if wanted is not None:
        every = steps(base, budget, scores, Structure.FFN)
        if not budget.kv_groups and Structure.KV_GROUPS in scores:
            every = sorted(every + steps(base, budget, scores, Structure.KV_GROUPS), key=lambda step: step.price)
        removed = sum(removed_from_layer(base, index, layer) for index, layer in enumerate(layers))
        for step in every:
            if removed >= wanted * part:
                break
            before = removed_from_layer(base, step.layer, layers[step.layer])
            layers[step.layer] = replace(layers[step.layer], **{_FIELD[step.structure]: step.width})
            removed += removed_from_layer(base, step.layer, layers[step.layer]) - before
        if removed < wanted * part:
            raise PlanError(unreachable(wanted, removed, budget, base.checkpoint.parameters))
    requested = budget.model_dump(include={"ffn", "query_heads", "kv_groups", "parameters", "max_parameters"})
    return Widths(tuple(layers), requested)


def _wanted_units(base: BaseModel, structure: Structure, amount: int | float) -> float:
    own = [
        shape.heads_per_group if structure is Structure.QUERY_HEADS else shape.units(structure) for shape in base.layers
    ]
    if isinstance(amount, float):
        return amount * sum(own)
    per_group = base.layers[0].kv_heads if structure is Structure.QUERY_HEADS else 1
    return amount / per_group * len(own)


def _take_units(layers: list[LayerWidths], ranked: list[Step], wanted: float, structure: Structure) -> None:
    """Go down the ranking until as many units as wanted are gone, to the nearest step."""
    possible = sum(step.units for step in ranked)
    smallest = min((step.units for step in ranked), default=0)
    if wanted > possible + smallest / 2 or not ranked:
        raise PlanError(
            f"budget.{structure.value}: {wanted:g} units over all layers cannot be removed; at most {possible} can "
            "(floor, multiple_of and what the config can say)"
        )
    removed = 0
    for step in ranked:
        if removed + step.units / 2 > wanted:
            break
        layers[step.layer] = replace(layers[step.layer], **{_FIELD[structure]: step.width})
        removed += step.units


# --- search ---------------------------------------------------------------------------------------------------------


def search_widths(
    budget: Budget,
    base: BaseModel,
    starts: Sequence[Widths],
    fitness: Fitness,
    settings: Search,
    structures: Sequence[Structure],
) -> tuple[Widths, list[float]]:
    """Evolve widths under the starts' budget, one child at a time from the best so far (a (1+1) evolution strategy).

    A child moves one to three legal steps from one place to another, a place being a structure of a layer, so that at
    least as many parameters are gone as in the first start and, within one step, no more.

    Args:
        starts: tried first; the first says how many parameters must go.
        fitness: smaller is better, such as the divergence from the base's predictions.
        structures: whose widths may move.

    Returns:
        The best widths, and the fitness of each trial in order.
    """
    generator = random.Random(settings.seed)
    wanted = removed_parameters(base, starts[0])
    trials: list[float] = []
    best, best_fitness = starts[0], math.inf
    for start in starts:
        trials.append(fitness(start))
        if trials[-1] < best_fitness:
            best, best_fitness = start, trials[-1]
    seen = set(starts)
    while len(trials) < settings.trials:
        children = (_child(best, base, budget, wanted, structures, generator) for _ in range(200))
        child = next((child for child in children if child not in seen), None)
        if child is None:
            break
        seen.add(child)
        trials.append(fitness(child))
        if trials[-1] < best_fitness:
            best, best_fitness = child, trials[-1]
    return best, trials


def _child(
    parent: Widths,
    base: BaseModel,
    budget: Budget,
    wanted: int,
    structures: Sequence[Structure],
    generator: random.Random,
) -> Widths:
    layers = list(parent.layers)
    for _ in range(generator.randint(1, 3)):
        _move(layers, base, budget, generator.choice(structures), down=True, generator=generator)
    for _ in range(64):  # give back what is more than wanted, anywhere
        before = list(layers)
        _move(layers, base, budget, generator.choice(structures), down=False, generator=generator)
        removed = sum(removed_from_layer(base, index, layer) for index, layer in enumerate(layers))
        if removed < wanted:
            return Widths(tuple(before), parent.requested)
        if removed == wanted:
            break
    return Widths(tuple(layers), parent.requested)


def _move(
    layers: list[LayerWidths],
    base: BaseModel,
    budget: Budget,
    structure: Structure,
    down: bool,
    generator: random.Random,
) -> None:
    """One legal step of a random layer's structure, down or up; nothing where there is none."""
    layer = generator.randrange(len(layers))
    widths = legal_widths(base, budget, layer, structure)
    present = getattr(layers[layer], _FIELD[structure])
    smaller, larger = [w for w in widths if w < present], [w for w in widths if w > present]
    new = max(smaller, default=present) if down else min(larger, default=present)
    layers[layer] = replace(layers[layer], **{_FIELD[structure]: new})


def uniform_candidates(budget: Budget, base: BaseModel) -> list[Widths]:
    """Every way to meet a budget of parameters with the same widths in all layers: FFN against KV groups."""
    found = []
    for width in legal_widths(base, budget, 0, Structure.KV_GROUPS):
        other = budget.model_copy(update={"kv_groups": base.layers[0].kv_heads - width})
        with contextlib.suppress(PlanError):
            found.append(resolve_budget(other, base))
    return found


def uniform_part(widths: Widths, base: BaseModel, budget: Budget, part: float) -> Widths:
    """Uniform widths that are `part` of the way from the base to `widths`, on legal widths, for cutting in rounds."""
    final, shape = widths.layers[0], base.layers[0]

    def between(own: int, last: int, structure: Structure) -> int:
        wanted = own - (own - last) * part
        legal = [width for width in legal_widths(base, budget, 0, structure) if width >= last]
        return min([*legal, last], key=lambda width: (abs(width - wanted), -width))

    layer = LayerWidths(
        between(shape.ffn, final.ffn, Structure.FFN),
        between(shape.heads_per_group, final.heads_per_group, Structure.QUERY_HEADS),
        between(shape.kv_heads, final.kv_groups, Structure.KV_GROUPS),
    )
    return Widths.same(layer, len(base.layers), widths.requested)
