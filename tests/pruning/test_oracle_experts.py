"""The oracle for mixture of experts: a cut model computes what the base does with the dropped experts' logits at −∞."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1Config, Dots1ForCausalLM

from expertprune.arch import families
from expertprune.errors import CheckpointError, PlanError
from expertprune.models.masking import masked as masked_by_package
from expertprune.pruning.selfcheck import check_family
from expertprune.units import Structure
from tests.oracle import (
    SHARDS,
    GetDense,
    assert_same,
    bases_of,
    change_config,
    change_tensors,
    exact,
    generated,
    load,
    logits_of,
    masked,
    masked_logits,
    plan_of,
    pruned,
    random_plan,
    resolved,
)
from tests.tiny import save_tiny, tiny_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "mixtral, tied": {"family": "mixtral", "tie_word_embeddings": True},
    "olmoe": {"family": "olmoe"},
    "olmoe, normalized": {"family": "olmoe", "norm_topk_prob": True},
    "qwen2_moe": {"family": "qwen2_moe"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe, not normalized, bias": {"family": "qwen3_moe", "norm_topk_prob": False, "attention_bias": True},
    "qwen3_moe, a layer without": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "deepseek_v2": {"family": "deepseek_v2"},
    "deepseek_v2, no groups": {"family": "deepseek_v2", "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3, not normalized": {"family": "deepseek_v3", "norm_topk_prob": False, "topk_group": 2},
    "glm4_moe": {"family": "glm4_moe"},
    "ernie4_5_moe": {"family": "ernie4_5_moe"},
    "ernie4_5_moe, bias": {"family": "ernie4_5_moe", "use_bias": True, "moe_layer_interval": 2, "head_dim": 6},
    "gpt_oss": {"family": "gpt_oss"},
    "qwen3_next": {"family": "qwen3_next"},
}
CUTS: dict[str, dict[str, int]] = {
    "experts": {"experts": 4},
    "as many as are chosen": {"experts": 2},
    "neurons": {"ffn": 12},
    "experts and neurons": {"experts": 4, "ffn": 4},
    "kv_groups": {"kv_groups": 2},
    "experts and heads": {"experts": 3, "heads_per_group": 1, "kv_groups": 2},
    "everything": {"experts": 3, "ffn": 8, "heads_per_group": 1, "kv_groups": 2},
}
OF_EXPERTS = {family.family: family for family in families().values() if family.experts is not None}


def allowed(variant: str, cut: str) -> bool:
    """Whether the family allows the cut; a router that first chooses one of two groups needs two experts in each."""
    family, widths = OF_EXPERTS[VARIANTS[variant]["family"]], CUTS[cut]
    grouped = variant.startswith("deepseek") and "no groups" not in variant
    if grouped and widths.get("experts") not in (None, 4):
        return False
    names = {"heads_per_group": "query_heads"}
    return {names.get(name, name) for name in widths} <= {structure.value for structure in family.structures}


# Every cut in one variant with its heads and one without; as much as may go in the others.
FULL = ("mixtral", "olmoe", "gpt_oss")
MUCH = ("everything", "experts and heads", "experts and neurons", "as many as are chosen")
CASES = [
    (variant, cut)
    for variant in VARIANTS
    for cut in CUTS
    if allowed(variant, cut) and (variant in FULL or cut in MUCH or variant.startswith("deepseek"))
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(variant: str, cut: str, dense: Any, tmp_path: Path) -> None:
    number = CASES.index((variant, cut))
    of = dense(variant, list(SHARDS)[number % 2])
    plan = random_plan(of.base, number, **CUTS[cut])
    folder = pruned(plan, of.base, tmp_path / "expert")
    expert = exact(folder)
    expected = masked_logits(of.model, plan)
    assert_same(logits_of(expert), expected)
    assert (expected - logits_of(of.model)).abs().max() > 0.1, "the plan must cut something that matters"
    with masked_by_package(of.model, of.base.family, of.base.layers, plan.kept):
        assert_same(logits_of(of.model), expected)
    with masked(of.model, plan):
        assert torch.equal(generated(expert), generated(of.model))


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_experts_that_are_stored_as_they_run_are_cut_too(family: str, tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    model = load(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    torch.testing.assert_close(logits_of(load(folder)), logits_of(model))
    base = resolved(folder, store)
    plan = random_plan(base, 1, experts=4, ffn=8 if Structure.FFN in base.family.structures else None)
    out = pruned(plan, base, tmp_path / "expert")
    assert load_file(out / "model.safetensors")["model.layers.1.mlp.experts.down_proj"].shape[0] == 4
    assert_same(logits_of(exact(out)), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_the_tiny_copy_agrees(family: str, dense: Any) -> None:
    held = check_family(dense(family).base, layer_widths=True)
    neurons = Structure.FFN in OF_EXPERTS[family].structures
    assert held == [
        *(["ffn"] if neurons else []),
        "experts",
        *(["experts and ffn"] if neurons else []),
        *(["kv_groups", "query_heads"] if OF_EXPERTS[family].heads_are_units else []),
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_an_expert_can_be_cut_again(family: str, dense: Any, tmp_path: Path, store: Path) -> None:
    first = dense(family).base
    base = resolved(pruned(random_plan(first, 1, experts=4, ffn=12), first, tmp_path / "first"), store)
    assert (base.layers[0].experts, base.layers[0].ffn) == (4, 12)
    plan = random_plan(base, 2, experts=3, ffn=8)
    expert = exact(pruned(plan, base, tmp_path / "second"))
    assert_same(logits_of(expert), masked_logits(exact(base.folder), plan))


UNEVEN: list[tuple[tuple[dict[str, int], dict[str, int]], str]] = [
    (({"experts": 1}, {"experts": 1}), "1 routed experts are fewer than the 2 that the router chooses for each token"),
    (({"experts": 4}, {"experts": 3}), "family 'mixtral' keeps the same number of routed experts in every layer"),
    (({"ffn": 8}, {"ffn": 16}), "family 'mixtral' keeps the same number of neurons in the routed experts of"),
]


@pytest.mark.parametrize(("widths", "words"), UNEVEN, ids=str)
def test_numbers_of_units_that_the_config_cannot_say_are_refused(
    widths: tuple[dict[str, int], dict[str, int]], words: str, dense: Any, tmp_path: Path
) -> None:
    base = dense("mixtral").base
    first, second = (random_plan(base, **each).kept for each in widths)
    with pytest.raises(PlanError, match=words):
        pruned(plan_of(base, [*first[:2], *second[2:]]), base, tmp_path / "expert")


@pytest.mark.parametrize(
    ("missing", "family"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", "qwen3_moe"),
        ("model.layers.2.block_sparse_moe.gate.weight", "mixtral"),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", "qwen2_moe"),
    ],
)
def test_a_missing_part_of_an_expert_is_named(missing: str, family: str, tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    change_tensors(folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(CheckpointError, match=f"{missing} is missing"):
        resolved(folder, store)


CONFIGS: list[tuple[str, dict[str, Any], str | None]] = [
    (
        "qwen3_moe",
        {"moe_intermediate_size": 24},
        r"experts\.0\.gate_proj\.weight is \[16, 24\], the config makes axis 0 24",
    ),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"config\.json disagrees with the weights: model\.layers\.1\.mlp\.gate"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, r"config\.json disagrees with the weights: model\.layers\.0\.mlp\.gate"),
    (
        "mixtral",
        {"n_group": 3, "topk_group": 2},
        "'n_group' is 3: a router that chooses among groups of routed experts cannot lose single ones",
    ),
    ("mixtral", {"n_group": None}, None),
    ("mixtral", {"n_group": 1}, None),
]


@pytest.mark.parametrize(("family", "changes", "words"), CONFIGS, ids=str)
def test_configs_of_experts(
    family: str, changes: dict[str, Any], words: str | None, tmp_path: Path, store: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family)
    change_config(folder, **changes)
    if words is None:
        assert resolved(folder, store).layers[0].experts == 6
    else:
        with pytest.raises(CheckpointError, match=words):
            resolved(folder, store)


def test_experts_of_a_family_without_a_file_are_refused_whatever_their_tensors_look_like(
    tmp_path: Path, store: Path
) -> None:
    config = Dots1Config(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6, head_dim=4,
        num_key_value_heads=3, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=2, topk_group=1,
    )  # fmt: skip
    Dots1ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = r"'dots1' routes tokens to experts \(n_routed_experts: 6\), in groups \(n_group: 2\), and no file"
    with pytest.raises(CheckpointError, match=f"{words} says how; .*mixtral, olmoe"):
        resolved(tmp_path / "base", store)
