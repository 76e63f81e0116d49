"""The oracle for every family: a cut model computes what the base computes with the dropped units masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertprune.arch import families
from expertprune.errors import PlanError
from expertprune.pruning.slicing import cut_tensor
from expertprune.units import Structure
from tests.oracle import (
    SHARDS,
    GetDense,
    assert_same,
    bases_of,
    exact,
    generated,
    logits_of,
    masked,
    masked_logits,
    plan_of,
    pruned,
    random_plan,
    random_units,
    read_json,
    resolved,
    stored_tensors,
)
from tests.pruning.test_oracle import CUTS, LAYER_CUTS, exact_layered, run_plain
from tests.tiny import save_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "gemma2": {"family": "gemma2"},
    "gemma2, untied, own head_dim": {
        "family": "gemma2",
        "num_attention_heads": 12,
        "head_dim": 6,
        "tie_word_embeddings": False,
    },
    "mistral": {"family": "mistral"},
    "mistral, tied, own head_dim": {
        "family": "mistral",
        "num_attention_heads": 12,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "olmo2": {"family": "olmo2"},
    "olmo2, tied": {"family": "olmo2", "tie_word_embeddings": True},
    "phi3": {"family": "phi3"},
    "phi3, one head a group": {"family": "phi3", "num_key_value_heads": 6},
    "phi3, part of a head is rotated": {
        "family": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    },
    "qwen3": {"family": "qwen3"},
    "qwen3, no bias, tied, own head_dim": {
        "family": "qwen3",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "num_attention_heads": 12,
        "head_dim": 6,
    },
    "starcoder2": {"family": "starcoder2", "tie_word_embeddings": False},
    "starcoder2, no bias, tied": {"family": "starcoder2", "use_bias": False},
}
WITHOUT_HEADS = [name for name, family in families().items() if family.has_ffn and not family.heads_are_units]


def largest(variant: str) -> str:
    """The cut of all that the variant's family allows."""
    return "ffn" if VARIANTS[variant]["family"] in WITHOUT_HEADS else "all"


# Every structure alone in one variant of each family, and as much as may go in the others.
CASES = [
    (variant, cut)
    for variant in VARIANTS
    for cut in (CUTS if "," not in variant and largest(variant) == "all" else [largest(variant)])
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(variant: str, cut: str, dense: Any, tmp_path: Path) -> None:
    number = CASES.index((variant, cut))
    of = dense(variant, list(SHARDS)[number % 2])
    plan = random_plan(of.base, number, **CUTS[cut])
    folder = pruned(plan, of.base, tmp_path / "expert")
    expected = masked_logits(of.model, plan)
    assert_same(logits_of(exact(folder)), expected)
    assert (expected - logits_of(of.model)).abs().max() > 0.1, "the plan must cut something that matters"
    assert read_json(folder / "config.json")["model_type"] in of.base.family.model_types


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_of_their_own_widths_equal_the_masked_model(variant: str, dense: Any, tmp_path: Path) -> None:
    of = dense(variant)
    generator = torch.Generator().manual_seed(0)
    widths = zip(of.base.layers, LAYER_CUTS[largest(variant)], strict=True)
    plan = plan_of(of.base, [random_units(shape, generator, **kept) for shape, kept in widths])
    expert = exact_layered(pruned(plan, of.base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(of.model, plan))
    with masked(of.model, plan):
        assert torch.equal(generated(expert), generated(of.model))


def test_plain_transformers_builds_layers_of_their_own_widths(dense: Any, tmp_path: Path) -> None:
    """One expert of each family, in a process that has transformers and not this package."""
    expected, folders = [], []
    for number, family in enumerate(sorted({changes["family"] for changes in VARIANTS.values()})):
        changes = {"attn_logit_softcapping": None} if family == "gemma2" else {}  # the default implementation omits it
        folder = save_tiny(tmp_path / family, family, **changes)
        base = resolved(folder, tmp_path / "store")
        cut = LAYER_CUTS["all" if base.family.heads_are_units else "ffn"]
        generator = torch.Generator().manual_seed(number)
        units = [random_units(shape, generator, **kept) for shape, kept in zip(base.layers, cut, strict=True)]
        folders.append(str(pruned(plan_of(base, units), base, tmp_path / f"{family} expert")))
        expected.append(masked_logits(exact(folder), plan_of(base, units)))
    found = run_plain(tmp_path, folders)
    for number, logits in enumerate(expected):
        assert_same(found[f"logits.{number}"], logits)


@pytest.mark.parametrize("family", sorted({changes["family"] for changes in VARIANTS.values()}))
def test_oracle_sees_one_tensor_that_is_cut_elsewhere(family: str, dense: Any, tmp_path: Path) -> None:
    """In one layer, one tensor keeps other units than the rest: each of those that neurons or groups may leave."""
    of = dense(family, "one file")
    structures = [each for each in (Structure.FFN, Structure.KV_GROUPS) if each in of.base.family.structures]
    groups = {"kv_groups": 2} if Structure.KV_GROUPS in structures else {}
    plan = random_plan(of.base, 1, ffn=19, **groups)
    others = (random_plan(of.base, seed, ffn=19, **groups) for seed in range(2, 20))
    other = next(each for each in others if not groups or each.kept[1].kv_groups != plan.kept[1].kv_groups)
    expert, expected = exact(pruned(plan, of.base, tmp_path / "expert")), masked_logits(of.model, plan)
    stored = stored_tensors(of.base.folder)
    for name in [tensor.name for each in structures for tensor in of.base.family.block(each).tensors]:
        full = f"model.layers.1.{name}"
        if full not in stored:  # a bias that this variant has not
            continue
        parameter = expert.get_parameter(full)
        right = parameter.clone()
        parameter.copy_(cut_tensor(name, stored[full], of.base.family, of.base.layers[1], other.kept[1]))
        # A bias of the keys moves all scores of a query alike but for the rotation: the smallest effect of them all.
        assert (logits_of(expert) - expected).abs().max() > 1e-3, name
        parameter.copy_(right)


@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_heads_that_depend_on_each_other_are_refused(name: str, dense: Any, tmp_path: Path) -> None:
    base = dense(name).base
    for cut in ("query_heads", "kv_groups", "all"):
        with pytest.raises(PlanError, match=f"heads of family '{name}' cannot be cut: q_norm and k_norm"):
            pruned(random_plan(base, **CUTS[cut]), base, tmp_path / cut)


def test_heads_of_the_fused_family_stay_where_long_texts_are_scaled(tmp_path: Path, store: Path) -> None:
    """transformers checks the factors' number against hidden_size / num_attention_heads."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.0],
        "long_factor": [2.0, 3.0],
        "partial_rotary_factor": 1.0,
    }
    folder = save_tiny(
        tmp_path / "base",
        "phi3",
        rope_parameters=rope,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    base = resolved(folder, store)
    with pytest.raises(PlanError, match=r"config says rope_parameters\.rope_type: 'longrope', and only 'default'"):
        pruned(random_plan(base, kv_groups=2), base, tmp_path / "refused")
    plan = random_plan(base, ffn=19)
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))
