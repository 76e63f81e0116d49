"""Budgets: met exactly, or an error that names what is legal, and what it names is legal."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from expertprune.arch import family_of
from expertprune.artifacts.plan import StructureBudget
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import LayerWidths, legal_ffn, summary
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.spec.schema import Budget
from expertprune.spec.values import Keep
from expertprune.units import KeptUnits, LayerShape
from tests.bases import base_of, tensors_of


def bare_base(shape: LayerShape, family: str = "llama") -> ResolvedBase:
    """A base of two layers without tensors, where sizes do not matter."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.config = {
        "model_type": family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    return ResolvedBase("b", Path(), checkpoint, family_of(family), (shape, shape), "d", "t", torch.float32)


def resolved(base: ResolvedBase | None = None, **budget: Any) -> LayerWidths:
    """What each layer keeps, the same in all of them."""
    base = base or base_of()
    widths = uniform_widths(Budget(**budget), base)
    assert len(set(widths)) == 1
    assert len(widths) == len(base.layers)
    return widths[0]


def removed_everywhere(base: ResolvedBase, layer: LayerWidths) -> int:
    """Parameters that leave the model when every layer keeps these widths."""
    return removed_parameters(base, [layer] * len(base.layers))


def refusal(base: ResolvedBase | None = None, **budget: Any) -> str:
    with pytest.raises(PlanError) as error:
        resolved(base, **budget)
    return str(error.value)


def named_number(message: str, before: str) -> float:
    found = re.search(rf"{before}\s*([0-9.]+)", message)
    assert found, message
    return float(found[1].rstrip("."))


def kept_first(widths: LayerWidths, shape: LayerShape) -> KeptUnits:
    heads = [g * shape.heads_per_group + h for g in range(widths.kv_groups) for h in range(widths.heads_per_group)]
    return KeptUnits(tuple(range(widths.ffn)), tuple(heads), tuple(range(widths.kv_groups)))


# --- FFN neurons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_a_budget_of_zero_removes_nothing(nothing: float) -> None:
    widths = resolved(ffn=nothing, query_heads=nothing, kv_groups=nothing)
    assert (widths.ffn, widths.heads_per_group, widths.kv_groups, widths.query_heads) == (256, 4, 4, 16)
    assert removed_everywhere(base_of(), widths) == 0


def test_parameters_of_zero_remove_nothing() -> None:
    assert resolved(parameters=0.0).ffn == 256


@pytest.mark.parametrize(
    ("ffn", "multiple_of", "kept"),
    [
        (0.25, 64, 192),
        (0.26, 64, 192),  # to the nearest legal width
        (0.13, 64, 192),
        (0.375, 64, 192),  # half way: the wider of two
        (0.38, 64, 128),
        (0.75, 64, 64),
        (0.85, 64, 64),  # nearer to 64 than to nothing
        (64, 64, 192),
        (192, 64, 64),
        (1, 1, 255),
        (0.004, 1, 255),
        (230, 1, 26),
        (6, 50, 250),
        (0.02, 50, 250),
    ],
)
def test_ffn_width(ffn: float, multiple_of: int, kept: int) -> None:
    assert resolved(ffn=ffn, multiple_of=multiple_of).ffn == kept


def test_one_neuron_is_refused_where_widths_are_aligned() -> None:
    message = refusal(ffn=1)
    assert message == (
        "budget.ffn: 1 neurons cannot be removed (kept widths are multiples of 64 and at least 0.1 of 256); "
        "legal counts near it: 64 and 128; the largest is 192"
    )


@pytest.mark.parametrize("removed", [1, 63, 65, 100, 193, 255, 256, 10_000])
def test_a_count_that_is_not_legal_names_counts_that_are(removed: int) -> None:
    named = re.search(r"legal counts near it: (\d+) and (\d+); the largest is (\d+)", refusal(ffn=removed))
    assert named is not None
    near = sorted((64, 128, 192), key=lambda count: abs(count - removed))[:2]
    assert [int(n) for n in named.groups()] == [*sorted(near), 192]
    assert all(resolved(ffn=int(n)).ffn == 256 - int(n) for n in named.groups())


@pytest.mark.parametrize(("fraction", "floor"), [(0.9, 0.1), (0.99, 0.1), (0.8, 0.5), (0.7, 0.6)])
def test_a_fraction_too_large_names_the_largest_which_is_legal(fraction: float, floor: float) -> None:
    message = refusal(ffn=fraction, floor=floor)
    largest = named_number(message, "the largest legal one is")
    assert f"{fraction:g} is too much" in message
    kept = resolved(ffn=largest, floor=floor).ffn
    assert kept == min(w for w in (64, 128, 192) if w >= floor * 256)


def test_a_fraction_too_small_names_the_smallest_which_is_legal() -> None:
    message = refusal(ffn=0.1)
    assert "0.1 removes nothing" in message
    assert "the smallest legal one is 64 neurons" in message
    assert resolved(ffn=named_number(message, "64 neurons,")).ffn == 192


@pytest.mark.parametrize(("ffn", "multiple_of", "floor"), [(0.5, 256, 0.1), (0.5, 300, 0.1), (0.5, 64, 0.9)])
def test_nothing_can_be_removed_where_no_other_width_is_legal(ffn: float, multiple_of: int, floor: float) -> None:
    assert "nothing can be removed from 256 neurons" in refusal(ffn=ffn, multiple_of=multiple_of, floor=floor)
    count = refusal(ffn=64, multiple_of=multiple_of, floor=floor)
    assert "nothing can be removed: lower budget.multiple_of" in count


@pytest.mark.parametrize(
    ("ffn", "multiple_of", "floor", "legal"),
    [
        (256, 64, 0.1, [64, 128, 192, 256]),
        (256, 64, 0.5, [128, 192, 256]),
        (256, 64, 0.501, [192, 256]),
        (256, 64, 1.0, [256]),
        (10, 3, 0.0, [3, 6, 9, 10]),
        (10, 1, 0.3, [3, 4, 5, 6, 7, 8, 9, 10]),
        (100, 1, 0.99, [99, 100]),
        (7, 100, 0.0, [7]),
    ],
)
def test_legal_widths(ffn: int, multiple_of: int, floor: float, legal: list[int]) -> None:
    assert legal_ffn(LayerShape(32, ffn, 4, 2, 8), multiple_of, floor) == legal


@given(
    width=st.integers(1, 200),
    multiple_of=st.integers(1, 70),
    floor=st.floats(0, 1),
    removed=st.one_of(st.integers(0, 210), st.floats(0, 1, exclude_max=True)),
)
@settings(deadline=None, max_examples=150)
def test_any_ffn_budget_is_met_or_refused_for_a_reason(
    width: int, multiple_of: int, floor: float, removed: float
) -> None:
    base = bare_base(LayerShape(48, width, 16, 4, 2))
    legal = [w for w in range(multiple_of, width, multiple_of) if w >= max(1, floor * width - 1e-9)] + [width]
    try:
        kept = resolved(base, ffn=removed, multiple_of=multiple_of, floor=floor).ffn
    except PlanError:
        kept = None
    if isinstance(removed, int):
        assert kept == (width - removed if width - removed in legal else None)
    elif kept is None:
        # refused: it would remove nothing, or it asks for more than half a step below the smallest legal width
        wanted = width * (1 - removed)
        nothing = min(abs(w - wanted) for w in legal) == width - wanted
        assert removed > 0
        assert nothing or wanted < legal[0] - multiple_of / 2
    else:
        distance = min(abs(w - width * (1 - removed)) for w in legal)
        assert kept in legal
        assert abs(kept - width * (1 - removed)) == distance
        assert (kept < width) == (removed > 0)


@pytest.mark.parametrize(
    ("said", "kept"),
    [({"keep": 192}, 192), ({"remove": 64}, 192), ({"keep": "75%"}, 192), ("25%", 192), ({"remove": 0.25}, 192),
     ({"keep": 256}, 256), ({"keep": 64}, 64)],
)  # fmt: skip
def test_what_stays_can_be_said_too(said: Any, kept: int) -> None:
    assert resolved(ffn=said).ffn == kept


def test_what_stays_must_be_legal_and_what_is_named_is() -> None:
    message = refusal(ffn={"keep": 150})
    assert message.startswith("budget.ffn: keep: 150: 106 neurons cannot be removed")
    assert message.endswith("legal near it: keep: 192 and keep: 128")
    assert resolved(ffn={"keep": 128}).ffn == 128
    assert refusal(ffn={"keep": 257}) == "budget.ffn: keep: 257 is more than the 256 that there are"
    assert resolved(kv_groups={"keep": 3}).kv_groups == 3
    assert resolved(query_heads={"keep": 4}).query_heads == 4


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "per_group", "groups"),
    [
        ({"query_heads": 0.5}, 2, 4),
        ({"query_heads": 8}, 2, 4),
        ({"query_heads": 12}, 1, 4),
        ({"query_heads": 0.75}, 1, 4),
        ({"query_heads": 0.7}, 1, 4),  # 2.8 of 4 heads of a group
        ({"kv_groups": 0.5}, 4, 2),
        ({"kv_groups": 2}, 4, 2),
        ({"kv_groups": 3}, 4, 1),
        ({"kv_groups": 0.5, "query_heads": 0.5}, 2, 2),
        ({"kv_groups": 2, "query_heads": 8}, 2, 2),  # counts are of the base's heads
    ],
)
def test_head_counts(budget: dict[str, Any], per_group: int, groups: int) -> None:
    widths = resolved(**budget)
    assert (widths.heads_per_group, widths.kv_groups, widths.query_heads) == (per_group, groups, per_group * groups)
    assert widths.ffn == 256


@pytest.mark.parametrize("removed", [1, 2, 3, 5, 7, 13])
def test_query_heads_must_be_as_many_in_each_group(removed: int) -> None:
    message = refusal(query_heads=removed)
    assert message == (
        f"budget.query_heads: {removed} of 16 is not the same number in each of 4 KV groups; legal: 0, 4, 8, 12"
    )


def test_all_query_heads_cannot_go() -> None:
    message = refusal(query_heads=16)
    assert "at most 3 of 4 query heads of each KV group can be removed (0.75)" in message
    assert resolved(query_heads=0.75).query_heads == 4


@pytest.mark.parametrize("removed", [4, 5, 0.9, 0.999])
def test_all_kv_groups_cannot_go(removed: float) -> None:
    message = refusal(kv_groups=removed)
    assert "at most 3 of 4 KV groups can be removed" in message
    assert resolved(kv_groups=named_number(message, r"removed \(")).kv_groups == 1


def test_query_heads_cannot_be_cut_where_each_kv_head_has_one() -> None:
    base = base_of(groups=4, per_group=1)
    assert "use budget.kv_groups" in refusal(base, query_heads=0.5)
    assert resolved(base, kv_groups=0.5).query_heads == 2


def test_the_floor_holds_for_heads() -> None:
    assert "at most 2 of 4 KV groups" in refusal(kv_groups=3, floor=0.5)
    assert resolved(kv_groups=2, floor=0.5).kv_groups == 2
    assert "at most 1 of 4 query heads of each" in refusal(query_heads=8, floor=0.6)
    assert resolved(query_heads=4, floor=0.6).heads_per_group == 3


def test_the_floor_holds_for_query_heads_when_groups_go_too() -> None:
    base = base_of()
    try:
        widths = resolved(base, kv_groups=0.5, query_heads=0.5, floor=0.5)
    except PlanError:
        return
    assert widths.query_heads >= 0.5 * base.layers[0].query_heads


@pytest.mark.parametrize("key", ["kv_groups", "query_heads"])
def test_a_fraction_that_removes_no_head_names_the_smallest_which_is_legal(key: str) -> None:
    message = refusal(**{key: 0.1})
    assert "removes nothing" in message
    widths = resolved(**{key: named_number(message, "the smallest legal one is")})
    assert min(widths.kv_groups, widths.heads_per_group) == 3


@pytest.mark.parametrize(("groups", "floor"), [(1, 0.1), (4, 0.9)])
def test_the_smallest_legal_fraction_is_not_named_where_there_is_none(groups: int, floor: float) -> None:
    base = base_of(groups=groups)
    message = refusal(base, kv_groups=0.1, floor=floor)
    if "the smallest legal one is" in message:
        smallest = named_number(message, "the smallest legal one is")
        assert resolved(base, kv_groups=smallest, floor=floor).kv_groups == groups - 1


def test_head_counts_that_the_config_cannot_say_are_refused_now() -> None:
    """transformers refuses a Llama whose head count does not divide its hidden size."""
    base = base_of(hidden=32)
    message = refusal(base, query_heads=4)
    assert "12 query heads do not divide the hidden size 32" in message
    assert message.endswith("with 4 KV groups kept, legal counts are 4, 8, 16")
    assert resolved(base, query_heads=8).query_heads == 8
    with pytest.raises(StrictDataclassError, match="not a multiple"):
        LlamaConfig(hidden_size=32, num_attention_heads=12, num_key_value_heads=4, head_dim=2)


def test_no_head_count_is_named_where_none_is_legal() -> None:
    assert refusal(base_of(hidden=32), kv_groups=1).endswith("with 3 KV groups kept, legal counts are none")


def test_the_head_counts_that_are_named_can_be_reached() -> None:
    message = refusal(base_of(hidden=32), kv_groups=2, query_heads=4)
    assert "6 query heads do not divide the hidden size 32; with 2 KV groups kept" not in message
    named = [int(n) for n in message.rpartition("legal counts are ")[2].split(", ")]
    assert max(named) <= 2 * 4


@pytest.mark.parametrize("asked", [{"query_heads": 5}, {"query_heads": 0.1}, {"kv_groups": 0.1}])
def test_what_a_refusal_names_as_legal_is_accepted(asked: dict[str, Any]) -> None:
    base = base_of(hidden=32)  # 12 heads do not divide it, 4, 8 and 16 do
    message, key = refusal(base, **asked), next(iter(asked))
    if "legal: " in message:
        named: list[float] = [int(n) for n in message.rpartition("legal: ")[2].split(", ")]
    else:
        named = [named_number(message, "the smallest legal one is")]
    for amount in named:
        resolved(base, **{key: amount})


def test_a_family_that_is_written_as_another_obeys_the_others_rule() -> None:
    base = base_of("qwen2", hidden=32)
    assert "12 query heads do not divide the hidden size 32" in refusal(base, query_heads=4)
    assert resolved(base, query_heads=8).query_heads == 8


@given(
    groups=st.integers(1, 6),
    per_group=st.integers(1, 5),
    hidden=st.sampled_from([16, 24, 30, 32, 60]),
    query_heads=st.one_of(st.integers(0, 31), st.floats(0, 1, exclude_max=True)),
    kv_groups=st.one_of(st.integers(0, 7), st.floats(0, 1, exclude_max=True)),
    ffn=st.one_of(st.integers(0, 64), st.floats(0, 1, exclude_max=True)),
    multiple_of=st.sampled_from([1, 4, 10, 16]),
    floor=st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.9, 1.0]),
)
@settings(deadline=None, max_examples=200)
def test_any_budget_gives_widths_that_llama_can_say_or_is_refused(
    groups: int,
    per_group: int,
    hidden: int,
    query_heads: float,
    kv_groups: float,
    ffn: float,
    multiple_of: int,
    floor: float,
) -> None:
    base = bare_base(LayerShape(hidden, 64, groups * per_group, groups, 2))
    asked = {"query_heads": query_heads, "kv_groups": kv_groups, "ffn": ffn}
    try:
        widths = resolved(base, **asked, multiple_of=multiple_of, floor=floor)
    except PlanError:
        assert any(asked.values())
        return
    assert widths.ffn == 64 or widths.ffn % multiple_of == 0
    assert max(1, floor * 64 - 1e-9) <= widths.ffn <= 64
    assert max(1, floor * groups - 1e-9) <= widths.kv_groups <= groups
    assert max(1, floor * per_group - 1e-9) <= widths.heads_per_group <= per_group
    changed = (widths.kv_groups, widths.heads_per_group) != (groups, per_group)
    assert not changed or hidden % widths.query_heads == 0
    assert (widths.ffn < 64) == bool(ffn)
    assert (widths.kv_groups < groups) == bool(kv_groups)
    assert (widths.heads_per_group < per_group) == bool(query_heads)
    for key, kept, of in (("kv_groups", widths.kv_groups, groups), ("ffn", widths.ffn, 64)):
        if isinstance(asked[key], int):
            assert of - kept == asked[key]
    if isinstance(query_heads, int):
        assert groups * (per_group - widths.heads_per_group) == query_heads
    if isinstance(kv_groups, float):
        assert abs(groups - widths.kv_groups - kv_groups * groups) <= 0.5 + 1e-9


# --- parameters -----------------------------------------------------------------------------------------------------

MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("gemma3_text", {}),
]


def expert_parameters(base: ResolvedBase, widths: LayerWidths) -> int:
    """The size of the model that transformers builds from the expert's config."""
    kept = [kept_first(widths, shape) for shape in base.layers]
    config = base.family.pruned_config(base.checkpoint.config, kept)
    return sum(math.prod(info.shape) for info in tensors_of(config).values())


@pytest.mark.parametrize(("family", "changes"), MODELS)
@pytest.mark.parametrize(
    "budget",
    [
        {"ffn": 0.25},
        {"kv_groups": 2},
        {"query_heads": 8},
        {"ffn": 64, "kv_groups": 2, "query_heads": 8},
    ],
    ids=["ffn", "groups", "heads", "all"],
)
def test_removed_parameters_are_what_the_smaller_model_lacks(
    family: str, changes: dict[str, Any], budget: dict[str, Any]
) -> None:
    base = base_of(family, **changes)
    widths = resolved(base, **budget)
    assert removed_everywhere(base, widths) == base.checkpoint.parameters - expert_parameters(base, widths)


def test_removed_parameters_written_out() -> None:
    """Hidden 48, two layers, heads of 2: a neuron has three rows; a head two of q and o; a group two more of k and v."""
    base = base_of()
    assert removed_everywhere(base, LayerWidths(192, 4, 4)) == 2 * 64 * 3 * 48
    assert removed_everywhere(base, LayerWidths(256, 3, 4)) == 2 * 4 * 2 * 2 * 48
    assert removed_everywhere(base, LayerWidths(256, 4, 3)) == 2 * 1 * (4 * 2 * 2 + 2 * 2) * 48
    assert removed_everywhere(base, LayerWidths(256, 3, 3)) == 2 * ((4 * 2 * 2 + 2 * 2) + 3 * 2 * 2) * 48


@pytest.mark.parametrize("heads", [{}, {"kv_groups": 0.5}, {"query_heads": 0.5}, {"kv_groups": 2, "query_heads": 8}])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.25, 0.5])
def test_a_fraction_of_parameters_is_met_by_the_smallest_cut(heads: dict[str, Any], fraction: float) -> None:
    base = base_of()
    widths = resolved(base, parameters=fraction, multiple_of=8, **heads)
    before = base.checkpoint.parameters

    def removed(ffn: int) -> int:
        return before - expert_parameters(base, LayerWidths(ffn, widths.heads_per_group, widths.kv_groups))

    assert widths.ffn % 8 == 0
    assert removed(widths.ffn) >= fraction * before
    assert widths.ffn == 256 or removed(widths.ffn + 8) < fraction * before


@pytest.mark.parametrize(
    ("heads", "floor"), [({}, 0.1), ({}, 0.5), ({}, 1.0), ({"kv_groups": 0.5}, 0.1), ({"kv_groups": 0.5}, 0.5)]
)
def test_parameters_that_cannot_be_reached_name_the_largest_which_is_legal(heads: dict[str, Any], floor: float) -> None:
    base = base_of()
    message = refusal(base, parameters=0.97, floor=floor, **heads)
    largest = named_number(message, "the largest legal one is")
    widths = resolved(base, parameters=largest, floor=floor, **heads)
    least = min(w for w in (64, 128, 192, 256) if w >= floor * 256)
    possible = 1 - expert_parameters(base, LayerWidths(least, 4, widths.kv_groups)) / base.checkpoint.parameters
    assert largest == pytest.approx(possible, abs=1e-4)
    assert largest <= possible


def test_heads_alone_can_meet_a_fraction_of_parameters() -> None:
    assert resolved(kv_groups=0.5, parameters=0.02).ffn == 256


# --- what is written into the plan ----------------------------------------------------------------------------------


def test_the_summary_says_what_was_asked_and_what_is_done() -> None:
    budget, shapes = Budget(ffn={"keep": 192}, kv_groups=0.5, query_heads=8), base_of().layers
    assert summary(budget, shapes, uniform_widths(budget, base_of())) == {
        "ffn": StructureBudget(requested=Keep(192), of=256, kept=192, removed=64),
        "query_heads": StructureBudget(requested=8, of=16, kept=4, removed=12),
        "kv_groups": StructureBudget(requested=0.5, of=4, kept=2, removed=2),
    }


def test_the_summary_lists_layers_that_differ() -> None:
    base, widths = base_of(), [LayerWidths(192, 4, 4), LayerWidths(64, 4, 2)]
    assert summary(Budget(ffn=0.5), base.layers, widths) == {
        "ffn": StructureBudget(requested=0.5, of=[256, 256], kept=[192, 64], removed=[64, 192]),
        "query_heads": StructureBudget(requested=0, of=[16, 16], kept=[16, 8], removed=[0, 8]),
        "kv_groups": StructureBudget(requested=0, of=[4, 4], kept=[4, 2], removed=[0, 2]),
    }
    # A neuron has three rows of 48; a group two of k and v and eight of q and o, each twice as there are two channels.
    assert removed_parameters(base, widths) == 64 * 3 * 48 + 192 * 3 * 48 + 2 * (4 * 2 * 2 + 2 * 2) * 48


# --- a number of parameters that may be left ------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_max_parameters_is_met_by_the_smallest_cut(fraction: float) -> None:
    base = base_of()
    before = base.checkpoint.parameters
    most = int(before * (1 - fraction))
    widths = resolved(base, max_parameters=most, multiple_of=8)
    assert expert_parameters(base, widths) <= most
    assert expert_parameters(base, LayerWidths(widths.ffn + 8, 4, 4)) > most


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_max_parameters_that_the_base_does_not_exceed_are_no_cut(more: int) -> None:
    size = base_of().checkpoint.parameters
    message = refusal(max_parameters=size + more)
    assert message == f"budget.max_parameters: {size + more:,} is no cut: the base has {size:,} parameters"


@pytest.mark.parametrize("heads", [{}, {"kv_groups": 0.5}])
def test_max_parameters_that_cannot_be_reached_name_the_smallest_which_can(heads: dict[str, Any]) -> None:
    base = base_of()
    message = refusal(base, max_parameters=1000, floor=0.5, **heads)
    found = re.search(r"the smallest legal one is ([0-9,]+);", message)
    assert found is not None
    smallest = int(found[1].replace(",", ""))
    widths = resolved(base, max_parameters=smallest, floor=0.5, **heads)
    assert expert_parameters(base, widths) == smallest
    refusal(base, max_parameters=smallest - 1, floor=0.5, **heads)


def test_layers_of_different_widths_have_no_uniform_cut() -> None:
    base = base_of()
    other = replace(base, layers=(base.layers[0], replace(base.layers[1], ffn=128)))
    assert "use allocation: global" in refusal(other, ffn=0.5)
