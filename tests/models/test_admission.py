"""Which folders may be cut: kinds of models, quantized weights, code of their own, missing and extra tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.errors import CheckpointError, SpecError
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model
from expertprune.pruning.selfcheck import check_family
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base
from tests.calling import call
from tests.oracle import (
    assert_same,
    change_config,
    change_tensors,
    exact,
    load,
    logits_of,
    masked_logits,
    pruned,
    random_plan,
    read_json,
    resolved,
)
from tests.tiny import save_tiny, tiny_tokenizer, write_corpus

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def refusal(folder: Path, store: Path, trust_remote_code: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve_base(Base(model=str(folder), trust_remote_code=trust_remote_code), store)
    return str(error.value)


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_is_missing_is_named(name: str, folder: Path, store: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))
    message = refusal(folder, store)
    assert f"{name} is missing" in message
    assert str(folder) in message


def test_a_tied_head_may_be_missing_and_may_be_there(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    before = logits_of(load(folder))
    resolved(folder, store)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    resolved(folder, store)
    torch.testing.assert_close(logits_of(load_model(folder, torch.float32, CPU)), before)


def test_tensors_are_held_against_the_model(folder: Path, store: Path) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"  # older checkpoints stored it
    change_tensors(folder, lambda tensors: tensors.update({old: torch.ones(2)}))
    resolved(folder, store)
    change_config(folder, vocab_size=60, auto_map={"AutoModelForCausalLM": "modeling_absent.Absent"})  # not needed
    assert "model.embed_tokens.weight is [64, 24], the config makes it [60, 24]" in refusal(folder, store)
    change_config(folder, vocab_size=64)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(32, 24)}))
    assert "model.layers.3.mlp.up_proj.weight belongs to no part of the model" in refusal(folder, store)


def test_a_config_that_builds_no_model_says_why(folder: Path, store: Path) -> None:
    change_config(folder, hidden_act="unheardof")
    assert "transformers builds no model from it: " in refusal(folder, store)
    assert "unheardof" in refusal(folder, store)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_a_vision_model_is_refused(tmp_path: Path, store: Path) -> None:
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 6}
    vision = {**text, "image_size": 8, "patch_size": 4}
    with torch.device("meta"):
        config = Gemma3Config(text_config=text, vision_config=vision)
    config.architectures = [Gemma3ForConditionalGeneration.__name__]
    config.save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.zeros(24)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refusal(tmp_path, store)
    assert "Gemma3ForConditionalGeneration reads more than text (vision_config)" in message
    assert "save its text model as a folder of its own" in message


def test_an_encoder_decoder_is_refused(tmp_path: Path, store: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 24, "d_ff": 32, "d_kv": 4, "num_heads": 6, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "T5ForConditionalGeneration is an encoder-decoder" in refusal(tmp_path, store)


@pytest.mark.parametrize(
    ("key", "method"),
    [("quantization_config", "gptq"), ("compression_config", "compressed-tensors"), ("quantization_config", "unknown")],
)
def test_a_quantized_base_is_refused_with_the_working_order(key: str, method: str, folder: Path, store: Path) -> None:
    change_config(folder, **{key: {"bits": 4} if method == "unknown" else {"quant_method": method}})
    message = refusal(folder, store)
    assert f"the model is quantized ({method})" in message
    assert "prune the unquantized model first, then quantize the expert" in message


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")])
def test_quantized_tensors_are_seen_where_the_config_is_silent(
    dtype: torch.dtype, stored: str, folder: Path, store: Path
) -> None:
    """One projection only: most parameters are as they were."""
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refusal(folder, store)
    assert f"{name} and others are stored as {stored}, so they are quantized" in message


# --- code of its own --------------------------------------------------------------------------------------------------

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM


class InventedConfig(LlamaConfig):
    model_type = "invented"


class InventedForCausalLM(LlamaForCausalLM):
    config_class = InventedConfig
"""


@pytest.fixture
def own_code(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "modeling_invented.py").write_text(MODELING)
    names = {
        "AutoConfig": "modeling_invented.InventedConfig",
        "AutoModelForCausalLM": "modeling_invented.InventedForCausalLM",
    }
    change_config(folder, model_type="invented", architectures=["InventedForCausalLM"], auto_map=names)
    return folder


def test_code_of_a_models_own_is_not_run_unless_allowed(own_code: Path, store: Path) -> None:
    (own_code / "modeling_invented.py").write_text("raise AssertionError('was run')")
    message = refusal(own_code, store)
    assert "model_type 'invented' comes with Python code of its own (auto_map: " in message
    assert "modeling_invented.py" in message
    assert "--trust-remote-code" in message


def test_no_file_allows_code(own_code: Path, tmp_path: Path, spec_data: dict[str, Any]) -> None:
    """Neither a spec nor a plan nor an expert, which may come from anywhere: only the command line does."""
    data = {**spec_data, "base": {"model": str(own_code), "trust_remote_code": True}}
    data |= {"evaluate": {"enabled": False}, "budget": {"ffn": 0}, "relevance": "random", "compensation": "none"}
    spec, plan, out = tmp_path / "tiny.yaml", tmp_path / "plan.json", tmp_path / "expert"
    spec.write_text(yaml.safe_dump(data))
    trust, mark = "--trust-remote-code", tmp_path / "was run"
    call("compose", spec, "--out", plan, trust)
    call("prune", plan, "--out", out, trust)
    assert read_json(out / "expertprune.json")["spec"]["base"]["trust_remote_code"] is True
    code = (own_code / "modeling_invented.py").read_text()
    (own_code / "modeling_invented.py").write_text(f"open({str(mark)!r}, 'w')\n{code}")
    for command in (
        ("validate", spec),
        ("compose", spec, "--out", tmp_path / "other.json"),
        ("evaluate", out),
        ("prune", plan, "--out", tmp_path / "other"),
    ):
        assert "which is not run unless you give --trust-remote-code" in call(*command, code=2).stderr
    assert not mark.exists()
    call("validate", spec, trust)
    assert mark.exists()


def test_code_that_is_allowed_is_run_checked_and_recorded(
    own_code: Path, store: Path, tmp_path: Path, spec_data: dict[str, Any]
) -> None:
    base = resolve_base(Base(model=str(own_code), trust_remote_code=True), store)
    assert not base.family.tested
    assert check_family(base) == ["ffn", "kv_groups", "query_heads"]
    spec_data["base"] = {"model": str(own_code), "trust_remote_code": True}
    spec_data["evaluate"] = {"enabled": False}
    out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    assert (out / "modeling_invented.py").read_text() == MODELING
    assert read_json(out / "expertprune.json")["base"]["trust_remote_code"] is True
    assert "Python code of its own" in (out / "README.md").read_text()
    expert = load_model(out, torch.float32, CPU, trust_remote_code=True)
    assert type(expert).__name__ == "InventedForCausalLM"
    assert expert.config.intermediate_size == 24


# --- experts of experts -----------------------------------------------------------------------------------------------


def test_pruning_twice_keeps_the_provenance_of_both(spec_data: dict[str, Any], tmp_path: Path) -> None:
    spec_data["evaluate"] = {"enabled": False}
    first = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "first")
    one = read_json(first / "expertprune.json")
    assert one["ancestor"] is None
    for number, source in enumerate(spec_data["corpora"]["sources"].values()):
        write_corpus(Path(source["path"]), seed=50 + number)
    spec_data |= {"base": str(first), "name": "again", "budget": {"kv_groups": 1}}
    second = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "second")
    calibrated = [Expert.load(folder).calibration_digests for folder in (first, second)]
    assert [len(digests) for digests in calibrated] == [4 * 12, 8 * 12]
    assert calibrated[0] < calibrated[1], "what calibrated the first measures no expert that is cut from it"
    two = read_json(second / "expertprune.json")
    assert two["ancestor"] == {key: value for key, value in one.items() if key != "evaluation"}
    assert two["ancestor"]["base"]["digest"] == one["base"]["digest"] != two["base"]["digest"]
    assert two["plan"]["budget"]["ffn"]["of"] == one["plan"]["budget"]["ffn"]["kept"] == 24
    card = (second / "README.md").read_text()
    assert "The base is an expert itself: `tiny`" in card
    assert one["base"]["digest"] in card


def test_an_expert_of_an_expert_is_not_evaluated_on_what_calibrated_the_first(
    spec_data: dict[str, Any], tmp_path: Path
) -> None:
    spec_data["evaluate"] = {"enabled": False}
    first = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "first")
    sources = spec_data["corpora"]["sources"]
    for name, source in sources.items():  # what calibrated now evaluates, and the other way round
        sources[name] = {"path": source["evaluation"], "evaluation": source["path"]}
    spec_data |= {"base": str(first), "evaluate": {"enabled": True}, "budget": {"kv_groups": 1}}
    with pytest.raises(
        SpecError, match="12 of 12 evaluation documents also calibrate the expert, or one that it is cut from"
    ):
        expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "second")


# --- how weights are stored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shards", "dtype"),
    [("phi3", "20KB", torch.bfloat16), ("gemma2", "1GB", torch.float16), ("starcoder2", "20KB", torch.float32)],
)
def test_every_way_of_storing_is_kept(
    family: str, shards: str, dtype: torch.dtype, tmp_path: Path, store: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family, shards, dtype)
    base = resolved(folder, store)
    plan = random_plan(base, ffn=19, kv_groups=2)
    out = pruned(plan, base, tmp_path / "expert")
    assert len(list(out.glob("*.safetensors"))) == len(list(folder.glob("*.safetensors")))
    for path in out.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    assert_same(logits_of(exact(out)), masked_logits(exact(folder), plan))
