"""The oracle for mixture of experts: a cut model computes what the base does with the dropped experts' logits at −∞."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from expertprune.arch import families
from expertprune.errors import CheckpointError, PlanError
from expertprune.models.base import resolve_base
from expertprune.models.masking import masked as masked_by_package
from expertprune.pruning.selfcheck import check_family
from expertprune.spec.schema import Base
from expertprune.units import Structure
from tests.oracle import (
    SHARDS,
    GetDense,
    assert_same,
    bases_of,
    exact,
    generated,
    load,
    logits_of,
    masked,
    masked_logits,
    plan_of,
    pruned,
    random_plan,
    read_json,
    resolved,
    stored_tensors,
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
# Every cut in one variant with its heads and one without; as much as may go in the others.
CASES = [
    (variant, cut)
    for variant, changes in VARIANTS.items()
    for cut in CUTS
    if OF_EXPERTS[changes["family"]].heads_are_units or set(CUTS[cut]) <= {"experts", "ffn"}
    if variant in ("mixtral", "olmoe") or cut in ("everything", "experts and neurons", "as many as are chosen")
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("experts"))


def test_every_family_of_experts_is_here() -> None:
    assert {changes["family"] for changes in VARIANTS.values()} == set(OF_EXPERTS)


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


MATRICES = {  # on disk: what makes a neuron, which owns a row of it, and what reads it, of which a neuron owns a column
    "mixtral": {"w1": 0, "w3": 0, "w2": 1},
    "olmoe": {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
    "qwen2_moe": {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
    "qwen3_moe": {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
}


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_names_on_disk_stay_those_of_the_base_and_are_numbered_anew(family: str, dense: Any, tmp_path: Path) -> None:
    base = dense(family).base
    plan = random_plan(base, 3, experts=4, ffn=8)
    before, after = stored_tensors(base.folder), stored_tensors(pruned(plan, base, tmp_path / "expert"))
    single = [name for name in before if ".experts." in name]
    assert len(single) == 3 * 6 * 3  # three layers of six experts of three matrices
    gone = {name for name in single if int(name.partition(".experts.")[2].partition(".")[0]) >= 4}
    assert set(after) == set(before) - gone
    width = 32 if family in ("mixtral", "olmoe") else 16
    for name, tensor in after.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        kept = plan.kept[layer]
        if name in single:
            prefix, _, rest = name.partition(".experts.")
            number, _, matrix = rest.partition(".")
            old = kept.experts[int(number)]
            mine = [unit % width for unit in kept.ffn if unit // width == old]
            assert len(mine) == 8
            expected = before[f"{prefix}.experts.{old}.{matrix}"]
            axis = MATRICES[family][matrix.removesuffix(".weight")]
            assert torch.equal(tensor, expected[mine] if axis == 0 else expected[:, mine])
        elif name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            assert torch.equal(tensor, before[name][list(kept.experts)])
        else:
            assert torch.equal(tensor, before[name])
    config, old_config = read_json(tmp_path / "expert" / "config.json"), read_json(base.folder / "config.json")
    changed = {key: config[key] for key in config if config[key] != old_config.get(key)}
    assert changed.pop("intermediate_size" if family in ("mixtral", "olmoe") else "moe_intermediate_size") == 8
    assert set(changed) <= {"num_experts", "num_local_experts"}
    assert set(changed.values()) == {4}
    assert config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_experts_that_are_stored_as_they_run_are_cut_too(family: str, tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    model = load(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    torch.testing.assert_close(logits_of(load(folder)), logits_of(model))
    base = resolved(folder, store)
    plan = random_plan(base, 1, experts=4, ffn=8)
    out = pruned(plan, base, tmp_path / "expert")
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.experts.down_proj"].shape[0] == 4
    assert_same(logits_of(exact(out)), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_oracle_sees_neurons_router_rows_and_experts_out_of_step(family: str, dense: Any, tmp_path: Path) -> None:
    of = dense(family)
    plan = random_plan(of.base, 3, experts=4, ffn=8)
    expert, expected = exact(pruned(plan, of.base, tmp_path / "expert")), masked_logits(of.model, plan)
    layer = expert.model.layers[1].mlp
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    for rolled in ([(gate_up, 1)], [(down, 2)], [(layer.gate.weight, 0)], [(gate_up, 0), (down, 0)]):
        for parameter, axis in rolled:
            parameter.copy_(parameter.roll(1, axis))
        assert (logits_of(expert) - expected).abs().max() > 1e-2
        for parameter, axis in rolled:
            parameter.copy_(parameter.roll(-1, axis))
    assert_same(logits_of(expert), expected)


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_the_tiny_copy_agrees(family: str, dense: Any) -> None:
    held = check_family(dense(family).base, layer_widths=True)
    assert held == [
        "ffn",
        "experts",
        "experts and ffn",
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


def test_fewer_experts_than_are_chosen_and_uneven_numbers_are_refused(dense: Any, tmp_path: Path) -> None:
    base = dense("mixtral").base
    with pytest.raises(PlanError, match="1 routed experts are fewer than the 2 that the router chooses for each token"):
        pruned(random_plan(base, experts=1), base, tmp_path / "few")
    uneven = [*random_plan(base, experts=4).kept[:2], *random_plan(base, experts=3).kept[2:]]
    with pytest.raises(PlanError, match="family 'mixtral' keeps the same number of routed experts in every layer"):
        pruned(plan_of(base, uneven), base, tmp_path / "uneven")
    uneven = [*random_plan(base, ffn=8).kept[:2], *random_plan(base, ffn=16).kept[2:]]
    with pytest.raises(PlanError, match="family 'mixtral' keeps the same number of neurons in the routed experts of"):
        pruned(plan_of(base, uneven), base, tmp_path / "uneven neurons")


@pytest.mark.parametrize(
    ("missing", "family"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", "qwen3_moe"),
        ("model.layers.0.block_sparse_moe.experts.0.w2.weight", "mixtral"),
        ("model.layers.2.block_sparse_moe.gate.weight", "mixtral"),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", "qwen2_moe"),
    ],
)
def test_a_missing_part_of_an_expert_is_named(missing: str, family: str, tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{missing} is missing"):
        resolve_base(Base(model=str(folder)), store)


def test_experts_of_another_width_than_the_config_says_are_named(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3_moe")
    config = read_json(folder / "config.json") | {"moe_intermediate_size": 24}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.gate_proj\.weight is \[16, 24\], the config makes axis 0 24"
    ):
        resolve_base(Base(model=str(folder)), store)


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str)
def test_layers_without_experts_between_those_with_are_refused(
    changes: dict[str, Any], tmp_path: Path, store: Path
) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3_moe")
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(config))
    (key,) = changes
    with pytest.raises(CheckpointError, match=f"'{key}' is .*, and only .* can be cut"):
        resolve_base(Base(model=str(folder)), store)


def test_routers_that_choose_among_groups_are_refused(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    config = read_json(folder / "config.json")
    for groups in (None, 1):
        (folder / "config.json").write_text(json.dumps(config | {"n_group": groups}))
        assert resolved(folder, store).layers[0].experts == 6
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 3, "topk_group": 2}))
    with pytest.raises(CheckpointError, match=r"'n_group' is 3: a router that chooses among groups of experts cannot"):
        resolve_base(Base(model=str(folder)), store)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}, r"\), in groups \(n_group: 2\), "),
        ({}, r"\), "),
    ],
    ids=str,
)
def test_experts_of_a_family_without_a_file_are_refused_whatever_their_tensors_look_like(
    groups: dict[str, Any], words: str, tmp_path: Path, store: Path
) -> None:
    sizes = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4)
    config = DeepseekV2Config(
        **sizes, **groups, vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    start = r"'deepseek_v2' routes tokens to experts \(n_routed_experts: 6"
    with pytest.raises(CheckpointError, match=f"{start}{words}and no file says how; .*mixtral, olmoe"):
        resolve_base(Base(model=str(tmp_path / "base")), store)


def test_shared_experts_are_no_units() -> None:
    for family in OF_EXPERTS.values():
        assert {Structure.EXPERTS, Structure.FFN} <= set(family.structures)
        assert not any("shared" in tensor.name for tensor in family.tensors)
