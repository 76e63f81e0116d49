"""Widths of every layer: against a greedy ranking in plain Python, and what no budget may break."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from expertprune.composition.parameters import removed_parameters
from expertprune.composition.plan import foreseen_widths, select_layer
from expertprune.composition.ranking import WidthStep, global_widths, steps
from expertprune.composition.scoring import Fused
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import LayerWidths, legal_widths
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget, Spec
from expertprune.units import DENSE, KeptUnits, Structure
from tests.bases import base_of

FFN, HEADS, GROUPS = Structure.FFN, Structure.QUERY_HEADS, Structure.KV_GROUPS
FIELDS = {FFN: "ffn", HEADS: "heads_per_group", GROUPS: "kv_groups"}
RULES: list[dict[str, Any]] = [{}, {"multiple_of": 48, "floor": 0.4}, {"multiple_of": 7, "floor": 0.75}]
Scores = dict[Structure, list[Fused]]


def random_scores(base: ResolvedBase, seed: int, below_zero: bool = False) -> Scores:
    """Of all structures; layers differ in loudness, so that they lose different numbers of units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(units: int) -> Fused:
        loudness = float(torch.rand((), generator=generator)) * 3 + 0.1
        score = torch.rand(units, generator=generator, dtype=torch.float64) * loudness
        return Fused(score - below_zero * loudness / 2, torch.zeros(units), None)

    return {structure: [draw(shape.units(structure)) for shape in base.layers] for structure in DENSE}


def slow_ranking(base: ResolvedBase, scores: Scores, structures: Sequence[Structure], **rules: Any) -> list[WidthStep]:
    """Take the cheapest next step of any layer again and again: the mean score of what goes, per parameter.

    Llama without biases, hidden 48 and head_dim 2, so costs are written out; every head count divides 48.
    """
    multiple_of, floor = rules.get("multiple_of", 64), rules.get("floor", 0.1)
    queues: list[list[WidthStep]] = []
    for (layer, shape), structure in itertools.product(enumerate(base.layers), structures):
        values, aligned, per_group = scores[structure][layer].score.tolist(), 1, shape.heads_per_group
        if structure is FFN:
            own, cost, aligned = shape.ffn, 3 * 48, multiple_of
        elif structure is GROUPS:
            own, cost = shape.kv_heads, (per_group * 2 * 2 + 2 * 2) * 48
        else:  # the lowest head of each group goes at once
            own, cost = per_group, shape.kv_heads * 2 * 2 * 48
            columns = [sorted(values[g * per_group : (g + 1) * per_group]) for g in range(shape.kv_heads)]
            values = [sum(column[i] for column in columns) for i in range(per_group)]
        values, present, queue = sorted(values), own, []
        for width in (each for each in range(own - 1, 0, -1) if each % aligned == 0 and each >= floor * own):
            gone = values[own - present : own - width]
            price = sum(gone) / len(gone) / cost
            queue.append(WidthStep(price, layer, structure, width, (present - width) * cost, present - width))
            present = width
        queues.append(queue)
    order = []
    while any(queues):
        order.append(min((queue for queue in queues if queue), key=lambda queue: queue[0].price).pop(0))
    return order


def after(base: ResolvedBase, moves: Sequence[WidthStep]) -> list[LayerWidths]:
    layers = [LayerWidths.own(shape) for shape in base.layers]
    for move in moves:
        layers[move.layer] = replace(layers[move.layer], **{FIELDS[move.structure]: move.width})
    return layers


def nearest(order: Sequence[WidthStep], sizes: Sequence[int], wanted: float) -> Sequence[WidthStep]:
    """As many steps as bring the number of units nearest to what is wanted; the longer of two."""
    sums = [0, *itertools.accumulate(sizes)]
    return order[: min(range(len(sums)), key=lambda count: (abs(sums[count] - wanted), -count))]


def enough(order: Sequence[WidthStep], wanted: float) -> Sequence[WidthStep]:
    """The fewest steps that remove so many parameters."""
    sums = [0, *itertools.accumulate(move.parameters for move in order)]
    return order[: next(count for count, removed in enumerate(sums) if removed >= wanted)]


def test_legal_widths_descend_from_the_layers_own() -> None:
    """12 heads do not divide a hidden size of 32; 8 and 4 do."""
    base = base_of(hidden=32)
    narrow = replace(base, layers=(base.layers[0], replace(base.layers[1], ffn=130)))
    assert legal_widths(narrow, Budget(ffn=1), 1, FFN) == [130, 128, 64]
    assert legal_widths(base, Budget(ffn=1), 1, GROUPS) == legal_widths(base, Budget(ffn=1), 1, HEADS) == [4, 2, 1]
    assert legal_widths(base, Budget(ffn=1, floor=0.26), 1, HEADS) == [4, 2]


@pytest.mark.parametrize("structure", DENSE)
def test_an_amount_of_one_structure_goes_down_the_ranking(structure: Structure) -> None:
    base, refusals = base_of(layers=4), 0
    for rules, fraction, seed in itertools.product(RULES, (0.1, 0.25, 0.5), range(2)):
        wanted = fraction * 4 * {FFN: 256, GROUPS: 4, HEADS: 4}[structure]
        budget, scores = Budget(**{structure.value: fraction}, **rules), random_scores(base, seed)
        order = slow_ranking(base, scores, [structure], **rules)
        if sum(move.units for move in order) + order[-1].units / 2 < wanted:
            refusals += 1
            with pytest.raises(PlanError, match="is too much"):
                global_widths(budget, base, scores)
            continue
        expected = after(base, nearest(order, [move.units for move in order], wanted))
        assert list(global_widths(budget, base, scores)) == expected
        if fraction == 0.25:  # a count is of the average layer
            of = base.layers[0].units(structure)
            for amount in (of // 4, {"keep": of - of // 4}):
                assert list(global_widths(Budget(**{structure.value: amount}, **rules), base, scores)) == expected
    assert refusals < 9  # of 18


@pytest.mark.parametrize("groups", [(4, 1, 1), (1, 1, 4)], ids=str)
def test_query_heads_are_counted_whatever_the_kv_heads_of_each_layer(groups: tuple[int, ...]) -> None:
    """Layers of 4, 1 and 1 groups of 4 heads have 24, 8 in the average layer; as many go as are nearest to half or 5."""
    base = base_of(layers=3)
    layers = tuple(replace(s, query_heads=4 * n, kv_heads=n) for s, n in zip(base.layers, groups, strict=True))
    base = replace(base, layers=layers)
    amounts: list[tuple[Any, int]] = [(5, 3 * 5), ({"keep": 5}, 24 - 3 * 5), (0.5, 12)]
    for seed, (amount, wanted) in itertools.product(range(5), amounts):
        scores = random_scores(base, seed)
        order = slow_ranking(base, scores, [HEADS])
        moves = nearest(order, [move.units * groups[move.layer] for move in order], wanted)
        assert list(global_widths(Budget(query_heads=amount), base, scores)) == after(base, moves)


def test_neurons_and_groups_stand_in_one_ranking_for_parameters() -> None:
    base = base_of(layers=4)
    total = base.checkpoint.parameters
    for rules, fraction, seed in itertools.product(RULES, (0.02, 0.1, 0.2), range(2)):
        scores = random_scores(base, seed)
        moves = enough(slow_ranking(base, scores, [FFN, GROUPS], **rules), fraction * total)
        found = global_widths(Budget(parameters=fraction, **rules), base, scores)
        assert list(found) == after(base, moves)
        assert removed_parameters(base, found) == sum(move.parameters for move in moves)
        assert global_widths(Budget(max_parameters=total - round(fraction * total), **rules), base, scores) == found
    for seed in range(5):  # where groups are named, neurons make up what these do not remove
        scores = random_scores(base, seed)
        order = slow_ranking(base, scores, [GROUPS])
        groups = nearest(order, [1] * len(order), 4)
        neurons = enough(slow_ranking(base, scores, [FFN]), 0.2 * total - sum(move.parameters for move in groups))
        found = global_widths(Budget(parameters=0.2, kv_groups=0.25), base, scores)
        assert list(found) == after(base, [*groups, *neurons])


def test_vocabulary_rows_that_go_count_towards_the_parameters() -> None:
    """Of 512 rows 256 go, each 48 wide, of the embedding and of the head."""
    base, rows = base_of(layers=4, rows=512), 256 * 2 * 48
    total = base.checkpoint.parameters
    for fraction, seed in itertools.product((0.2, 0.3), range(3)):
        scores = random_scores(base, seed)
        moves = enough(slow_ranking(base, scores, [FFN, GROUPS]), fraction * total - rows)
        found = global_widths(Budget(parameters=fraction, vocabulary={"keep": 256}), base, scores)
        assert moves
        assert list(found) == after(base, moves)


def test_parameters_that_a_cut_of_heads_adds_are_made_up_for() -> None:
    """Cut heads of Qwen2 need biases; the smallest cut that removes enough without them is not enough."""
    base, more = base_of("qwen2", layers=4), 0
    total = base.checkpoint.parameters
    for seed in range(5):
        scores = random_scores(base, seed)
        first = global_widths(Budget(parameters=0.2), base, scores)
        removed = removed_parameters(base, first)
        second = global_widths(Budget(max_parameters=total - removed - 1), base, scores)
        assert removed_parameters(base, second) > removed
        more += any(layer.kv_groups < 4 for layer in first)
    assert more > 2


def test_scores_below_zero_are_ranked_as_they_are() -> None:
    """Distances from a mean: the lowest go first, and no division by a size turns their order round."""
    base = base_of(ffn=4, layers=2)
    values = ([-4.0, -3.0, -0.5, 3.0], [-1.0, -2.0, -0.4, 2.0])
    scores = {FFN: [Fused(torch.tensor(each), torch.zeros(4), None) for each in values]}
    budgets = [Budget(ffn=n / 8, multiple_of=1, floor=0) for n in range(1, 6)]
    kept = [[layer.ffn for layer in global_widths(budget, base, scores)] for budget in budgets]
    assert kept == [[3, 4], [2, 4], [2, 3], [2, 2], [1, 2]]  # -4, -3, -2, -1, -0.5


def test_one_score_below_zero_makes_no_other_layer_cheaper() -> None:
    """Per parameter, 0.3 in one layer would be less than 0.1 in another that has a score below zero."""
    base = base_of(ffn=4, layers=2)
    values = ([0.3, 0.4, 0.5, 0.6], [-1.0, 0.1, 0.2, 0.7])
    scores = {FFN: [Fused(torch.tensor(each), torch.zeros(4), None) for each in values]}
    budgets = [Budget(ffn=n / 8, multiple_of=1, floor=0) for n in range(1, 5)]
    kept = [[layer.ffn for layer in global_widths(budget, base, scores)] for budget in budgets]
    assert kept == [[4, 3], [4, 2], [4, 1], [3, 1]]
    scores[GROUPS] = [Fused(torch.tensor([2.0, -0.5, 3.0, 4.0]), torch.zeros(4), None), scores[FFN][0]]
    scores[FFN] = [scores[FFN][0]] * 2  # no neuron is below zero, but a group that competes with them is
    order = [
        (each.structure, each.layer)
        for each in steps(base, Budget(parameters=0.1, multiple_of=1, floor=0), scores, FFN, GROUPS)
    ]
    assert order[0] == (GROUPS, 0)
    assert order[1:4] == [(FFN, 0), (FFN, 1), (GROUPS, 1)]  # all of 0.3


def test_heads_and_groups_together_can_be_said_and_hold_the_floor() -> None:
    """Of 16 heads in 4 groups, 9 do not divide a hidden size of 48: 3 of 4 heads in 3 of 4 groups."""
    base = base_of(layers=3)
    half = {"kv_groups": 0.25, "query_heads": 0.15, "floor": 0.5}
    for budget in ({"kv_groups": 0.25, "query_heads": 0.25}, {"parameters": 0.2, "query_heads": 0.25}, half):
        for seed in (1, 2, 3, 5):  # with these scores, all three budgets can be met
            layers = global_widths(Budget(**budget), base, random_scores(base, seed))
            least = 16 * budget.get("floor", 0.1)
            assert all(48 % layer.query_heads == 0 and layer.query_heads >= least for layer in layers)


def test_a_budget_that_scores_can_reach_is_not_refused_before_there_are_any(tiny_spec: Spec) -> None:
    """Where all scores are equal, KV groups go from one layer after the other, and leave these no query heads to lose."""
    base = base_of("qwen3", 64, 8, 4, 48, 4)
    base.checkpoint.config["architectures"] = ["Qwen3ForCausalLM"]
    budget = Budget.model_validate({"kv_groups": 0.44, "query_heads": 0.49})
    for seed in range(6):
        assert global_widths(budget, base, random_scores(base, seed))
    compose = tiny_spec.compose.model_copy(update={"allocation": "global"})
    spec = tiny_spec.model_copy(update={"budget": budget, "compose": compose, "serve_with": ["transformers"]})
    assert foreseen_widths(spec, base) is not None
    further = budget.model_copy(update={"query_heads": 0.9})
    with pytest.raises(PlanError, match=r"budget\.query_heads: 0\.9 is too much"):
        foreseen_widths(spec.model_copy(update={"budget": further}), base)


@pytest.mark.parametrize("key", ["ffn", "query_heads", "kv_groups", "parameters", "max_parameters"])
def test_an_amount_that_cannot_be_names_the_legal_one(key: str) -> None:
    """One that is too much, what takes everything above the floor; one that removes nothing, the smallest cut."""
    base = base_of(layers=3)
    scores = random_scores(base, 0)

    def named(amount: float, floor: float, words: str) -> tuple[LayerWidths, ...]:
        with pytest.raises(PlanError, match=f"^budget.{key}: .*{words}") as error:
            global_widths(Budget(**{key: amount}, floor=floor), base, scores)
        found = re.search(r"the (?:largest|smallest) legal one is ([0-9.,]+)", str(error.value))
        assert found, error.value
        number = float(found[1].rstrip(".,").replace(",", ""))
        return global_widths(Budget(**{key: int(number) if number > 1 else number}, floor=floor), base, scores)

    for floor, ffn, heads in ((0.1, 64, 1), (0.5, 128, 2)):
        least = {"ffn": LayerWidths(ffn, 4, 4), "query_heads": LayerWidths(256, heads, 4),
                 "kv_groups": LayerWidths(256, 4, heads)}.get(key, LayerWidths(ffn, 4, heads))  # fmt: skip
        assert list(named(100 if key == "max_parameters" else 0.97, floor, "")) == [least] * 3
    if key == "ffn":
        assert sum(256 - layer.ffn for layer in named(0.001, 0.1, "removes nothing")) == 64


AMOUNTS = {"ffn": (0.02, 0.95), "query_heads": (0.15, 0.8), "kv_groups": (0.15, 0.8), "parameters": (0.005, 0.5)}
BUDGETS = [st.tuples(st.just(key), st.floats(*ends), st.floats(*ends)) for key, ends in AMOUNTS.items()]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@given(st.one_of(BUDGETS), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
def test_a_larger_budget_never_keeps_what_a_smaller_one_dropped(
    allocation: str, budgets: tuple[str, float, float], seed: int, floor: float, below_zero: bool
) -> None:
    base, (key, *amounts) = base_of(ffn=64, layers=3), budgets
    scores = random_scores(base, seed, below_zero)

    def kept(amount: float) -> list[KeptUnits]:
        budget = Budget(**{key: amount}, multiple_of=8, floor=floor)
        try:
            widths = global_widths(budget, base, scores) if allocation == "global" else uniform_widths(budget, base)
        except PlanError:
            assume(False)
        assert key != "parameters" or removed_parameters(base, widths) >= amount * base.checkpoint.parameters
        layers = enumerate(zip(base.layers, widths, strict=True))
        return [select_layer(*each, {s: scores[s][layer] for s in DENSE}) for layer, each in layers]

    small, large = map(kept, sorted(amounts))
    for (less, more), (structure, units) in itertools.product(
        zip(small, large, strict=True), ((FFN, 64), (GROUPS, 4), (HEADS, 16))
    ):
        assert set(more.of(structure)) <= set(less.of(structure))
        assert len(more.of(structure)) >= floor * units
    base.family.pruned_config(base.checkpoint.config, large)
