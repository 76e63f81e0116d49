"""How many units each layer keeps: one ranking over layers and structures, or a search over widths."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from expertprune.composition.budget import (
    LayerWidths,
    Widths,
    added_parameters,
    expressible,
    legal_ffn,
    removed_from_layer,
    removed_parameters,
    removed_with_rows,
    resolve_budget,
    unreachable,
    wanted_parameters,
    wanted_rows,
)
from expertprune.composition.legality import check_structures, check_uniform, legal_experts, rounded_down
from expertprune.composition.scoring import Fused
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget, Search
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


def legal_widths(base: ResolvedBase, budget: Budget, layer: int, structure: Structure) -> list[int]:
    """Widths of a structure that one layer may keep, descending from its own; heads as heads of each KV group."""
    shape = base.layers[layer]
    if structure is Structure.FFN:
        return legal_ffn(shape, budget.multiple_of, budget.floor)[::-1]
    if structure is Structure.EXPERTS:
        return legal_experts(base, budget.floor)[::-1]
    own = shape.kv_heads if structure is Structure.KV_GROUPS else shape.heads_per_group
    least = max(1, math.ceil(budget.floor * own - 1e-9))

    def can_say(width: int) -> bool:
        heads, groups = (shape.heads_per_group, width) if structure is Structure.KV_GROUPS else (width, shape.kv_heads)
        return expressible(base, heads, groups)

    return [own, *(width for width in range(own - 1, least - 1, -1) if can_say(width))]


def steps(base: ResolvedBase, budget: Budget, scores: Scores, structure: Structure) -> list[Step]:
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


def may_keep(base: ResolvedBase, budget: Budget, layer: int, widths: LayerWidths) -> bool:
    """Whether the heads and groups of a layer, each of them legal, are legal together."""
    least = math.ceil(budget.floor * base.layers[layer].query_heads - 1e-9)
    return widths.query_heads >= least and expressible(base, widths.heads_per_group, widths.kv_groups)


def global_widths(
    budget: Budget,
    base: ResolvedBase,
    scores: Scores,
    part: float = 1.0,
    earlier: Sequence[LayerWidths] | None = None,
) -> Widths:
    """Widths of every layer from one ranking by score per parameter, with floors.

    A fraction or count of a structure is met over the whole model: as many units go as if every layer lost it. With
    `parameters` or `max_parameters`, FFN neurons and KV groups stand in one ranking.

    Args:
        scores: of every structure that may be cut.
        part: of the budget, for cutting in rounds.
        earlier: widths of the previous round, from which this one goes on.

    Raises:
        PlanError: not reachable; the message names the largest legal value.
    """
    check_structures(budget, base)
    check_uniform(budget, base)
    layers = list(earlier or _own_widths(base))
    for structure in (Structure.KV_GROUPS, Structure.QUERY_HEADS, Structure.FFN):
        if getattr(budget, structure.value):
            _take_units(layers, base, budget, steps(base, budget, scores, structure), structure, part)
    wanted = wanted_parameters(budget, base)
    if wanted is not None:
        every = steps(base, budget, scores, Structure.FFN)
        if not budget.kv_groups and Structure.KV_GROUPS in scores:
            every = sorted(every + steps(base, budget, scores, Structure.KV_GROUPS), key=lambda step: step.price)
        rows = removed_with_rows(base, wanted_rows(budget, base))
        gone = rows + sum(removed_from_layer(base, index, layer) for index, layer in enumerate(layers))
        for step in every:
            if gone - added_parameters(base, layers) >= wanted * part:
                break
            narrow = _narrowed(base, budget, layers, step)
            if narrow is not None:
                gone -= removed_from_layer(base, step.layer, layers[step.layer])
                gone += removed_from_layer(base, step.layer, narrow)
                layers[step.layer] = narrow
        removed = gone - added_parameters(base, layers)
        if removed < wanted * part:
            raise PlanError(unreachable(wanted, removed, budget, base.checkpoint.parameters))
    requested = budget.model_dump(include={"ffn", "query_heads", "kv_groups", "parameters", "max_parameters"})
    return Widths(tuple(layers), requested)


def _wanted_units(base: ResolvedBase, structure: Structure, amount: int | float) -> float:
    own = [
        shape.heads_per_group if structure is Structure.QUERY_HEADS else shape.units(structure) for shape in base.layers
    ]
    if isinstance(amount, float):
        return amount * sum(own)
    per_group = base.layers[0].kv_heads if structure is Structure.QUERY_HEADS else 1
    return amount / per_group * len(own)


def _own_widths(base: ResolvedBase) -> list[LayerWidths]:
    return [LayerWidths(shape.ffn, shape.heads_per_group, shape.kv_heads, shape.experts) for shape in base.layers]


def _narrowed(base: ResolvedBase, budget: Budget, layers: Sequence[LayerWidths], step: Step) -> LayerWidths | None:
    """What a layer keeps after a step; `None` where it is as narrow already, or may not be."""
    present = layers[step.layer]
    narrow = replace(present, **{_FIELD[step.structure]: step.width})
    if getattr(present, _FIELD[step.structure]) <= step.width:
        return None
    if step.structure is not Structure.FFN and not may_keep(base, budget, step.layer, narrow):
        return None
    return narrow


def _take_units(
    layers: list[LayerWidths], base: ResolvedBase, budget: Budget, ranked: list[Step], structure: Structure, part: float
) -> None:
    """Go down the ranking until as many units as wanted are gone, to the nearest step."""
    field, amount = _FIELD[structure], getattr(budget, structure.value)
    wanted = _wanted_units(base, structure, amount) * part
    own = sum(getattr(layer, field) for layer in _own_widths(base))
    removed = own - sum(getattr(layer, field) for layer in layers)
    smallest = 0
    for step in ranked:
        narrow = _narrowed(base, budget, layers, step)
        if narrow is None:
            continue
        smallest = getattr(layers[step.layer], field) - step.width
        if removed + smallest / 2 > wanted:
            break
        layers[step.layer] = narrow
        removed += smallest
    else:
        if wanted > removed + smallest / 2:
            largest = f"the largest legal one is {rounded_down(removed / own)}" if removed else "nothing can be removed"
            raise PlanError(
                f"budget.{structure.value}: {amount:g} is too much (floor, multiple_of and what the config can say); "
                f"{largest}"
            )
    if part == 1 and not removed:
        raise PlanError(
            f"budget.{structure.value}: {amount:g} removes nothing; the smallest legal one is {smallest / own:.4g}"
        )


# --- search ---------------------------------------------------------------------------------------------------------


def search_widths(
    budget: Budget,
    base: ResolvedBase,
    starts: Sequence[Widths],
    fitness: Fitness,
    settings: Search,
    structures: Sequence[Structure],
    ceiling: Sequence[LayerWidths] | None = None,
) -> tuple[Widths, list[float]]:
    """Evolve widths under the starts' budget, one child at a time from the best so far (a (1+1) evolution strategy).

    A child moves one to three legal steps from one place to another, a place being a structure of a layer, so that at
    least as many parameters are gone as in the first start and, within one step, no more.

    Args:
        starts: tried first; the first says how many parameters must go.
        fitness: smaller is better, such as the divergence from the base's predictions.
        structures: whose widths may move.
        ceiling: what each layer may keep at most, where it was cut before.

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
    space = _Space(base, budget, structures, ceiling)
    while len(trials) < settings.trials:
        children = (_child(best, base, space, wanted, generator) for _ in range(200))
        child = next((child for child in children if child not in seen), None)
        if child is None:
            break
        seen.add(child)
        trials.append(fitness(child))
        if trials[-1] < best_fitness:
            best, best_fitness = child, trials[-1]
    return best, trials


class _Space:
    """The widths that a search may try."""

    def __init__(
        self,
        base: ResolvedBase,
        budget: Budget,
        structures: Sequence[Structure],
        ceiling: Sequence[LayerWidths] | None,
    ) -> None:
        self.structures, self.layers = structures, len(base.layers)
        self._base, self._budget = base, budget
        most = ceiling or _own_widths(base)
        self._legal = {
            (layer, structure): [
                width
                for width in legal_widths(base, budget, layer, structure)
                if width <= getattr(most[layer], _FIELD[structure])
            ]
            for layer in range(self.layers)
            for structure in structures
        }
        self._together: dict[tuple[int, int, int], bool] = {}

    def move(self, layers: list[LayerWidths], down: bool, generator: random.Random) -> None:
        """One legal step of a random layer's structure, down or up; nothing where there is none."""
        structure, layer = generator.choice(self.structures), generator.randrange(self.layers)
        present = getattr(layers[layer], _FIELD[structure])
        widths = self._legal[layer, structure]
        smaller, larger = [w for w in widths if w < present], [w for w in widths if w > present]
        new = max(smaller, default=present) if down else min(larger, default=present)
        moved = replace(layers[layer], **{_FIELD[structure]: new})
        if structure is Structure.FFN or self._may_keep(layer, moved):
            layers[layer] = moved

    def _may_keep(self, layer: int, widths: LayerWidths) -> bool:
        key = (layer, widths.heads_per_group, widths.kv_groups)
        if key not in self._together:
            self._together[key] = may_keep(self._base, self._budget, layer, widths)
        return self._together[key]


def _child(parent: Widths, base: ResolvedBase, space: _Space, wanted: int, generator: random.Random) -> Widths:
    layers = list(parent.layers)
    for _ in range(generator.randint(1, 3)):
        space.move(layers, down=True, generator=generator)
    for _ in range(64):  # give back what is more than wanted, anywhere
        before = list(layers)
        space.move(layers, down=False, generator=generator)
        removed = removed_parameters(base, Widths(tuple(layers), {}))
        if removed < wanted:
            return Widths(tuple(before), parent.requested)
        if removed == wanted:
            break
    return Widths(tuple(layers), parent.requested)


def uniform_candidates(budget: Budget, base: ResolvedBase) -> list[Widths]:
    """Every way to meet a budget of parameters with the same widths in all layers: FFN against KV groups.

    Where the budget itself says which structure goes, that is the only way.

    Raises:
        PlanError: there is none.
    """
    check_uniform(budget, base)
    if budget.kv_groups or wanted_parameters(budget, base) is None:
        return [resolve_budget(budget, base)]
    found = []
    for width in legal_widths(base, budget, 0, Structure.KV_GROUPS):
        other = budget.model_copy(update={"kv_groups": base.layers[0].kv_heads - width})
        with contextlib.suppress(PlanError):
            found.append(resolve_budget(other, base))
    return found or [resolve_budget(budget, base)]


def uniform_part(widths: Widths, base: ResolvedBase, budget: Budget, part: float) -> Widths:
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
        between(shape.experts, final.experts, Structure.EXPERTS),
    )
    return Widths.same(layer, len(base.layers), widths.requested)
