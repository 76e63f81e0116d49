"""The oracle for mixture of experts: a cut model computes what the base does with the dropped experts' logits at −∞."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1Config, Dots1ForCausalLM

from expertprune.arch import families
from expertprune.errors import CheckpointError, PlanError
from expertprune.models.checkpoint import INDEX
from expertprune.models.masking import masked as masked_by_package
from expertprune.pruning.selfcheck import check_family
from expertprune.units import Structure
from tests import oracle
from tests.oracle import SHARDS, GetDense, change_config, exact, load, logits_of, plan_of, pruned, random_plan, resolved
from tests.pruning.cutting import assert_as_planned, assert_cut_as_planned
from tests.tiny import save_tiny, tiny_tokenizer

OF_EXPERTS = {family.family: family for family in families().values() if family.experts is not None}
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in OF_EXPERTS},
    "olmoe, normalized": {"family": "olmoe", "norm_topk_prob": True},
    "qwen3_moe, a layer without": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "qwen3_moe, not normalized, bias": {"family": "qwen3_moe", "norm_topk_prob": False, "attention_bias": True},
    "deepseek_v2, no groups": {"family": "deepseek_v2", "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3, not normalized": {"family": "deepseek_v3", "norm_topk_prob": False, "topk_group": 2},
    "ernie4_5_moe, bias": {"family": "ernie4_5_moe", "use_bias": True, "moe_layer_interval": 2, "head_dim": 6},
}
KEPT = {Structure.EXPERTS: ("experts", 3), Structure.FFN: ("ffn", 8), Structure.QUERY_HEADS: ("heads_per_group", 1),
        Structure.KV_GROUPS: ("kv_groups", 2)}  # fmt: skip


def allowed(variant: str) -> dict[str, int]:
    """As much as the family allows; a router that first chooses one of two groups needs two experts in each."""
    widths = dict(KEPT[structure] for structure in OF_EXPERTS[VARIANTS[variant]["family"]].structures)
    return widths | ({"experts": 4} if variant.startswith("deepseek") and "no groups" not in variant else {})


# Every structure alone where weights are renamed and where they are transposed; as much as may go in the others.
CASES: list[tuple[str, dict[str, int]]] = [
    *((variant, allowed(variant)) for variant in VARIANTS),
    *((family, cut) for family in ("mixtral", "gpt_oss") for cut in ({"experts": 2}, {"ffn": 12}, {"kv_groups": 2})),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return oracle.bases_of(VARIANTS, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize(("variant", "cut"), CASES, ids=str)
def test_cut_model_equals_masked_model(variant: str, cut: dict[str, int], dense: GetDense, tmp_path: Path) -> None:
    number = CASES.index((variant, cut))
    of = dense(variant, list(SHARDS)[number % 2])
    plan = random_plan(of.base, number, **cut)
    expert = exact(pruned(plan, of.base, tmp_path / "expert"))
    assert_as_planned(expert, of.model, plan)
    with masked_by_package(of.model, of.base.family, of.base.layers, plan.kept):
        oracle.assert_same(logits_of(of.model), logits_of(expert))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "ernie4_5_moe"])
def test_experts_that_are_stored_as_they_run_are_cut_too(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    tensors = load(folder).state_dict()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    base = resolved(folder, tmp_path / "store")
    plan = random_plan(base, 1, experts=4, ffn=8 if Structure.FFN in base.family.structures else None)
    out = assert_cut_as_planned(plan, base, tmp_path / "expert")
    assert load_file(out / "model.safetensors")["model.layers.1.mlp.experts.down_proj"].shape[0] == 4


@pytest.mark.parametrize(
    ("variant", "held"),
    [
        ("deepseek_v3", ["experts"]),
        ("ernie4_5_moe, bias", ["experts", "kv_groups", "query_heads"]),
        ("gpt_oss", ["ffn", "experts", "experts and ffn", "kv_groups", "query_heads"]),
        ("qwen3_next", ["ffn", "experts", "experts and ffn"]),
    ],
)
def test_the_tiny_copy_agrees(variant: str, held: list[str], dense: GetDense) -> None:
    layers = "bias" not in variant  # of which the second has experts, a rule that not every layer can be taken from
    found = check_family(dense(variant).base, layer_widths=True, layers=layers)
    assert found == held + (["a whole layer"] if layers else [])


def test_an_expert_can_be_cut_again(dense: GetDense, tmp_path: Path) -> None:
    first = dense("qwen2_moe").base
    base = resolved(pruned(random_plan(first, 1, experts=4, ffn=12), first, tmp_path / "first"), tmp_path / "store")
    assert (base.layers[0].experts, base.layers[0].ffn) == (4, 12)
    assert_cut_as_planned(random_plan(base, 2, experts=3, ffn=8), base, tmp_path / "second")


def test_numbers_of_units_that_the_config_cannot_say_are_refused(dense: GetDense, tmp_path: Path) -> None:
    base = dense("mixtral").base
    for number, (some, others, words) in enumerate(
        (
            ({"experts": 1}, {"experts": 1}, "1 routed experts are fewer than the 2 that the router chooses for each"),
            ({"experts": 4}, {"experts": 3}, "family 'mixtral' keeps the same number of routed experts in every layer"),
            ({"ffn": 8}, {"ffn": 16}, "family 'mixtral' keeps the same number of neurons in the routed experts of"),
        )
    ):
        first, second = (random_plan(base, **each).kept for each in (some, others))
        with pytest.raises(PlanError, match=words):
            pruned(plan_of(base, [*first[:2], *second[2:]]), base, tmp_path / str(number))


# By what is wrong with a base's folder: a tensor that is missing, or what its config says.
BAD: list[tuple[str, str | dict[str, Any], str]] = [
    ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight", "{} is missing"),
    ("mixtral", "model.layers.2.block_sparse_moe.gate.weight", "{} is missing"),
    ("qwen2_moe", "model.layers.2.mlp.shared_expert.up_proj.weight", "{} is missing"),
    ("qwen3_moe", {"moe_intermediate_size": 24}, r"experts\.0\.gate_proj\.weight is \[16, 24\], the config makes axis 0 24"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"config\.json disagrees with the weights: model\.layers\.1\.mlp\.gate"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, r"config\.json disagrees with the weights: model\.layers\.0\.mlp\.gate"),
    ("mixtral", {"n_group": 3, "topk_group": 2}, "'n_group' is 3: a router that chooses among groups .* cannot lose single"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "wrong", "words"), BAD, ids=str)
def test_experts_that_do_not_fit_are_refused(
    family: str, wrong: str | dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family)
    if isinstance(wrong, str):
        oracle.change_tensors(folder, lambda tensors: tensors.pop(wrong))
    else:
        change_config(folder, **wrong)
    with pytest.raises(CheckpointError, match=words.format(wrong)):
        resolved(folder, tmp_path / "store")


def test_one_group_of_experts_is_none(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    for groups in (None, 1):
        change_config(folder, n_group=groups)
        assert resolved(folder, tmp_path / "store").layers[0].experts == 6


def test_experts_of_a_family_without_a_file_are_refused_whatever_their_tensors_look_like(tmp_path: Path) -> None:
    config = Dots1Config(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6, head_dim=4,
        num_key_value_heads=3, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=2, topk_group=1,
    )  # fmt: skip
    Dots1ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = r"'dots1' routes tokens to experts \(n_routed_experts: 6\), in groups \(n_group: 2\), and no file"
    with pytest.raises(CheckpointError, match=f"{words} says how; .*mixtral, olmoe"):
        resolved(tmp_path / "base", tmp_path / "store")


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "model.layers.3."), ("qwen3_next", "mtp.layers.0.")])
def test_layers_for_multi_token_prediction_are_left_out_and_the_rest_is_cut_as_without_them(
    family: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real ones have another embedding, and routed experts in the number that the config says."""
    plain = save_tiny(tmp_path / "plain", family, max_shard_size=SHARDS["several files"])
    more = save_tiny(tmp_path / "more", family, max_shard_size=SHARDS["several files"])
    last = {key: value for key, value in oracle.stored_tensors(more).items() if key.startswith("model.layers.2.")}
    added = {name + key.removeprefix("model.layers.2."): value for key, value in last.items()}
    added |= {f"{name}eh_proj.weight": torch.ones(24, 48), f"{name}embed_tokens.weight": torch.ones(64, 24)}
    index, files = oracle.read_json(more / INDEX), sorted(more.glob("*.safetensors"))
    shared, own = dict(list(added.items())[:2]), dict(list(added.items())[2:])  # in a file of others, and in their own
    save_file(load_file(files[0]) | shared, files[0], {"format": "pt"})
    save_file(own, more / "prediction.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(shared, files[0].name) | dict.fromkeys(own, "prediction.safetensors")
    (more / INDEX).write_text(json.dumps(index))
    change_config(more, num_nextn_predict_layers=1)

    caplog.set_level("WARNING")
    base, without = resolved(more, tmp_path / "store"), resolved(plain, tmp_path / "store")
    assert f"layers for multi-token prediction ({name}" in caplog.text
    assert base.checkpoint.parameters == without.checkpoint.parameters
    out = pruned(random_plan(base, experts=4), base, tmp_path / "out")
    expected = oracle.stored_tensors(pruned(random_plan(without, experts=4), without, tmp_path / "expected"))
    found = oracle.stored_tensors(out)
    assert found.keys() == expected.keys() == oracle.read_json(out / INDEX)["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert oracle.read_json(out / "config.json")["num_nextn_predict_layers"] == 0
    load(out)
