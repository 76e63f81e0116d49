"""The oracle: a cut model computes what the base computes with the dropped units masked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertprune.arch import family_of
from expertprune.models import BaseModel
from expertprune.units import KeptUnits
from tests.oracle import (
    IDS,
    load,
    logits_of,
    masked_logits,
    plan_of,
    pruned,
    random_plan,
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
SHARDS = {"one file": "1GB", "several files": "20KB"}
CASES = [
    (variant, cut)
    for variant in VARIANTS
    for cut in CUTS
    if (variant, cut) != ("llama, one head a group", "query_heads")  # there a head is a group
    and (variant, cut)
    not in (("gemma3, one group", "kv_groups"), ("gemma3, one group", "all"))  # and here there is one
]


@dataclass
class Dense:
    base: BaseModel
    model: Any


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Dense]:
    """The base of a variant in one file or several, made once."""
    root = tmp_path_factory.mktemp("oracle")
    made: dict[tuple[str, str], Dense] = {}

    def get(variant: str, shards: str = "several files") -> Dense:
        key = (variant, shards)
        if key not in made:
            folder = save_tiny(root / str(len(made)), max_shard_size=SHARDS[shards], **VARIANTS[variant])
            assert len(list(folder.glob("*.safetensors"))) > 1 or shards == "one file"
            made[key] = Dense(resolved(folder, root / "store"), load(folder))
        return made[key]

    return get


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(
    variant: str, cut: str, shards: str, dense: Callable[[str, str], Dense], tmp_path: Path
) -> None:
    base, model = dense(variant, shards).base, dense(variant, shards).model
    plan = random_plan(base, CASES.index((variant, cut)), **CUTS[cut])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    expected = masked_logits(model, plan)
    torch.testing.assert_close(logits_of(expert), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits_of(model)).abs().max() > 0.1, "the plan must cut something that matters"


@pytest.mark.parametrize("variant", ["llama, both biases", "llama, mlp bias, tied", "qwen2", "gemma3"])
@pytest.mark.parametrize("cut", CUTS)
def test_index_lists_every_written_tensor_where_it_lies(
    variant: str, cut: str, dense: Callable[[str, str], Dense], tmp_path: Path
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
def test_config_changes_in_the_widths_only(
    family: str, cut: str, shards: str, dense: Callable[[str, str], Dense], tmp_path: Path
) -> None:
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
def test_qwen2_with_heads_cut_is_a_llama_with_zero_output_biases(
    cut: str, dense: Callable[[str, str], Dense], tmp_path: Path
) -> None:
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


def test_qwen2_with_neurons_cut_stays_a_qwen2(dense: Callable[[str, str], Dense], tmp_path: Path) -> None:
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
    variant: str, name: str, axis: int, step: int, dense: Callable[[str, str], Dense], tmp_path: Path
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
    variant: str, structure: str, dense: Callable[[str, str], Dense], tmp_path: Path
) -> None:
    base, model = dense(variant, "several files").base, dense(variant, "several files").model
    plan = random_plan(base, kv_groups=2)
    permuted = plan_of(
        base, [dataclasses.replace(kept, **{structure: getattr(kept, structure)[::-1]}) for kept in plan.kept]
    )
    expert = load(pruned(permuted, base, tmp_path / "expert"))
    assert (logits_of(expert) - masked_logits(model, plan)).abs().max() > 0.1


def test_neurons_may_be_permuted_together(dense: Callable[[str, str], Dense], tmp_path: Path) -> None:
    """Unlike heads, neurons have no order: one order in all their tensors is a symmetry of the network."""
    base, model = dense("llama, both biases", "one file").base, dense("llama, both biases", "one file").model
    plan = random_plan(base, ffn=19)
    permuted = plan_of(base, [dataclasses.replace(kept, ffn=kept.ffn[::-1]) for kept in plan.kept])
    expert = load(pruned(permuted, base, tmp_path / "expert"))
    torch.testing.assert_close(logits_of(expert), masked_logits(model, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_one_unit_of_each_structure_is_enough(family: str, dense: Callable[[str, str], Dense], tmp_path: Path) -> None:
    base, model = dense(family, "several files").base, dense(family, "several files").model
    plan = plan_of(base, [KeptUnits((31,), (5,), (2,)), KeptUnits((0,), (0,), (0,)), KeptUnits((7,), (3,), (1,))])
    expert = load(pruned(plan, base, tmp_path / "expert"))
    torch.testing.assert_close(logits_of(expert), masked_logits(model, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "model_type"), [("llama", "llama"), ("qwen2", "llama"), ("gemma3", "gemma3_text")])
def test_an_expert_can_be_cut_again(
    family: str, model_type: str, dense: Callable[[str, str], Dense], tmp_path: Path, store: Path
) -> None:
    first = dense(family, "several files").base
    folder = pruned(random_plan(first, seed=1, ffn=24, kv_groups=2), first, tmp_path / "first")
    base = resolved(folder, store)
    assert base.family == family_of(model_type)
    plan = random_plan(base, seed=2, ffn=11, heads_per_group=1)
    expert = load(pruned(plan, base, tmp_path / "second"))
    torch.testing.assert_close(logits_of(expert), masked_logits(load(folder), plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_cached_decoding_gives_the_same_tokens(family: str, dense: Callable[[str, str], Dense], tmp_path: Path) -> None:
    """Generation reads head counts again, for its cache, and the windows of sliding layers."""
    base = dense(family, "several files").base
    expert = load(pruned(random_plan(base, **CUTS["all"]), base, tmp_path / "expert"))
    prompt = IDS[:1, :5]
    cached = expert.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    slow = prompt
    for _ in range(8):
        slow = torch.cat([slow, logits_of(expert, slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, slow)
