"""The oracle: a cut model computes what the base computes with the dropped units masked."""

from __future__ import annotations

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
from expertprune.arch import families, family_of
from expertprune.artifacts.plan import Plan
from expertprune.errors import PlanError
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

TWELVE = {"num_attention_heads": 12, "head_dim": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "llama, attention bias": {"family": "llama", "attention_bias": True},
    "llama, mlp bias, tied": {"family": "llama", "mlp_bias": True, "tie_word_embeddings": True},
    "llama, both biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, own head_dim": {"family": "llama", **TWELVE, "attention_bias": True},
    "llama, one head a group": {"family": "llama", "num_key_value_heads": 6},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2, own head_dim": {"family": "qwen2", **TWELVE},
    "gemma3": {"family": "gemma3"},
    "gemma3, untied, attention bias": {"family": "gemma3", "tie_word_embeddings": False, "attention_bias": True},
    "gemma3, own head_dim": {"family": "gemma3", **TWELVE},
    "gemma3, one group": {"family": "gemma3", "num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma2": {"family": "gemma2"},
    "gemma2, untied, own head_dim": {"family": "gemma2", **TWELVE, "tie_word_embeddings": False},
    "mistral": {"family": "mistral"},
    "mistral, tied, own head_dim": {"family": "mistral", **TWELVE, "tie_word_embeddings": True},
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
        **TWELVE,
    },
    "starcoder2": {"family": "starcoder2", "tie_word_embeddings": False},
    "starcoder2, no bias, tied": {"family": "starcoder2", "use_bias": False},
}
WITHOUT_HEADS = [name for name, family in families().items() if family.has_ffn and not family.heads_are_units]
# Kept per layer. The hidden size is 24, which the query heads that stay must divide:
# of 6 heads in 3 groups 3, 4 and 2 stay, of 12 heads in 3 groups 3, 8 and 2, of 6 heads in 6 groups 2 and 2, of 4 heads
# in one group 1.
CUTS: dict[str, dict[str, int]] = {
    "ffn": {"ffn": 19},
    "query_heads": {"heads_per_group": 1},
    "kv_groups": {"kv_groups": 2},
    "all": {"ffn": 13, "heads_per_group": 1, "kv_groups": 2},
}
OTHERS = {changes["family"] for changes in VARIANTS.values()} - {"llama", "qwen2", "gemma3"}


def largest(variant: str) -> str:
    """The cut of all that the variant allows."""
    if variant == "gemma3, one group":
        return "query_heads"
    return "ffn" if VARIANTS[variant]["family"] in WITHOUT_HEADS else "all"


# Every structure alone in one variant of each family, and as much as may go in the others.
CASES = [
    (variant, cut)
    for variant in VARIANTS
    for cut in (CUTS if "," not in variant and largest(variant) == "all" else [largest(variant)])
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
    with masked(of.model, plan):
        assert torch.equal(generated(expert), generated(of.model))


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


def test_qwen2_with_heads_cut_is_a_llama_with_zero_output_biases(dense: GetDense, tmp_path: Path) -> None:
    base = dense("qwen2", "several files").base
    folder = pruned(random_plan(base, **CUTS["query_heads"]), base, tmp_path / "expert")
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


OLDER: dict[str, tuple[dict[str, Any], set[str], dict[str, Any]]] = {
    # both follow from the query heads, and must be written once these change
    "neither head_dim nor KV heads": ({"num_key_value_heads": 6}, {"head_dim", "num_key_value_heads"}, {}),
    # published Qwen2 configs; a base far from the default, so that losing it shows
    "rope and dtype at the top level": (
        {"family": "qwen2"},
        {"rope_parameters", "layer_types", "dtype"},
        {"rope_theta": 50.0, "torch_dtype": "float32"},
    ),
}


@pytest.mark.parametrize("what", OLDER)
def test_older_configs(what: str, tmp_path: Path, store: Path) -> None:
    changes, gone, said = OLDER[what]
    folder = save_tiny(tmp_path / "base", **changes)
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in gone}
    (folder / "config.json").write_text(json.dumps(config | said))
    base = resolved(folder, store)
    plan = random_plan(base, **CUTS["all"])
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert expert.config.rope_parameters["rope_theta"] == said.get("rope_theta", 10_000.0)
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_heads_that_depend_on_each_other_are_refused(name: str, dense: GetDense, tmp_path: Path) -> None:
    base = dense(name).base
    for cut in ("query_heads", "kv_groups", "all"):
        with pytest.raises(PlanError, match=f"heads of family '{name}' cannot be cut: q_norm and k_norm"):
            pruned(random_plan(base, **CUTS[cut]), base, tmp_path / cut)


def test_heads_of_the_fused_family_stay_where_long_texts_are_scaled(tmp_path: Path, store: Path) -> None:
    """transformers checks the factors' number against hidden_size / num_attention_heads."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0],
            "partial_rotary_factor": 1.0}  # fmt: skip
    longer = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    folder = save_tiny(tmp_path / "base", "phi3", rope_parameters=rope, **longer)
    base = resolved(folder, store)
    with pytest.raises(PlanError, match=r"config says rope_parameters\.rope_type: 'longrope', and only 'default'"):
        pruned(random_plan(base, kv_groups=2), base, tmp_path / "refused")
    plan = random_plan(base, ffn=19)
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_one_unit_of_each_structure_is_enough(family: str, dense: GetDense, tmp_path: Path) -> None:
    base, model = dense(family, "several files").base, dense(family, "several files").model
    plan = plan_of(base, [KeptUnits((31,), (5,), (2,)), KeptUnits((0,), (0,), (0,)), KeptUnits((7,), (3,), (1,))])
    expert = exact(pruned(plan, base, tmp_path / "expert"))
    assert_same(logits_of(expert), masked_logits(model, plan))


@pytest.mark.parametrize(("family", "model_type"), [("qwen2", "llama"), ("gemma3", "gemma3_text")])
def test_an_expert_can_be_cut_again(family: str, model_type: str, dense: GetDense, tmp_path: Path, store: Path) -> None:
    first = dense(family, "several files").base
    folder = pruned(random_plan(first, seed=1, ffn=24, kv_groups=2), first, tmp_path / "first")
    base = resolved(folder, store)
    assert base.family == family_of(model_type)
    plan = random_plan(base, seed=2, ffn=11, heads_per_group=1)
    expert = exact(pruned(plan, base, tmp_path / "second"))
    assert_same(logits_of(expert), masked_logits(exact(folder), plan))


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
    *((variant, largest(variant)) for variant, changes in VARIANTS.items() if changes["family"] in OTHERS),
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
        folder, dtype=torch.float64, trust_remote_code=True, output_loading_info=True,
        attn_implementation="eager" if "gemma2" in folder else None,  # the only one that caps
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


@pytest.fixture(scope="session")
def layered(dense: GetDense, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Plan, Path]]:
    root = tmp_path_factory.mktemp("layered")
    made = {}
    for number, (variant, cut) in enumerate(LAYER_CASES):
        base = dense(variant, "several files").base
        generator = torch.Generator().manual_seed(number)
        widths = zip(base.layers, LAYER_CUTS[cut], strict=True)
        plan = plan_of(base, [random_units(shape, generator, **kept) for shape, kept in widths])
        made[variant, cut] = (plan, pruned(plan, base, root / f"{variant}, {cut}"))
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


def test_plain_transformers_builds_the_same_from_the_folder(dense: GetDense, layered: Layered, tmp_path: Path) -> None:
    found = run_plain(tmp_path, [str(folder) for _, folder in layered.values()])
    for number, ((variant, _), (plan, _)) in enumerate(layered.items()):
        model = dense(variant, "several files").model
        assert_same(found[f"logits.{number}"], masked_logits(model, plan))
        with masked(model, plan):
            assert torch.equal(found[f"tokens.{number}"], generated(model))


def test_a_base_of_layers_of_their_own_widths_can_be_cut_again(layered: Layered, tmp_path: Path, store: Path) -> None:
    plan, folder = layered["llama", "all"]
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
