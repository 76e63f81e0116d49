"""The oracle: a cut model computes what the base computes with the dropped units masked."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expertprune
from expertprune.arch import family_of
from expertprune.artifacts.plan import Plan
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.spec.reading import parse_spec
from expertprune.units import KeptUnits
from tests.oracle import (
    IDS,
    SHARDS,
    GetDense,
    bases_of,
    contents,
    load,
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
from tests.tiny import save_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "llama, attention bias": {"family": "llama", "attention_bias": True},
    "llama, mlp bias, tied": {"family": "llama", "mlp_bias": True, "tie_word_embeddings": True},
    "llama, both biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, own head_dim": {"family": "llama", "num_attention_heads": 12, "head_dim": 6, "attention_bias": True},
    "llama, one head a group": {"family": "llama", "num_key_value_heads": 6},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2, own head_dim": {"family": "qwen2", "num_attention_heads": 12, "head_dim": 6},
    "gemma3": {"family": "gemma3"},
    "gemma3, untied, attention bias": {"family": "gemma3", "tie_word_embeddings": False, "attention_bias": True},
    "gemma3, own head_dim": {"family": "gemma3", "num_attention_heads": 12, "head_dim": 6},
    "gemma3, one group": {"family": "gemma3", "num_attention_heads": 4, "num_key_value_heads": 1},
}
# Kept per layer. The hidden size is 24, which the query heads that stay must divide:
# of 6 heads in 3 groups 3, 4 and 2 stay, of 12 heads in 3 groups 3, 8 and 2, of 6 heads in 6 groups 2 and 2, of 4 heads
# in one group 1.
CUTS: dict[str, dict[str, int]] = {
    "ffn": {"ffn": 19},
    "query_heads": {"heads_per_group": 1},
    "kv_groups": {"kv_groups": 2},
    "all": {"ffn": 13, "heads_per_group": 1, "kv_groups": 2},
}
CASES = [
    (variant, cut)
    for variant in VARIANTS
    for cut in CUTS
    if (variant, cut) != ("llama, one head a group", "query_heads")  # there a head is a group
    and (variant, cut)
    not in (("gemma3, one group", "kv_groups"), ("gemma3, one group", "all"))  # and here there is one
]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(variant: str, cut: str, shards: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense(variant, shards).base, dense(variant, shards).model
    plan = random_plan(base, CASES.index((variant, cut)), **CUTS[cut])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    expected = masked_logits(model, plan)
    torch.testing.assert_close(logits_of(expert), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(model)).abs().max() > 0.1, "the plan must cut something that matters"


@pytest.mark.parametrize("variant", ["llama, both biases", "llama, mlp bias, tied", "qwen2", "gemma3"])
@pytest.mark.parametrize("cut", CUTS)
def test_index_lists_every_written_tensor_where_it_lies(
    variant: str, cut: str, dense: GetDense, tmp_path: Path
) -> None:
    base = dense(variant, "several files").base
    folder = pruned(random_plan(base, **CUTS[cut]), base, tmp_path / "expert")
    index = read_json(folder / "model.safetensors.index.json")
    tensors = stored_tensors(folder)
    assert set(index["weight_map"]) == set(tensors)
    for path in folder.glob("*.safetensors"):
        assert set(load_file(path)) == {name for name, file in index["weight_map"].items() if file == path.name}
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_config_changes_in_the_widths_only(family: str, cut: str, shards: str, dense: GetDense, tmp_path: Path) -> None:
    base = dense(f"{family}, own head_dim", shards).base
    folder = pruned(random_plan(base, **CUTS[cut]), base, tmp_path / "expert")
    expected = {
        "ffn": {"intermediate_size": 19},
        "query_heads": {"num_attention_heads": 3},
        "kv_groups": {"num_attention_heads": 8, "num_key_value_heads": 2},
        "all": {"intermediate_size": 13, "num_attention_heads": 2, "num_key_value_heads": 2},
    }[cut]
    assert read_json(folder / "config.json") == read_json(base.folder / "config.json") | expected
    assert (folder / "model.safetensors.index.json").exists() == (shards == "several files")


@pytest.mark.parametrize("cut", ["query_heads", "kv_groups", "all"])
def test_qwen2_with_heads_cut_is_a_llama_with_zero_output_biases(cut: str, dense: GetDense, tmp_path: Path) -> None:
    base = dense("qwen2", "several files").base
    folder = pruned(random_plan(base, **CUTS[cut]), base, tmp_path / "expert")
    config = read_json(folder / "config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is False
    assert config["head_dim"] == 4  # 24 / 6 of the base, though the base's config does not say it
    assert not {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"} & set(config)
    assert type(load(folder)).__name__ == "LlamaForCausalLM"
    tensors = stored_tensors(folder)
    for layer in range(3):
        assert torch.equal(tensors[f"model.layers.{layer}.self_attn.o_proj.bias"], torch.zeros(24))
    assert len(tensors) == len(base.checkpoint.tensors) + 3


def test_qwen2_with_neurons_cut_stays_a_qwen2(dense: GetDense, tmp_path: Path) -> None:
    base = dense("qwen2", "one file").base
    folder = pruned(random_plan(base, ffn=19), base, tmp_path / "expert")
    assert type(load(folder)).__name__ == "Qwen2ForCausalLM"
    assert set(stored_tensors(folder)) == set(base.checkpoint.tensors)


@pytest.mark.parametrize("cut", ["ffn", "kv_groups", "all"])
def test_older_configs_leave_head_dim_and_kv_heads_out(cut: str, tmp_path: Path, store: Path) -> None:
    """Where the config says neither, both follow from the query heads, and must be written once these change."""
    folder = save_tiny(tmp_path / "base", "llama", num_key_value_heads=6)
    config = read_json(folder / "config.json")
    del config["head_dim"], config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS[cut])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    torch.testing.assert_close(logits_of(expert), masked_logits(load(folder), plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_rope_and_dtype_in_the_words_of_older_configs(cut: str, tmp_path: Path, store: Path) -> None:
    """Published Qwen2 configs say `rope_theta` and `torch_dtype` at their top level, and no `layer_types`."""
    folder = save_tiny(tmp_path / "base", "qwen2")
    config = read_json(folder / "config.json")
    del config["rope_parameters"], config["layer_types"], config["dtype"]
    config |= {"rope_theta": 50.0, "torch_dtype": "float32"}  # far from the default, so that losing it shows
    (folder / "config.json").write_text(json.dumps(config))
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS[cut])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    assert expert.config.rope_parameters["rope_theta"] == 50.0
    torch.testing.assert_close(logits_of(expert), masked_logits(load(folder), plan), atol=1e-5, rtol=1e-5)


def test_stored_dtype_and_values_are_kept(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen2", max_shard_size="10KB", dtype=torch.bfloat16)
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS["all"])
    before, after = stored_tensors(folder), stored_tensors(pruned(plan, base, tmp_path / "expert"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for layer, kept in enumerate(plan.kept):
        down, out = (f"model.layers.{layer}.{name}.weight" for name in ("mlp.down_proj", "self_attn.o_proj"))
        assert torch.equal(after[down], before[down][:, list(kept.ffn)])
        columns = [4 * head + i for head in kept.query_heads for i in range(4)]
        assert torch.equal(after[out], before[out][:, columns])


def coupled_names() -> list[tuple[str, str, int, int]]:
    """Variant, tensor, axis, and how many positions one unit has on it."""
    llama = [
        *((f"mlp.{part}_proj.{kind}", 0, 1) for part in ("gate", "up") for kind in ("weight", "bias")),
        *((f"self_attn.{part}_proj.{kind}", 0, 4) for part in "qkv" for kind in ("weight", "bias")),
        ("mlp.down_proj.weight", 1, 1),
        ("self_attn.o_proj.weight", 1, 4),
    ]
    qwen2 = [entry for entry in llama if entry[0] not in ("mlp.gate_proj.bias", "mlp.up_proj.bias")]
    return [
        *(("llama, both biases", *entry) for entry in llama),
        *(("qwen2", *entry) for entry in qwen2),
        *(("gemma3, untied, attention bias", *entry) for entry in qwen2),
    ]


@pytest.mark.parametrize(("variant", "name", "axis", "step"), coupled_names())
def test_oracle_sees_a_permutation_of_any_one_coupled_tensor(
    variant: str, name: str, axis: int, step: int, dense: GetDense, tmp_path: Path
) -> None:
    base, model = dense(variant, "one file").base, dense(variant, "one file").model
    plan = random_plan(base, ffn=19, kv_groups=2)
    expert = load(pruned(plan, base, tmp_path / "expert"))
    tensor = expert.get_parameter(f"model.layers.1.{name}")
    tensor.copy_(tensor.roll(step, axis))
    # A bias of the keys moves all scores of a query alike but for the rotation: the smallest effect of them all.
    assert (logits_of(expert) - masked_logits(model, plan)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("structure", ["query_heads", "kv_groups"])
def test_oracle_sees_a_permuted_order_of_kept_heads(
    variant: str, structure: str, dense: GetDense, tmp_path: Path
) -> None:
    base, model = dense(variant, "several files").base, dense(variant, "several files").model
    plan = random_plan(base, kv_groups=2)
    permuted = plan_of(
        base, [dataclasses.replace(kept, **{structure: getattr(kept, structure)[::-1]}) for kept in plan.kept]
    )
    expert = load(pruned(permuted, base, tmp_path / "expert"))
    assert (logits_of(expert) - masked_logits(model, plan)).abs().max() > 0.1


def test_neurons_may_be_permuted_together(dense: GetDense, tmp_path: Path) -> None:
    """Unlike heads, neurons have no order: one order in all their tensors is a symmetry of the network."""
    base, model = dense("llama, both biases", "one file").base, dense("llama, both biases", "one file").model
    plan = random_plan(base, ffn=19)
    permuted = plan_of(base, [dataclasses.replace(kept, ffn=kept.ffn[::-1]) for kept in plan.kept])
    expert = load(pruned(permuted, base, tmp_path / "expert"))
    torch.testing.assert_close(logits_of(expert), masked_logits(model, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_one_unit_of_each_structure_is_enough(family: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense(family, "several files").base, dense(family, "several files").model
    plan = plan_of(base, [KeptUnits((31,), (5,), (2,)), KeptUnits((0,), (0,), (0,)), KeptUnits((7,), (3,), (1,))])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    torch.testing.assert_close(logits_of(expert), masked_logits(model, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "model_type"), [("llama", "llama"), ("qwen2", "llama"), ("gemma3", "gemma3_text")])
def test_an_expert_can_be_cut_again(family: str, model_type: str, dense: GetDense, tmp_path: Path, store: Path) -> None:
    first = dense(family, "several files").base
    folder = pruned(random_plan(first, seed=1, ffn=24, kv_groups=2), first, tmp_path / "first")
    base = resolved(folder, store)
    assert base.family == family_of(model_type)
    plan = random_plan(base, seed=2, ffn=11, heads_per_group=1)
    expert = load(pruned(plan, base, tmp_path / "second"))
    torch.testing.assert_close(logits_of(expert), masked_logits(load(folder), plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_cached_decoding_gives_the_same_tokens(family: str, dense: GetDense, tmp_path: Path) -> None:
    """Generation reads head counts again, for its cache, and the windows of sliding layers."""
    base = dense(family, "several files").base
    expert = load(pruned(random_plan(base, **CUTS["all"]), base, tmp_path / "expert"))
    prompt = IDS[:1, :5]
    cached = expert.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    slow = prompt
    for _ in range(8):
        slow = torch.cat([slow, logits_of(expert, slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, slow)


# --- widths of single layers ----------------------------------------------------------------------------------------

OWN_WIDTHS = [
    "llama",
    "llama, mlp bias, tied",
    "llama, both biases",
    "llama, own head_dim",
    "qwen2",
    "qwen2, own head_dim",
]
# Kept in the first, second and third layer; one of them is left as it was.
LAYER_CUTS: dict[str, list[dict[str, int]]] = {
    "ffn": [{"ffn": 19}, {}, {"ffn": 7}],
    "query_heads": [{"heads_per_group": 1}, {}, {"heads_per_group": 2}],
    "kv_groups": [{"kv_groups": 2}, {}, {"kv_groups": 1}],
    "all": [{"ffn": 13, "heads_per_group": 1, "kv_groups": 2}, {}, {"ffn": 20, "kv_groups": 1}],
}
LAYER_CASES = [(variant, cut) for variant in OWN_WIDTHS for cut in LAYER_CUTS]

# Run where this package cannot be imported: what a user has who has transformers alone.
PLAIN = """
import sys

sys.modules["expertprune"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

out, *folders = sys.argv[1:]
given = load_file(out)
found = {}
for number, folder in enumerate(folders):
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(notes.values()), (folder, notes)
    model.eval()
    with torch.no_grad():
        found[f"logits.{number}"] = model(given["ids"], use_cache=False).logits.contiguous()
        found[f"tokens.{number}"] = model.generate(
            given["prompt"], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1
        )
save_file(found, out)
"""


def layered_plan(base: ResolvedBase, cut: str, seed: int = 0) -> Plan:
    """Random units, of another number in every layer."""
    generator = torch.Generator().manual_seed(seed)
    widths = zip(base.layers, LAYER_CUTS[cut], strict=True)
    return plan_of(base, [random_units(shape, generator, **kept) for shape, kept in widths])


def generated(model: Any) -> Tensor:
    return model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)


@pytest.fixture(scope="session")
def layered(dense: GetDense, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Plan, Path]]:
    root = tmp_path_factory.mktemp("layered")
    made = {}
    for number, (variant, cut) in enumerate(LAYER_CASES):
        base = dense(variant, "several files").base
        plan = layered_plan(base, cut, number)
        made[variant, cut] = (plan, pruned(plan, base, root / f"expert-{number}"))
    return made


@pytest.fixture(scope="session")
def in_plain_transformers(
    layered: dict[tuple[str, str], tuple[Plan, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    return run_plain(tmp_path_factory.mktemp("plain"), [str(path) for _, path in layered.values()])


def run_plain(folder: Path, folders: list[str]) -> dict[str, Tensor]:
    """Logits and generated tokens of every expert, from one process without this package."""
    exchange = folder / "exchange.safetensors"
    save_file({"ids": IDS.contiguous(), "prompt": IDS[:1, :5].clone()}, exchange)
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", PLAIN, str(exchange), *folders]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return load_file(exchange)


@pytest.mark.parametrize(("variant", "cut"), LAYER_CASES)
def test_layers_of_their_own_widths_equal_the_masked_model(
    variant: str,
    cut: str,
    dense: GetDense,
    layered: dict[tuple[str, str], tuple[Plan, Path]],
) -> None:
    model = dense(variant, "several files").model
    plan, folder = layered[variant, cut]
    expected = masked_logits(model, plan)
    expert = load_model(folder, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(expert), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(model)).abs().max() > 0.1, "the plan must cut something that matters"
    with masked(model, plan):
        assert torch.equal(generated(expert), generated(model))


@pytest.mark.parametrize(("variant", "cut"), LAYER_CASES)
def test_plain_transformers_builds_the_same_from_the_folder(
    variant: str,
    cut: str,
    dense: GetDense,
    layered: dict[tuple[str, str], tuple[Plan, Path]],
    in_plain_transformers: dict[str, Tensor],
) -> None:
    model, number = dense(variant, "several files").model, LAYER_CASES.index((variant, cut))
    plan, _ = layered[variant, cut]
    expected = masked_logits(model, plan)
    torch.testing.assert_close(in_plain_transformers[f"logits.{number}"], expected, atol=1e-5, rtol=1e-5)
    with masked(model, plan):
        assert torch.equal(in_plain_transformers[f"tokens.{number}"], generated(model))


@pytest.mark.parametrize(("variant", "cut"), LAYER_CASES)
def test_the_config_says_the_widths_of_the_stored_tensors(
    variant: str, cut: str, layered: dict[tuple[str, str], tuple[Plan, Path]], dense: GetDense
) -> None:
    plan, folder = layered[variant, cut]
    config, tensors = read_json(folder / "config.json"), stored_tensors(folder)
    head_dim = dense(variant, "several files").base.layers[0].head_dim
    assert set(config["per_layer_config"]) <= {"0", "1", "2"}
    for layer, kept in enumerate(plan.kept):
        own = {**config, **config["per_layer_config"].get(str(layer), {})}
        prefix = f"model.layers.{layer}"
        assert own["intermediate_size"] == len(kept.ffn) == tensors[f"{prefix}.mlp.up_proj.weight"].shape[0]
        assert tensors[f"{prefix}.mlp.down_proj.weight"].shape[1] == len(kept.ffn)
        queries, keys = (tensors[f"{prefix}.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        assert own["num_attention_heads"] * head_dim == queries == len(kept.query_heads) * head_dim
        assert own["num_key_value_heads"] * head_dim == keys == len(kept.kv_groups) * head_dim
    index = read_json(folder / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(tensors)


def test_layers_of_one_width_need_no_code_in_the_folder(dense: GetDense, tmp_path: Path) -> None:
    base = dense("llama", "several files").base
    folder = pruned(random_plan(base, ffn=19), base, tmp_path / "expert")
    assert "per_layer_config" not in read_json(folder / "config.json")
    assert list(folder.glob("*.py")) == []


@pytest.mark.parametrize("cut", LAYER_CUTS)
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_a_base_of_layers_of_their_own_widths_can_be_cut_again(
    variant: str,
    cut: str,
    layered: dict[tuple[str, str], tuple[Plan, Path]],
    tmp_path: Path,
    store: Path,
) -> None:
    plan, folder = layered[variant, cut]
    base = resolved(folder, store)
    assert [(s.ffn, s.query_heads, s.kv_heads) for s in base.layers] == [
        (len(kept.ffn), len(kept.query_heads), len(kept.kv_groups)) for kept in plan.kept
    ]
    generator = torch.Generator().manual_seed(7)
    again = plan_of(
        base,
        [
            random_units(shape, generator, ffn=ffn, kv_groups=groups)
            for shape, ffn, groups in zip(base.layers, (6, 15, 5), (None, 2, None), strict=True)
        ],
    )
    second = pruned(again, base, tmp_path / "second")
    dense_again = load_model(folder, torch.float32, torch.device("cpu"))
    expected = masked_logits(dense_again, again)
    expert = load_model(second, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(expert), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(dense_again)).abs().max() > 0.1


def test_a_second_cut_that_makes_layers_alike_gives_an_ordinary_folder(
    layered: dict[tuple[str, str], tuple[Plan, Path]], tmp_path: Path, store: Path
) -> None:
    base = resolved(layered["llama", "ffn"][1], store)
    plan = random_plan(base, ffn=7)
    folder = pruned(plan, base, tmp_path / "second")
    config = read_json(folder / "config.json")
    assert config["intermediate_size"] == 7
    assert not {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"} & set(config)
    assert list(folder.glob("*.py")) == []
    dense_again = load_model(base.folder, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(load(folder)), masked_logits(dense_again, plan), atol=1e-5, rtol=1e-5)


def test_cutting_nothing_of_such_a_base_gives_it_back_byte_for_byte(
    layered: dict[tuple[str, str], tuple[Plan, Path]], tmp_path: Path, store: Path
) -> None:
    base = resolved(layered["qwen2", "all"][1], store)
    plan = plan_of(base, [shape.all_kept for shape in base.layers])
    assert contents(pruned(plan, base, tmp_path / "expert")) == contents(base.folder)


def test_an_expert_of_such_a_base_can_be_built(
    layered: dict[tuple[str, str], tuple[Plan, Path]], spec_data: dict[str, Any], tmp_path: Path
) -> None:
    """Profiled, composed, repaired and evaluated; its layers have 19, 32 and 7 neurons."""
    spec_data["base"] = str(layered["llama", "ffn"][1])
    spec_data["compose"] = {"allocation": "global"}
    spec_data["budget"] = {"ffn": 0.5, "multiple_of": 1}
    out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    about = expertprune.inspect(out)
    assert about["plan"]["budget"]["ffn"]["of"] == [19, 32, 7]
    assert sum(about["plan"]["budget"]["ffn"]["removed"]) == (19 + 32 + 7) // 2
    assert about["evaluation"]["corpora"]["domain/medical"]["metrics"]["bits_per_byte"]["retention"] > 0
    tensors = stored_tensors(out)
    kept = [tensors[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0] for layer in range(3)]
    assert kept == about["plan"]["budget"]["ffn"]["kept"]
    assert sum(tensor.numel() for tensor in tensors.values()) == about["parameters"]["after"]
