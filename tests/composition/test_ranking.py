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
from expertprune.composition.plan import select_layer
from expertprune.composition.ranking import WidthStep, global_widths, steps
from expertprune.composition.scoring import Fused
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import LayerWidths, legal_widths
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget
from expertprune.units import DENSE, KeptUnits, Structure
from tests.bases import base_of

FFN, HEADS, GROUPS = Structure.FFN, Structure.QUERY_HEADS, Structure.KV_GROUPS
FIELDS = {FFN: "ffn", HEADS: "heads_per_group", GROUPS: "kv_groups"}
Scores = dict[Structure, list[Fused]]


def random_scores(base: ResolvedBase, seed: int, below_zero: bool = False) -> Scores:
    """Of all structures; layers differ in loudness, so that they lose different numbers of units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(units: int) -> Fused:
        loudness = float(torch.rand((), generator=generator)) * 3 + 0.1
        score = torch.rand(units, generator=generator, dtype=torch.float64) * loudness
        return Fused(score - below_zero * loudness / 2, torch.zeros(units), None)

    return {structure: [draw(shape.units(structure)) for shape in base.layers] for structure in DENSE}


# --- legal widths and steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "hidden", "budget", "legal"),
    [
        (FFN, 48, {"multiple_of": 64}, [130, 128, 64]),
        (FFN, 48, {"multiple_of": 50, "floor": 0.5}, [130, 100]),
        (GROUPS, 48, {}, [4, 3, 2, 1]),
        (GROUPS, 48, {"floor": 0.51}, [4, 3]),
        (HEADS, 48, {"floor": 0.6}, [4, 3]),
        (GROUPS, 32, {}, [4, 2, 1]),  # 12 heads do not divide a hidden size of 32; 8 and 4 do
        (HEADS, 32, {}, [4, 2, 1]),
    ],
)
def test_legal_widths_descend_from_the_layers_own(
    structure: Structure, hidden: int, budget: dict[str, Any], legal: list[int]
) -> None:
    base = base_of(hidden=hidden)
    narrow = replace(base, layers=(base.layers[0], replace(base.layers[1], ffn=130)))
    assert legal_widths(narrow, Budget(ffn=1, **budget), 1, structure) == legal


def test_a_step_is_worth_the_mean_of_what_goes_for_each_parameter() -> None:
    """Hidden 48, heads of 2: a neuron has 3 · 48 parameters; a group of 4 heads 4 · 2 · 2 · 48 and 2 · 2 · 48."""
    base = base_of(ffn=4)
    scores = {
        FFN: [Fused(torch.tensor([5.0, 1.0, 2.0, 9.0]), torch.zeros(4), None)] * 2,
        GROUPS: [Fused(torch.tensor([3.0, 0.5, 8.0, 2.0]), torch.zeros(4), None)] * 2,
        HEADS: [Fused(torch.arange(16.0), torch.zeros(16), None)] * 2,
    }
    budget = Budget(ffn=1, multiple_of=2)
    (ffn, *_) = steps(base, budget, scores, FFN)
    assert (ffn.layer, ffn.width, ffn.units, ffn.parameters) == (0, 2, 2, 2 * 3 * 48)
    assert ffn.price == pytest.approx((1 + 2) / 2 / (3 * 48))
    groups = [step for step in steps(base, budget, scores, GROUPS) if step.layer == 1]
    size = (4 * 2 * 2 + 2 * 2) * 48
    assert [step.width for step in groups] == [3, 2, 1]
    assert [step.parameters for step in groups] == [size] * 3
    assert [step.price for step in groups] == pytest.approx([0.5 / size, 2 / size, 3 / size])
    heads = [step for step in steps(base, budget, scores, HEADS) if step.layer == 0]
    size = 4 * 2 * 2 * 48  # the lowest head of each of four groups goes at once: 0, 4, 8, 12
    assert [step.price for step in heads] == pytest.approx([24 / size, 28 / size, 32 / size])
    assert [step.parameters for step in heads] == [size] * 3


# --- one ranking over layers ----------------------------------------------------------------------------------------


def slow_ranking(base: ResolvedBase, scores: Scores, structures: Sequence[Structure], **rules: Any) -> list[WidthStep]:
    """Take the cheapest next step of any layer again and again: the mean score of what goes, per parameter.

    Llama without biases, hidden 48 and head_dim 2, so costs are written out; every head count divides 48.
    """
    multiple_of, floor = rules.get("multiple_of", 64), rules.get("floor", 0.1)
    queues: dict[tuple[int, Structure], list[WidthStep]] = {}
    for layer, shape in enumerate(base.layers):
        for structure in structures:
            values = scores[structure][layer].score.tolist()
            if structure is FFN:
                widths = [w for w in range(shape.ffn - 1, 0, -1) if w % multiple_of == 0 and w >= floor * shape.ffn]
                own, cost = shape.ffn, 3 * 48
            elif structure is GROUPS:
                widths = [w for w in range(shape.kv_heads - 1, 0, -1) if w >= floor * shape.kv_heads]
                own, cost = shape.kv_heads, (shape.heads_per_group * 2 * 2 + 2 * 2) * 48
            else:
                per_group = shape.heads_per_group
                columns = [sorted(values[g * per_group : (g + 1) * per_group]) for g in range(shape.kv_heads)]
                values = [sum(column[i] for column in columns) for i in range(per_group)]
                widths = [w for w in range(per_group - 1, 0, -1) if w >= floor * per_group]
                own, cost = per_group, shape.kv_heads * 2 * 2 * 48
            values, present, queue = sorted(values), own, []
            for width in widths:
                gone = values[own - present : own - width]
                price = sum(gone) / len(gone) / cost
                queue.append(WidthStep(price, layer, structure, width, (present - width) * cost, present - width))
                present = width
            queues[layer, structure] = queue
    order = []
    while any(queues.values()):
        order.append(min((queue for queue in queues.values() if queue), key=lambda queue: queue[0].price).pop(0))
    return order


def after(base: ResolvedBase, moves: Sequence[WidthStep]) -> list[LayerWidths]:
    layers = [LayerWidths.own(shape) for shape in base.layers]
    for move in moves:
        layers[move.layer] = replace(layers[move.layer], **{FIELDS[move.structure]: move.width})
    return layers


def nearest_prefix(order: Sequence[WidthStep], wanted: float) -> Sequence[WidthStep]:
    """As many steps as bring the number of units nearest to what is wanted; the longer of two."""
    sums = [0, *itertools.accumulate(move.units for move in order)]
    best = min(range(len(sums)), key=lambda count: (abs(sums[count] - wanted), -count))
    return order[:best]


def enough(order: Sequence[WidthStep], wanted: float) -> Sequence[WidthStep]:
    """The fewest steps that remove so many parameters."""
    sums = [0, *itertools.accumulate(move.parameters for move in order)]
    return order[: next(count for count, removed in enumerate(sums) if removed >= wanted)]


RULES = [{}, {"multiple_of": 16}, {"multiple_of": 48, "floor": 0.4}, {"multiple_of": 7, "floor": 0.75}]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("structure", DENSE)
def test_a_fraction_of_one_structure_goes_down_the_ranking(
    structure: Structure, fraction: float, rules: dict[str, Any]
) -> None:
    base = base_of(layers=4)
    wanted = fraction * 4 * {FFN: 256, GROUPS: 4, HEADS: 4}[structure]
    budget = Budget(**{structure.value: fraction}, **rules)
    for seed in range(5):
        scores = random_scores(base, seed)
        order = slow_ranking(base, scores, [structure], **rules)
        if sum(move.units for move in order) + order[-1].units / 2 < wanted:
            with pytest.raises(PlanError, match="is too much"):
                global_widths(budget, base, scores)
            continue
        expected = after(base, nearest_prefix(order, wanted))
        found = global_widths(budget, base, scores)
        assert list(found) == expected


def test_a_count_is_of_the_average_layer() -> None:
    """64 neurons of each of four layers are four steps of 64; 8 heads of 16 in 4 groups are two of each group."""
    base, scores = base_of(layers=4), random_scores(base_of(layers=4), 3)
    ffn = global_widths(Budget(ffn=64), base, scores)
    assert sum(256 - layer.ffn for layer in ffn) == 4 * 64
    assert len(set(ffn)) > 1
    heads = global_widths(Budget(query_heads=8), base, scores)
    assert sum(16 - layer.query_heads for layer in heads) == 4 * 8
    assert global_widths(Budget(ffn={"keep": 192}), base, scores) == ffn
    assert global_widths(Budget(query_heads={"keep": 8}), base, scores) == heads


@pytest.mark.parametrize("widest_first", [True, False])
@pytest.mark.parametrize("amount", [5, {"keep": 5}, 0.5], ids=str)
def test_query_heads_are_counted_whatever_the_kv_heads_of_each_layer(amount: Any, widest_first: bool) -> None:
    """Layers of 4, 1 and 1 groups of 4 heads have 24, 8 in the average layer; as many go as are nearest to half or 5."""
    base = base_of(layers=3)
    groups = (4, 1, 1) if widest_first else (1, 1, 4)
    layers = tuple(replace(s, query_heads=4 * n, kv_heads=n) for s, n in zip(base.layers, groups, strict=True))
    base = replace(base, layers=layers)
    wanted = {"5": 3 * 5, "{'keep': 5}": 24 - 3 * 5, "0.5": 12}[str(amount)]
    for seed in range(20):
        scores = random_scores(base, seed)
        order = slow_ranking(base, scores, [HEADS])
        sums = [0, *itertools.accumulate(move.units * base.layers[move.layer].kv_heads for move in order)]
        best = min(range(len(sums)), key=lambda count: (abs(sums[count] - wanted), -count))
        assert list(global_widths(Budget(query_heads=amount), base, scores)) == after(base, order[:best])


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.2])
def test_neurons_and_groups_stand_in_one_ranking_for_parameters(fraction: float, rules: dict[str, Any]) -> None:
    base = base_of(layers=4)
    total = base.checkpoint.parameters
    for seed in range(5):
        scores = random_scores(base, seed)
        moves = enough(slow_ranking(base, scores, [FFN, GROUPS], **rules), fraction * total)
        found = global_widths(Budget(parameters=fraction, **rules), base, scores)
        assert list(found) == after(base, moves)
        assert removed_parameters(base, found) == sum(move.parameters for move in moves)
        assert global_widths(Budget(max_parameters=total - round(fraction * total), **rules), base, scores) == found


def test_neurons_make_up_what_named_groups_do_not_remove() -> None:
    base, budget = base_of(layers=4), {"parameters": 0.2, "kv_groups": 0.25}
    for seed in range(5):
        scores = random_scores(base, seed)
        groups = nearest_prefix(slow_ranking(base, scores, [GROUPS]), 4)
        rest = 0.2 * base.checkpoint.parameters - sum(move.parameters for move in groups)
        neurons = enough(slow_ranking(base, scores, [FFN]), rest)
        assert list(global_widths(Budget(**budget), base, scores)) == after(base, [*groups, *neurons])


def test_scores_below_zero_are_ranked_as_they_are() -> None:
    """Distances from a mean: the lowest go first, and no division by a size turns their order round."""
    base = base_of(ffn=4, layers=2)
    flat = [Fused(torch.zeros(4), torch.zeros(4), None)] * 2
    scores: Scores = {
        FFN: [
            Fused(torch.tensor([-4.0, -3.0, -0.5, 3.0]), torch.zeros(4), None),
            Fused(torch.tensor([-1.0, -2.0, -0.4, 2.0]), torch.zeros(4), None),
        ],
        GROUPS: flat,
        HEADS: [Fused(torch.zeros(16), torch.zeros(16), None)] * 2,
    }
    kept = [
        [layer.ffn for layer in global_widths(Budget(ffn=n / 8, multiple_of=1, floor=0), base, scores)]
        for n in range(1, 6)
    ]
    assert kept == [[3, 4], [2, 4], [2, 3], [2, 2], [1, 2]]  # -4, -3, -2, -1, -0.5


@pytest.mark.parametrize(
    "budget",
    [
        {"kv_groups": 0.25, "query_heads": 0.25},
        {"parameters": 0.2, "query_heads": 0.25},
        {"kv_groups": 0.25, "query_heads": 0.15, "floor": 0.5},
    ],
    ids=str,
)
def test_heads_and_groups_together_can_be_said_and_hold_the_floor(budget: dict[str, float]) -> None:
    """Of 16 heads in 4 groups, 9 do not divide a hidden size of 48: 3 of 4 heads in 3 of 4 groups."""
    base = base_of(layers=3)
    for seed in (1, 2, 3, 5):  # with these scores, all three budgets can be met
        layers = global_widths(Budget(**budget), base, random_scores(base, seed))
        least = 16 * budget.get("floor", 0.1)
        assert all(48 % layer.query_heads == 0 and layer.query_heads >= least for layer in layers)


# --- what cannot be reached -----------------------------------------------------------------------------------------


def refused(base: ResolvedBase, **budget: Any) -> str:
    with pytest.raises(PlanError) as error:
        global_widths(Budget(**budget), base, random_scores(base, 0))
    return str(error.value)


@pytest.mark.parametrize("key", ["ffn", "query_heads", "kv_groups", "parameters", "max_parameters"])
@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_an_unreachable_amount_names_the_legal_one_that_takes_everything_above_the_floor(
    key: str, floor: float
) -> None:
    base = base_of(layers=3)
    message = refused(base, **{key: 100 if key == "max_parameters" else 0.97}, floor=floor)
    assert message.startswith(f"budget.{key}: ")
    named = re.search(r"the (?:largest|smallest) legal one is ([0-9.,]+)", message)
    assert named, message
    number = float(named[1].rstrip(".,").replace(",", ""))
    amount = int(number) if key == "max_parameters" else number
    found = global_widths(Budget(**{key: amount}, floor=floor), base, random_scores(base, 0))
    ffn, heads = {0.1: 64, 0.5: 128}[floor], {0.1: 1, 0.5: 2}[floor]
    least = {
        "ffn": LayerWidths(ffn, 4, 4), "query_heads": LayerWidths(256, heads, 4), "kv_groups": LayerWidths(256, 4, heads)
    }.get(key, LayerWidths(ffn, 4, heads))  # fmt: skip
    assert list(found) == [least] * 3


def test_a_fraction_that_removes_nothing_is_refused() -> None:
    """As it is where all layers keep the same width: an expert that is the base was not asked for."""
    base = base_of(layers=3)
    message = refused(base, ffn=0.001)
    assert "removes nothing" in message
    smallest = re.search(r"the smallest legal one is ([0-9.]+)", message)
    assert smallest, message
    found = global_widths(Budget(ffn=float(smallest[1].rstrip("."))), base, random_scores(base, 0))
    assert sum(256 - layer.ffn for layer in found) == 64


# --- monotone, through whole plans ----------------------------------------------------------------------------------


AMOUNTS = {
    "ffn": st.floats(0.02, 0.95),
    "query_heads": st.floats(0.15, 0.8),
    "kv_groups": st.floats(0.15, 0.8),
    "parameters": st.floats(0.005, 0.5),
}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@given(data=st.data(), seed=st.integers(0, 1000), floor=st.sampled_from([0.0, 0.1, 0.5]), below_zero=st.booleans())
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_a_larger_budget_never_keeps_what_a_smaller_one_dropped(
    allocation: str, data: st.DataObject, seed: int, floor: float, below_zero: bool
) -> None:
    base, kind = base_of(ffn=64, layers=3), data.draw(st.sampled_from(list(AMOUNTS)))
    scores = random_scores(base, seed, below_zero)

    def kept(amount: float) -> list[KeptUnits]:
        budget = Budget(**{kind: amount}, multiple_of=8, floor=floor)
        try:
            widths = global_widths(budget, base, scores) if allocation == "global" else uniform_widths(budget, base)
        except PlanError:
            assume(False)
        assert kind != "parameters" or removed_parameters(base, widths) >= amount * base.checkpoint.parameters
        layers = range(len(base.layers))
        return [select_layer(base.layers[n], widths[n], {s: scores[s][n] for s in DENSE}) for n in layers]

    small, large = (kept(amount) for amount in sorted(data.draw(st.tuples(AMOUNTS[kind], AMOUNTS[kind]))))
    for less, more in zip(small, large, strict=True):
        for structure, units in ((FFN, 64), (GROUPS, 4), (HEADS, 16)):
            assert set(more.of(structure)) <= set(less.of(structure))
            assert len(more.of(structure)) >= floor * units
    base.family.pruned_config(base.checkpoint.config, large)
