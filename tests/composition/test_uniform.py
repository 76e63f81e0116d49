"""Budgets: met exactly, or an error that names what is legal, and what it names is legal."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertprune.arch import family_of
from expertprune.artifacts.plan import StructureBudget
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import LayerWidths, first_units, legal_widths, may_keep, summary
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.spec.schema import Budget
from expertprune.units import LayerShape, Structure
from tests.bases import base_of, tensors_of


def bare_base(shape: LayerShape) -> ResolvedBase:
    """A base of two layers without tensors, where sizes do not matter."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.config = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    shapes, cpu = (shape, shape), torch.device("cpu")
    return ResolvedBase("b", Path(), checkpoint, family_of("llama"), shapes, Path(), "t", torch.float32, cpu)


def resolved(base: ResolvedBase | None = None, **budget: Any) -> LayerWidths:
    """What each layer keeps, the same in all of them."""
    base = base or base_of()
    widths = uniform_widths(Budget(**budget), base)
    assert len(set(widths)) == 1
    assert len(widths) == len(base.layers)
    return widths[0]


def refusal(base: ResolvedBase | None = None, **budget: Any) -> str:
    with pytest.raises(PlanError) as error:
        resolved(base, **budget)
    return str(error.value)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"parameters": 0.0}, (256, 4, 4)),
        ({"ffn": 0.375}, (192, 4, 4)),  # half way: the wider of two
        ({"ffn": 0.85}, (64, 4, 4)),  # nearer to 64 than to nothing
        ({"ffn": 0.02, "multiple_of": 50}, (250, 4, 4)),
        ({"ffn": {"keep": "75%"}}, (192, 4, 4)),
        ({"kv_groups": {"keep": 3}}, (256, 4, 3)),
        ({"query_heads": {"keep": 4}}, (256, 1, 4)),
        ({"query_heads": 0.7}, (256, 1, 4)),  # 2.8 of 4 heads of a group
        ({"kv_groups": 2, "query_heads": 8}, (256, 2, 2)),  # counts are of the base's heads
    ],
)
def test_widths_of_a_budget(budget: dict[str, Any], expected: tuple[int, int, int]) -> None:
    assert resolved(**budget) == LayerWidths(*expected)


@pytest.mark.parametrize(
    ("base", "budget", "words"),
    [
        ({}, {"ffn": 1}, "1 neurons cannot be removed (kept widths are multiples of 64 and at least 10% of 256)"),
        ({}, {"ffn": {"keep": 150}}, "legal near it: keep: 192 and keep: 128"),
        ({}, {"ffn": {"keep": 257}}, "keep: 257 is more than the 256 that there are"),
        ({}, {"ffn": 0.5, "multiple_of": 300}, "nothing can be removed from 256 neurons"),
        ({}, {"ffn": 64, "floor": 0.9}, "nothing can be removed: lower budget.multiple_of"),
        ({"hidden": 32}, {"query_heads": 5}, "not the same number in each of 4 KV groups; legal: 0, 8, 12"),
        ({}, {"query_heads": 8, "floor": 0.6}, "at most 1 of 4 query heads of each"),
        ({}, {"kv_groups": 0.9}, "at most 3 of 4 KV groups can be removed (0.75)"),
        (
            {},
            {"kv_groups": 0.5, "query_heads": 0.5, "floor": 0.5},
            "leave 4 of 16 query heads, fewer than budget.floor",
        ),
        ({"groups": 1}, {"kv_groups": 0.1}, "removes nothing; none can be removed here"),
        ({"per_group": 1}, {"query_heads": 0.5}, "use budget.kv_groups"),
        ({"hidden": 32}, {"query_heads": 4}, "with 4 KV groups kept, legal counts are 4, 8, 16"),
        ({"hidden": 32}, {"kv_groups": 1}, "with 3 KV groups kept, legal counts are none"),
        ({"family": "qwen2", "hidden": 32}, {"query_heads": 4}, "12 query heads do not divide the hidden size 32"),
        ({}, {"max_parameters": 10**9}, "budget.max_parameters: 1,000,000,000 is no cut: the base has"),
    ],
)
def test_what_cannot_be_is_refused(base: dict[str, Any], budget: dict[str, Any], words: str) -> None:
    """12 and 6 heads do not divide a hidden size of 32; 4, 8 and 16 do."""
    assert words in refusal(base_of(**base), **budget)


def test_what_a_refusal_names_is_legal() -> None:
    for removed in (1, 65, 255, 10_000):
        named = re.search(r"legal counts near it: (\d+) and (\d+); the largest is (\d+)", refusal(ffn=removed))
        assert named is not None
        near = sorted((64, 128, 192), key=lambda count: abs(count - removed))[:2]
        assert [int(n) for n in named.groups()] == [*sorted(near), 192]
        assert all(resolved(ffn=int(n)).ffn == 256 - int(n) for n in named.groups())
    for key, fraction, floor, expected in (
        ("ffn", 0.1, 0.1, LayerWidths(192, 4, 4)),
        ("ffn", 0.7, 0.6, LayerWidths(192, 4, 4)),
        ("query_heads", 0.1, 0.1, LayerWidths(256, 2, 4)),
        ("kv_groups", 0.1, 0.1, LayerWidths(256, 4, 2)),
    ):
        message = refusal(base_of(hidden=32), **{key: fraction}, floor=floor)
        named = re.search(r"the (?:largest|smallest) legal one is (?:64 neurons, )?([0-9.]+)", message)
        assert named, message
        assert resolved(base_of(hidden=32), **{key: float(named[1].rstrip("."))}, floor=floor) == expected


AMOUNTS = {"query_heads": 31, "kv_groups": 7, "ffn": 64}


@given(
    groups=st.integers(1, 6),
    per_group=st.integers(1, 5),
    hidden=st.sampled_from([16, 24, 30, 32, 60]),
    asked=st.fixed_dictionaries(
        {key: st.one_of(st.integers(0, most), st.floats(0, 1, exclude_max=True)) for key, most in AMOUNTS.items()}
    ),
    multiple_of=st.sampled_from([1, 4, 10, 16]),
    floor=st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.9, 1.0]),
)
@settings(deadline=None, max_examples=100)
def test_any_budget_gives_widths_that_llama_can_say_or_is_refused(
    groups: int, per_group: int, hidden: int, asked: dict[str, float], multiple_of: int, floor: float
) -> None:
    base = bare_base(LayerShape(hidden, 64, groups * per_group, groups, 2))
    try:
        widths = resolved(base, **asked, multiple_of=multiple_of, floor=floor)
    except PlanError:
        assert any(asked.values())
        return
    legal = [w for w in range(multiple_of, 64, multiple_of) if w >= floor * 64 - 1e-9] + [64]
    assert widths.ffn in legal
    assert max(1, floor * groups - 1e-9) <= widths.kv_groups <= groups
    assert max(1, floor * per_group - 1e-9) <= widths.heads_per_group <= per_group
    changed = (widths.kv_groups, widths.heads_per_group) != (groups, per_group)
    assert not changed or hidden % widths.query_heads == 0
    kept = {"query_heads": groups * widths.heads_per_group, "kv_groups": widths.kv_groups, "ffn": widths.ffn}
    for key, of in (("query_heads", groups * per_group), ("kv_groups", groups), ("ffn", 64)):
        assert (kept[key] < of) == bool(asked[key])
        assert of - kept[key] == asked[key] or not isinstance(asked[key], int)
    if isinstance(asked["kv_groups"], float):
        assert abs(groups - widths.kv_groups - asked["kv_groups"] * groups) <= 0.5 + 1e-9
    if isinstance(asked["ffn"], float):
        assert widths.ffn == min(legal, key=lambda width: (abs(width - 64 * (1 - asked["ffn"])), -width))


def expert_parameters(base: ResolvedBase, widths: LayerWidths) -> int:
    """The size of the model that transformers builds from the expert's config."""
    kept = [first_units(widths, shape) for shape in base.layers]
    config = base.family.pruned_config(base.checkpoint.config, kept)
    return sum(math.prod(info.shape) for info in tensors_of(config).values())


BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", BIASED), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gemma3_text", {})],
)
def test_removed_parameters_are_what_the_smaller_model_lacks(family: str, changes: dict[str, Any]) -> None:
    base = base_of(family, **changes)
    for budget in ({"ffn": 0.25}, {"kv_groups": 2}, {"query_heads": 8}, {"ffn": 64, "kv_groups": 2, "query_heads": 8}):
        widths = resolved(base, **budget)
        assert removed_parameters(base, [widths] * 2) == base.checkpoint.parameters - expert_parameters(base, widths)


@pytest.mark.parametrize(
    ("heads", "floor"), [({}, 0.1), ({"kv_groups": 2, "query_heads": 8}, 0.1), ({}, 1.0), ({"kv_groups": 0.5}, 0.5)]
)
def test_parameters_are_met_by_the_smallest_cut_and_what_cannot_be_names_the_largest(
    heads: dict[str, Any], floor: float
) -> None:
    base, rules = base_of(), {"multiple_of": 8, "floor": floor, **heads}
    before = base.checkpoint.parameters
    for fraction in (0.01, 0.2, 0.5) if floor < 0.5 else ():
        widths = resolved(base, parameters=fraction, **rules)
        assert widths.ffn % 8 == 0
        assert before - expert_parameters(base, widths) >= fraction * before
        wider = before - expert_parameters(base, replace(widths, ffn=min(256, widths.ffn + 8)))
        assert widths.ffn == 256 or wider < fraction * before
        assert resolved(base, max_parameters=int(before * (1 - fraction)), **rules) == widths
    told = refusal(base, parameters=0.97, **rules)
    named = re.search(r"the largest legal one is ([0-9.]+);", told)
    assert named
    assert told.endswith("or budget.layers or budget.vocabulary, or lower budget.floor") == (not heads.get("kv_groups"))
    widths = resolved(base, parameters=float(named[1]), **rules)
    assert widths.ffn == {0.1: 32, 0.5: 128, 1.0: 256}[floor]
    left = expert_parameters(base, widths)
    assert 1 - left / before - 1e-4 <= float(named[1]) <= 1 - left / before
    if floor < 1:
        assert f"the smallest legal one is {left:,};" in refusal(base, max_parameters=1000, **rules)
        assert resolved(base, max_parameters=left, **rules) == widths


def test_layers_that_differ() -> None:
    base, widths = base_of(), [LayerWidths(192, 4, 4), LayerWidths(64, 4, 2)]
    assert summary(Budget(ffn=0.5), base.layers, widths) == {
        "ffn": StructureBudget(requested=0.5, of=[256, 256], kept=[192, 64], removed=[64, 192]),
        "query_heads": StructureBudget(requested=0, of=[16, 16], kept=[16, 8], removed=[0, 8]),
        "kv_groups": StructureBudget(requested=0, of=[4, 4], kept=[4, 2], removed=[0, 2]),
    }
    other = replace(base, layers=(base.layers[0], replace(base.layers[1], ffn=128)))
    assert "use allocation: global" in refusal(other, ffn=0.5)
    # A neuron has three rows of 48; a group two of k and v and eight of q and o, each twice as there are two channels.
    assert removed_parameters(base, widths) == 64 * 3 * 48 + 192 * 3 * 48 + 2 * (4 * 2 * 2 + 2 * 2) * 48


def test_widths_can_be_shared_among_gpus() -> None:
    shape, gpus = LayerShape(64, 1024, 16, 8, 4), {"tensor_parallel": 4}
    base = bare_base(shape)
    assert resolved(base, ffn=0.3, **gpus).ffn == 768  # of multiples of 4 · 64, the nearest to 716.8
    assert "multiples of 256" in refusal(base, ffn=128, **gpus)
    assert resolved(base, kv_groups=4, **gpus).kv_groups == 4
    message = refusal(base, kv_groups=3, **gpus)
    assert "10 query heads in 5 KV groups would stay, which cannot be shared among 4 GPUs" in message
    assert "legal: 8 in 8 KV groups; 8 in 4 KV groups; 4 in 4 KV groups" in message
    budget = Budget(kv_groups=1, **gpus)
    assert legal_widths(base, budget, 0, Structure.KV_GROUPS) == [8, 4]
    assert legal_widths(base, budget, 0, Structure.FFN) == [1024, 768, 512, 256]
    assert not may_keep(base, budget, 0, LayerWidths(1024, 2, 6))
    message = refusal(bare_base(LayerShape(24, 1000, 6, 3, 4)), ffn=0.25, tensor_parallel=16)
    assert "layer 0 of this base has 1000 FFN neurons and 6 query heads and 3 KV heads" in message
    few = bare_base(replace(shape, kv_heads=2))  # each KV head is on two of four GPUs, which vLLM allows
    assert resolved(few, ffn=256, **gpus).kv_groups == 2
    message = refusal(few, kv_groups=1, **gpus)
    assert "8 query heads in 1 KV groups would stay" in message
    assert "no cut of heads" not in message
