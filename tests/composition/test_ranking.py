"""Widths of every layer: against a greedy ranking in plain Python, and what no budget may break."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertprune.artifacts.plan import Parameters, Plan
from expertprune.artifacts.profile import Profile
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.plan import compose
from expertprune.composition.ranking import global_widths, steps
from expertprune.composition.scoring import Fused
from expertprune.composition.widths import LayerWidths, legal_widths
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget, Dimensions, Spec
from expertprune.units import DENSE, Structure
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


def everything(base: ResolvedBase) -> list[LayerWidths]:
    return [LayerWidths(shape.ffn, shape.heads_per_group, shape.kv_heads) for shape in base.layers]


# --- legal widths and steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "budget", "legal"),
    [
        (FFN, {"ffn": 1, "multiple_of": 64}, [256, 192, 128, 64]),
        (FFN, {"ffn": 1, "multiple_of": 100}, [256, 200, 100]),
        (FFN, {"ffn": 1, "multiple_of": 64, "floor": 0.5}, [256, 192, 128]),
        (FFN, {"ffn": 1, "multiple_of": 64, "floor": 1}, [256]),
        (GROUPS, {"ffn": 1}, [4, 3, 2, 1]),
        (GROUPS, {"ffn": 1, "floor": 0.5}, [4, 3, 2]),
        (GROUPS, {"ffn": 1, "floor": 0.51}, [4, 3]),
        (HEADS, {"ffn": 1}, [4, 3, 2, 1]),
        (HEADS, {"ffn": 1, "floor": 0.6}, [4, 3]),
    ],
)
def test_legal_widths_descend_from_the_layers_own(
    structure: Structure, budget: dict[str, Any], legal: list[int]
) -> None:
    assert legal_widths(base_of(), Budget(**budget), 1, structure) == legal


@pytest.mark.parametrize("structure", [GROUPS, HEADS])
def test_widths_that_the_config_cannot_say_are_not_legal(structure: Structure) -> None:
    """12 heads do not divide a hidden size of 32; 8 and 4 do."""
    assert legal_widths(base_of(hidden=32), Budget(ffn=1), 0, structure) == [4, 2, 1]


def test_a_layers_own_width_is_where_its_legal_widths_begin() -> None:
    base = base_of()
    narrow = replace(base, layers=(base.layers[0], replace(base.layers[1], ffn=130)))
    assert legal_widths(narrow, Budget(ffn=1), 0, FFN) == [256, 192, 128, 64]
    assert legal_widths(narrow, Budget(ffn=1), 1, FFN) == [130, 128, 64]


@pytest.mark.parametrize("below_zero", [False, True])
@pytest.mark.parametrize("structure", DENSE)
def test_prices_never_fall_within_a_layer(structure: Structure, below_zero: bool) -> None:
    base = base_of(layers=3)
    for seed in range(5):
        found = steps(base, Budget(ffn=1, multiple_of=48), random_scores(base, seed, below_zero), structure)
        assert [step.price for step in found] == sorted(step.price for step in found)
        for layer in range(3):
            own = [step.width for step in found if step.layer == layer]
            assert own == legal_widths(base, Budget(ffn=1, multiple_of=48), layer, structure)[1:]


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


@dataclass(frozen=True)
class Move:
    """One step of the reference: a layer's structure from one width to the next smaller one."""

    layer: int
    structure: Structure
    width: int
    units: int
    parameters: int


def slow_ranking(base: ResolvedBase, scores: Scores, structures: Sequence[Structure], **rules: Any) -> list[Move]:
    """Take the cheapest next step of any layer again and again: the mean score of what goes, per parameter.

    Llama without biases, hidden 48 and head_dim 2, so costs are written out; every head count divides 48.
    """
    multiple_of, floor = rules.get("multiple_of", 64), rules.get("floor", 0.1)
    queues: dict[tuple[int, Structure], list[tuple[float, Move]]] = {}
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
                queue.append((price, Move(layer, structure, width, present - width, (present - width) * cost)))
                present = width
            queues[layer, structure] = queue
    order = []
    while any(queues.values()):
        cheapest = min((queue for queue in queues.values() if queue), key=lambda queue: queue[0][0])
        order.append(cheapest.pop(0)[1])
    return order


def after(base: ResolvedBase, moves: Sequence[Move], start: Sequence[LayerWidths] | None = None) -> list[LayerWidths]:
    layers = list(start or everything(base))
    for move in moves:
        layers[move.layer] = replace(layers[move.layer], **{FIELDS[move.structure]: move.width})
    return layers


def nearest_prefix(order: Sequence[Move], wanted: float) -> Sequence[Move]:
    """As many steps as bring the number of units nearest to what is wanted; the longer of two."""
    sums = [0, *itertools.accumulate(move.units for move in order)]
    best = min(range(len(sums)), key=lambda count: (abs(sums[count] - wanted), -count))
    return order[:best]


def enough(order: Sequence[Move], wanted: float) -> Sequence[Move]:
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


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_neurons_and_groups_stand_in_one_ranking_for_parameters(
    seed: int, fraction: float, rules: dict[str, Any]
) -> None:
    base = base_of(layers=4)
    scores = random_scores(base, seed)
    order = slow_ranking(base, scores, [FFN, GROUPS], **rules)
    wanted = fraction * base.checkpoint.parameters
    found = global_widths(Budget(parameters=fraction, **rules), base, scores)
    assert list(found) == after(base, enough(order, wanted))
    removed = sum(move.parameters for move in enough(order, wanted))
    assert removed_parameters(base, found) == removed
    last = max(move.parameters for move in order)
    assert wanted <= removed < wanted + last


def test_neurons_make_up_what_named_groups_do_not_remove() -> None:
    base, budget = base_of(layers=4), {"parameters": 0.2, "kv_groups": 0.25}
    for seed in range(5):
        scores = random_scores(base, seed)
        groups = nearest_prefix(slow_ranking(base, scores, [GROUPS]), 4)
        rest = 0.2 * base.checkpoint.parameters - sum(move.parameters for move in groups)
        neurons = enough(slow_ranking(base, scores, [FFN]), rest)
        assert list(global_widths(Budget(**budget), base, scores)) == after(base, [*groups, *neurons])


@pytest.mark.parametrize("fraction", [0.05, 0.15])
def test_max_parameters_are_the_same_ranking(fraction: float) -> None:
    base, scores = base_of(layers=4), random_scores(base_of(layers=4), 1)
    total = base.checkpoint.parameters
    most = total - round(fraction * total)
    found = global_widths(Budget(max_parameters=most), base, scores)
    assert total - removed_parameters(base, found) <= most
    order = slow_ranking(base, scores, [FFN, GROUPS])
    assert list(found) == after(base, enough(order, total - most))


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


@pytest.mark.parametrize("floor", [0.1, 0.5, 0.75])
def test_floors_hold_in_every_layer_however_its_units_score(floor: float) -> None:
    base = base_of(layers=3)
    scores = random_scores(base, 0)
    for structure in DENSE:  # the first layer is worth nothing
        scores[structure][0] = Fused(scores[structure][0].score * 0, scores[structure][0].source, None)
    fraction = (1 - floor) / 2
    budget = Budget(ffn=fraction, kv_groups=fraction if floor < 0.7 else 0, floor=floor, multiple_of=16)
    layers = global_widths(budget, base, scores)
    assert all(layer.ffn >= floor * 256 and layer.kv_groups >= floor * 4 for layer in layers)
    assert layers[0].ffn == min(w for w in range(16, 257, 16) if w >= floor * 256)


def test_the_floor_holds_for_query_heads_when_groups_go_too() -> None:
    base, scores = base_of(layers=3), random_scores(base_of(layers=3), 2)
    layers = global_widths(Budget(kv_groups=0.25, query_heads=0.25, floor=0.4), base, scores)
    assert all(layer.query_heads >= 0.4 * 16 for layer in layers)


@pytest.mark.parametrize(
    ("keep", "remove"),
    [({"ffn": {"keep": 192}}, {"ffn": 64}), ({"kv_groups": {"keep": 3}}, {"kv_groups": 1}),
     ({"query_heads": {"keep": 8}}, {"query_heads": 8})],
)  # fmt: skip
def test_what_stays_is_of_the_average_layer_as_what_goes_is(keep: dict[str, Any], remove: dict[str, Any]) -> None:
    base, scores = base_of(layers=4), random_scores(base_of(layers=4), 3)
    assert global_widths(Budget(**keep), base, scores) == global_widths(Budget(**remove), base, scores)


def test_more_than_there_is_cannot_stay() -> None:
    assert refused(base_of(layers=3), ffn={"keep": 300}) == "budget.ffn: keep: 300 is more than the 256 that there are"


@pytest.mark.parametrize(
    "budget",
    [
        {"kv_groups": 0.25, "query_heads": 0.25},
        {"parameters": 0.2, "query_heads": 0.25},
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_widths_of_heads_and_groups_together_can_be_said(seed: int, budget: dict[str, float]) -> None:
    """Of 16 heads in 4 groups, 9 do not divide a hidden size of 48: 3 of 4 heads in 3 of 4 groups."""
    base = base_of(layers=3)
    layers = global_widths(Budget(**budget), base, random_scores(base, seed))
    assert all(48 % layer.query_heads == 0 for layer in layers)


# --- what cannot be reached -----------------------------------------------------------------------------------------


def refused(base: ResolvedBase, **budget: Any) -> str:
    with pytest.raises(PlanError) as error:
        global_widths(Budget(**budget), base, random_scores(base, 0))
    return str(error.value)


@pytest.mark.parametrize("key", ["ffn", "query_heads", "kv_groups"])
@pytest.mark.parametrize("floor", [0.1, 0.5, 0.7])
def test_an_unreachable_fraction_names_the_largest_which_is_legal(key: str, floor: float) -> None:
    base = base_of(layers=3)
    message = refused(base, **{key: 0.99}, floor=floor)
    assert message.startswith(f"budget.{key}: ")
    named = re.search(r"the largest legal one is ([0-9.]+)", message)
    assert named, message
    largest = float(named[1].rstrip("."))
    found = global_widths(Budget(**{key: largest}, floor=floor), base, random_scores(base, 0))
    least = {"ffn": min(w for w in range(64, 257, 64) if w >= floor * 256)}.get(key, math.ceil(floor * 4))
    field = {"ffn": "ffn", "query_heads": "heads_per_group", "kv_groups": "kv_groups"}[key]
    assert [getattr(layer, field) for layer in found] == [least] * 3


@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_unreachable_parameters_name_the_largest_which_is_legal(floor: float) -> None:
    base = base_of(layers=3)
    message = refused(base, parameters=0.97, floor=floor)
    named = re.search(r"the largest legal one is ([0-9.]+)", message)
    assert named, message
    largest = float(named[1].rstrip(";."))
    found = global_widths(Budget(parameters=largest, floor=floor), base, random_scores(base, 0))
    removed = removed_parameters(base, found)
    assert largest * base.checkpoint.parameters <= removed
    # Nothing is left to take: every layer stands at its floor in both structures.
    least = LayerWidths(min(w for w in (64, 128, 192) if w >= floor * 256), 4, math.ceil(floor * 4))
    assert removed_parameters(base, (least,) * 3) / base.checkpoint.parameters == pytest.approx(largest, abs=1e-4)


def test_unreachable_max_parameters_name_the_smallest_which_is_legal() -> None:
    base = base_of(layers=3)
    named = re.search(r"the smallest legal one is ([0-9,]+);", refused(base, max_parameters=100, floor=0.5))
    assert named
    smallest = int(named[1].replace(",", ""))
    found = global_widths(Budget(max_parameters=smallest, floor=0.5), base, random_scores(base, 0))
    assert base.checkpoint.parameters - removed_parameters(base, found) == smallest


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


class MadeProfile(Profile):
    """A profile in memory whose units have the relevance that a test gives them."""

    def __init__(self, base: ResolvedBase, seed: int) -> None:
        self.about = {
            "digest": f"made-{seed}",
            "corpus": "made",
            "documents": ["a", "b"],
            "tokens": 20,
            "layers": [vars(shape) for shape in base.layers],
        }
        generator = torch.Generator().manual_seed(seed)
        self._tensors: dict[str, Tensor] = {"tokens": torch.full((2,), 10.0)}
        for layer, shape in enumerate(base.layers):
            sizes = {"ffn": shape.ffn, "heads": shape.query_heads * shape.head_dim}
            loudness = float(torch.rand((), generator=generator)) * 2 + 0.2
            for block, channels in sizes.items():
                self._tensors |= {
                    f"{block}.{layer}.rms": torch.rand(2, channels, generator=generator) * loudness,
                    f"{block}.{layer}.sum": torch.zeros(channels, dtype=torch.float64),
                    f"{block}.{layer}.square_sum": torch.ones(channels, dtype=torch.float64),
                    f"{block}.{layer}.output_l1": torch.ones(channels),
                    f"{block}.{layer}.output_l2": torch.ones(channels),
                }
            for block, units in (("ffn", shape.ffn), ("heads", shape.query_heads), ("groups", shape.kv_heads)):
                self._tensors[f"{block}.{layer}.weight_norm"] = torch.ones(units)
                self._tensors[f"{block}.{layer}.impact"] = torch.rand(2, units, generator=generator) * loudness

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_half(self, name: str) -> Tensor:
        return self._tensors[name]


def a_spec(budget: dict[str, Any], allocation: str, **compose_settings: Any) -> Spec:
    return Spec(
        name="made-up",
        base="nowhere",
        dimensions=Dimensions(language=["en"], domain=["law"]),
        general=["general"],
        budget=Budget(**budget),
        relevance={"criterion": "impact"},
        compose={"allocation": allocation, **compose_settings},
    )


def composed(base: ResolvedBase, seed: int, budget: dict[str, Any], allocation: str, **compose_settings: Any) -> Plan:
    names = [("language", "en"), ("domain", "law"), ("general", "general")]
    profiles = {CorpusName(*name): MadeProfile(base, 10 * seed + n) for n, name in enumerate(names)}
    return compose(a_spec(budget, allocation, **compose_settings), base, profiles)


def parameters_of(base: ResolvedBase, plan: Plan) -> int:
    """Parameters that a plan leaves, each kept unit's size written out: hidden 48, heads of 2, no biases."""
    left = base.checkpoint.parameters
    for shape, kept in zip(base.layers, plan.kept, strict=True):
        left -= 3 * 48 * (shape.ffn - len(kept.ffn))
        left -= 2 * 2 * 48 * (shape.query_heads - len(kept.query_heads))
        left -= 2 * 2 * 48 * (shape.kv_heads - len(kept.kv_groups))
    return left


AMOUNTS = {
    "ffn": st.floats(0.02, 0.95),
    "query_heads": st.floats(0.15, 0.8),
    "kv_groups": st.floats(0.15, 0.8),
    "parameters": st.floats(0.005, 0.5),
    "max_parameters": st.floats(0.005, 0.5),
}


def budget_of(base: ResolvedBase, kind: str, amount: float, floor: float) -> dict[str, Any]:
    value = round(base.checkpoint.parameters * (1 - amount)) if kind == "max_parameters" else amount
    return {kind: value, "multiple_of": 8, "floor": floor}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@given(data=st.data(), seed=st.integers(0, 1000), floor=st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_a_larger_budget_never_keeps_what_a_smaller_one_dropped(
    allocation: str, data: st.DataObject, seed: int, floor: float
) -> None:
    kind = data.draw(st.sampled_from(list(AMOUNTS)))
    scale = data.draw(st.sampled_from(["share", "percentile", "standard"]))
    base = base_of(ffn=64, layers=3)
    small, large = sorted(data.draw(st.tuples(AMOUNTS[kind], AMOUNTS[kind])))
    plans = []
    for amount in (small, large):
        try:
            plans.append(composed(base, seed, budget_of(base, kind, amount, floor), allocation, scale=scale))
        except PlanError:
            assume(False)
    for less, more in zip(plans[0].kept, plans[1].kept, strict=True):
        for structure in DENSE:
            assert set(more.of(structure)) <= set(less.of(structure))
    for plan, amount in zip(plans, (small, large), strict=True):
        left = parameters_of(base, plan)
        assert plan.parameters == Parameters(before=base.checkpoint.parameters, after=left)
        if kind in ("parameters", "max_parameters"):
            assert left <= base.checkpoint.parameters * (1 - amount) + 0.5
        for kept in plan.kept:
            assert len(kept.ffn) >= floor * 64
            assert len(kept.kv_groups) >= floor * 4
            assert len(kept.query_heads) >= floor * 16
        base.family.pruned_config(base.checkpoint.config, plan.kept)
