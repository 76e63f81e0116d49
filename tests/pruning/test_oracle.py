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
    assert_same,
    bases_of,
    contents,
    exact,
    generated,
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
# Every structure alone in one variant of each family, and as much as may go in all others.
CASES = [
    *((family, cut) for family in ("llama", "qwen2", "gemma3") for cut in CUTS),
    *((variant, "ffn" if variant == "gemma3, one group" else "all") for variant in list(VARIANTS) if "," in variant),
    ("gemma3, one group", "query_heads"),
]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(variant: str, cut: str, dense: GetDense, tmp_path: Path) -> None:
    number = CASES.index((variant, cut))
    of = dense(variant, list(SHARDS)[number % 2])
    plan = random_plan(of.base, number, **CUTS[cut])
    expert = exact(pruned(plan, of.base, tmp_path / "expert"))
    expected = masked_logits(of.model, plan)
    assert_same(logits_of(expert), expected)
    assert (expected - logits_of(of.model)).abs().max() > 0.1, "the plan must cut something that matters"


@pytest.mark.parametrize(("variant", "cut"), [("llama, both biases", "all"), ("qwen2", "all"), ("gemma3", "ffn")])
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


@pytest.mark.parametrize(("family", "shards"), [("llama", "one file"), ("gemma3", "several files")])
def test_config_changes_in_the_widths_only(family: str, shards: str, dense: GetDense, tmp_path: Path) -> None:
    base = dense(f"{family}, own head_dim", shards).base
    expected = {
        "ffn": {"intermediate_size": 19},
        "query_heads": {"num_attention_heads": 3},
        "kv_groups": {"num_attention_heads": 8, "num_key_value_heads": 2},
        "all": {"intermediate_size": 13, "num_attention_heads": 2, "num_key_value_heads": 2},
    }
    for cut, changes in expected.items():
        folder = pruned(random_plan(base, **CUTS[cut]), base, tmp_path / cut)
        assert read_json(folder / "config.json") == read_json(base.folder / "config.json") | changes
        assert (folder / "model.safetensors.index.json").exists() == (shards == "several files")


@pytest.mark.parametrize("cut", ["query_heads", "all"])
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


@pytest.mark.parametrize("cut", ["ffn", "all"])
def test_older_configs_leave_head_dim_and_kv_heads_out(cut: str, tmp_path: Path, store: Path) -> None:
    """Where the config says neither, both follow from the query heads, and must be written once these change."""
    folder = save_tiny(tmp_path / "base", "llama", num_key_value_heads=6)
    config = read_json(folder / "config.json")
    del config["head_dim"], config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS[cut])
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("cut", ["ffn", "all"])
def test_rope_and_dtype_in_the_words_of_older_configs(cut: str, tmp_path: Path, store: Path) -> None:
    """Published Qwen2 configs say `rope_theta` and `torch_dtype` at their top level, and no `layer_types`."""
    folder = save_tiny(tmp_path / "base", "qwen2")
    config = read_json(folder / "config.json")
    del config["rope_parameters"], config["layer_types"], config["dtype"]
    config |= {"rope_theta": 50.0, "torch_dtype": "float32"}  # far from the default, so that losing it shows
    (folder / "config.json").write_text(json.dumps(config))
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS[cut])
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert expert.config.rope_parameters["rope_theta"] == 50.0
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


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


COUPLED = {  # of a tensor: the axis of its units, and how many positions one has on it
    **{f"mlp.{part}_proj.{kind}": (0, 1) for part in ("gate", "up") for kind in ("weight", "bias")},
    **{f"self_attn.{part}_proj.{kind}": (0, 4) for part in "qkv" for kind in ("weight", "bias")},
    "mlp.down_proj.weight": (1, 1),
    "self_attn.o_proj.weight": (1, 4),
}


@pytest.mark.parametrize("variant", ["llama, both biases", "qwen2", "gemma3, untied, attention bias"])
def test_oracle_sees_a_permutation_of_any_one_coupled_tensor(variant: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense(variant, "one file").base, dense(variant, "one file").model
    plan = random_plan(base, ffn=19, kv_groups=2)
    expert, expected = exact(pruned(plan, base, tmp_path / "expert")), masked_logits(model, plan)
    for name, (axis, step) in COUPLED.items():
        if name.startswith("mlp") and name.endswith("bias") and variant != "llama, both biases":
            continue
        tensor = expert.get_parameter(f"model.layers.1.{name}")
        right = tensor.clone()
        tensor.copy_(tensor.roll(step, axis))
        # A bias of the keys moves all scores of a query alike but for the rotation: the smallest effect of them all.
        assert (logits_of(expert) - expected).abs().max() > 1e-3, name
        tensor.copy_(right)
    assert_same(logits_of(expert), expected)


@pytest.mark.parametrize("structure", ["query_heads", "kv_groups"])
def test_oracle_sees_a_permuted_order_of_kept_heads(structure: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense("llama", "several files").base, dense("llama", "several files").model
    plan = random_plan(base, kv_groups=2)
    permuted = plan_of(
        base, [dataclasses.replace(kept, **{structure: getattr(kept, structure)[::-1]}) for kept in plan.kept]
    )
    expert = exact(pruned(permuted, base, tmp_path / "expert"))
    assert (logits_of(expert) - masked_logits(model, plan)).abs().max() > 0.1


def test_neurons_may_be_permuted_together(dense: GetDense, tmp_path: Path) -> None:
    """Unlike heads, neurons have no order: one order in all their tensors is a symmetry of the network."""
    base, model = dense("llama, both biases", "one file").base, dense("llama, both biases", "one file").model
    plan = random_plan(base, ffn=19)
    permuted = plan_of(base, [dataclasses.replace(kept, ffn=kept.ffn[::-1]) for kept in plan.kept])
    expert = exact(pruned(permuted, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(model, plan))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_one_unit_of_each_structure_is_enough(family: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense(family, "several files").base, dense(family, "several files").model
    plan = plan_of(base, [KeptUnits((31,), (5,), (2,)), KeptUnits((0,), (0,), (0,)), KeptUnits((7,), (3,), (1,))])
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(model, plan))


@pytest.mark.parametrize(("family", "model_type"), [("llama", "llama"), ("qwen2", "llama"), ("gemma3", "gemma3_text")])
def test_an_expert_can_be_cut_again(family: str, model_type: str, dense: GetDense, tmp_path: Path, store: Path) -> None:
    first = dense(family, "several files").base
    folder = pruned(random_plan(first, seed=1, ffn=24, kv_groups=2), first, tmp_path / "first")
    base = resolved(folder, store)
    assert base.family == family_of(model_type)
    plan = random_plan(base, seed=2, ffn=11, heads_per_group=1)
    expert = exact(pruned(plan, base, tmp_path / "second"))
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_cached_decoding_gives_the_same_tokens(family: str, dense: GetDense, tmp_path: Path) -> None:
    """Generation reads head counts again, for its cache, and the windows of sliding layers."""
    base = dense(family, "several files").base
    expert = exact(pruned(random_plan(base, **CUTS["all"]), base, tmp_path / "expert"))
    prompt = IDS[:1, :5]
    cached = expert.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    slow = prompt
    for _ in range(8):
        slow = torch.cat([slow, logits_of(expert, slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, slow)


# --- widths of single layers ----------------------------------------------------------------------------------------

# Kept in the first, second and third layer; one of them is left as it was.
LAYER_CUTS: dict[str, list[dict[str, int]]] = {
    "ffn": [{"ffn": 19}, {}, {"ffn": 7}],
    "query_heads": [{"heads_per_group": 1}, {}, {"heads_per_group": 2}],
    "kv_groups": [{"kv_groups": 2}, {}, {"kv_groups": 1}],
    "all": [{"ffn": 13, "heads_per_group": 1, "kv_groups": 2}, {}, {"ffn": 20, "kv_groups": 1}],
}
LAYER_CASES = [
    *((family, cut) for family in ("llama", "qwen2") for cut in LAYER_CUTS),
    *((f"llama, {what}", "all") for what in ("mlp bias, tied", "both biases", "own head_dim")),
    ("qwen2, own head_dim", "all"),
]

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
        folder, dtype=torch.float64, trust_remote_code=True, output_loading_info=True
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


@pytest.fixture(scope="session")
def layered(dense: GetDense, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Plan, Path]]:
    root = tmp_path_factory.mktemp("layered")
    made = {}
    for number, (variant, cut) in enumerate(LAYER_CASES):
        base = dense(variant, "several files").base
        plan = layered_plan(base, cut, number)
        made[variant, cut] = (plan, pruned(plan, base, root / f"expert-{number}"))
    return made


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


Layered = dict[tuple[str, str], tuple[Plan, Path]]


def exact_layered(folder: Path) -> Any:
    """With this package, which builds layers of their own widths without code in the folder."""
    return load_model(folder, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(("variant", "cut"), LAYER_CASES)
def test_layers_of_their_own_widths_equal_the_masked_model(
    variant: str, cut: str, dense: GetDense, layered: Layered
) -> None:
    of, (plan, folder) = dense(variant, "several files"), layered[variant, cut]
    expected, expert = masked_logits(of.model, plan), exact_layered(folder)
    assert_same(logits_of(expert), expected)
    assert (expected - logits_of(of.model)).abs().max() > 0.1, "the plan must cut something that matters"
    with masked(of.model, plan):
        assert torch.equal(generated(expert), generated(of.model))
    config, tensors = read_json(folder / "config.json"), stored_tensors(folder)
    head_dim = of.base.layers[0].head_dim
    assert set(config["per_layer_config"]) <= {"0", "1", "2"}
    for layer, kept in enumerate(plan.kept):
        own = {**config, **config["per_layer_config"].get(str(layer), {})}
        prefix = f"model.layers.{layer}"
        assert own["intermediate_size"] == len(kept.ffn) == tensors[f"{prefix}.mlp.up_proj.weight"].shape[0]
        queries, keys = (tensors[f"{prefix}.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        assert own["num_attention_heads"] * head_dim == queries == len(kept.query_heads) * head_dim
        assert own["num_key_value_heads"] * head_dim == keys == len(kept.kv_groups) * head_dim
    assert set(read_json(folder / "model.safetensors.index.json")["weight_map"]) == set(tensors)


def test_plain_transformers_builds_the_same_from_the_folder(dense: GetDense, layered: Layered, tmp_path: Path) -> None:
    found = run_plain(tmp_path, [str(folder) for _, folder in layered.values()])
    for number, ((variant, _), (plan, _)) in enumerate(layered.items()):
        model = dense(variant, "several files").model
        assert_same(found[f"logits.{number}"], masked_logits(model, plan))
        with masked(model, plan):
            assert torch.equal(found[f"tokens.{number}"], generated(model))


def test_layers_of_one_width_need_no_code_in_the_folder(dense: GetDense, tmp_path: Path) -> None:
    base = dense("llama", "several files").base
    folder = pruned(random_plan(base, ffn=19), base, tmp_path / "expert")
    assert "per_layer_config" not in read_json(folder / "config.json")
    assert list(folder.glob("*.py")) == []


@pytest.mark.parametrize(("variant", "cut"), [("llama", "all"), ("qwen2", "ffn")])
def test_a_base_of_layers_of_their_own_widths_can_be_cut_again(
    variant: str, cut: str, layered: Layered, tmp_path: Path, store: Path
) -> None:
    plan, folder = layered[variant, cut]
    base = resolved(folder, store)
    assert [(s.ffn, s.query_heads, s.kv_heads) for s in base.layers] == [
        (len(kept.ffn), len(kept.query_heads), len(kept.kv_groups)) for kept in plan.kept
    ]
    generator = torch.Generator().manual_seed(7)
    widths = zip(base.layers, (6, 15, 5), (None, 2, None), strict=True)
    again = plan_of(base, [random_units(s, generator, ffn=ffn, kv_groups=groups) for s, ffn, groups in widths])
    second = pruned(again, base, tmp_path / "second")
    assert_same(logits_of(exact_layered(second)), masked_logits(exact_layered(folder), again))


def test_a_second_cut_that_makes_layers_alike_gives_an_ordinary_folder(
    layered: Layered, tmp_path: Path, store: Path
) -> None:
    base = resolved(layered["llama", "ffn"][1], store)
    plan = random_plan(base, ffn=7)
    folder = pruned(plan, base, tmp_path / "second")
    config = read_json(folder / "config.json")
    assert config["intermediate_size"] == 7
    assert not {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"} & set(config)
    assert list(folder.glob("*.py")) == []
    assert_same(logits_of(exact(folder)), masked_logits(exact_layered(base.folder), plan))


def test_cutting_nothing_of_such_a_base_gives_it_back_byte_for_byte(
    layered: Layered, tmp_path: Path, store: Path
) -> None:
    base = resolved(layered["qwen2", "all"][1], store)
    plan = plan_of(base, [shape.all_kept for shape in base.layers])
    assert contents(pruned(plan, base, tmp_path / "expert")) == contents(base.folder)


def test_an_expert_of_such_a_base_can_be_built(layered: Layered, spec_data: dict[str, Any], tmp_path: Path) -> None:
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
