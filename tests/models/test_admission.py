"""Which folders may be cut: kinds of models, quantized weights, code of their own, missing and extra tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.errors import CheckpointError, SpecError
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model
from expertprune.pruning.selfcheck import check_family
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base
from tests.calling import call
from tests.oracle import change_config, change_tensors, load, logits_of, read_json, resolved
from tests.tiny import save_tiny, write_corpus

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("admission") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


# --- refused ----------------------------------------------------------------------------------------------------------


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def one_stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    """One projection only: most parameters are as they were."""
    name = "model.layers.1.mlp.down_proj.weight"
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def with_layer(number: int) -> Callable[[Path], None]:
    more = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(32, 24)}
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update(more))


def with_adapter(folder: Path) -> None:
    """Of which the weights were moved away."""
    (folder / "adapter_config.json").write_text("{}")


READ = "FP8 in blocks (quant_method: fp8 with weight_block_size) and MXFP4 (quant_method: mxfp4)"
FIRST = "prune the unquantized model first, then quantize the expert"
STORED = "model.layers.1.mlp.down_proj.weight and others are stored as"
# The change of the config or of the folder, and words of the message.
REFUSED: list[tuple[dict[str, Any] | Callable[[Path], Any], str]] = [
    (lambda folder: change_tensors(folder, lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    (with_layer(3), "model.layers.3.mlp.up_proj.weight belongs to no part of the model"),
    ({"vocab_size": 60}, "model.embed_tokens.weight is [64, 24], the config makes it [60, 24]"),
    ({"hidden_act": "unheardof"}, "transformers builds no model from it: "),
    (without_tokenizer, "no tokenizer files"),
    (
        with_adapter,
        "adapter_config.json: an adapter lies beside the weights, which transformers would add to them; move",
    ),
    (
        {"tie_word_embeddings": True},
        "lm_head.weight is stored and is not model.embed_tokens.weight, though config.json ties",
    ),
    ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM is no causal language model"),
    ({"vision_config": {"image_size": 8}}, "LlamaForCausalLM reads more than text (vision_config)"),
    ({"is_encoder_decoder": True}, "LlamaForCausalLM is an encoder-decoder"),
    ({"model_type": "lama"}, "'lama' is not supported; did you mean 'llama'?"),
    ({"model_type": "unheardof"}, "'unheardof' is not supported; valid: "),
    ({"model_type": None}, "None is not supported"),
    ({"num_key_value_heads": 4}, "num_attention_heads (6) is no multiple of num_key_value_heads (4)"),
    ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive whole number, found 0"),
    ({"intermediate_size": "32"}, "'intermediate_size' must be a positive whole number, found '32'"),
    ({"quantization_config": {"quant_method": "gptq"}}, f"the model is quantized (gptq); of quantized models, {READ}"),
    ({"compression_config": {"quant_method": "ct"}}, f"the model is quantized (ct); of quantized models, {READ}"),
    ({"quantization_config": {"bits": 4}}, "the model is quantized (unknown)"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "the model is quantized (fp8)"),
    (one_stored_as(torch.float8_e4m3fn), f"{STORED} F8_E4M3, so they are quantized"),
    (one_stored_as(torch.uint8), f"{STORED} U8, so they are quantized"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_cannot_be_cut_is_refused(
    change: dict[str, Any] | Callable[[Path], Any], words: str, folder: Path, store: Path
) -> None:
    if isinstance(change, dict):
        change_config(folder, **change)
    else:
        change(folder)
    with pytest.raises(CheckpointError) as caught:
        resolved(folder, store)
    assert str(folder) in str(caught.value)
    assert words in str(caught.value)
    assert ("quantized" in words) == (FIRST in str(caught.value))


def test_tensors_that_may_be_there_or_not(tmp_path: Path, folder: Path, store: Path) -> None:
    """A tied head, and what older checkpoints stored; code of a model's own that transformers knows is not needed."""
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({old: torch.ones(2)}))
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_absent.Absent"})
    resolved(folder, store)
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    before = logits_of(load(tied))
    resolved(tied, store)
    change_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    resolved(tied, store)
    torch.testing.assert_close(logits_of(load_model(tied, torch.float32, CPU)), before)


# --- code of its own --------------------------------------------------------------------------------------------------

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM


class InventedConfig(LlamaConfig):
    model_type = "invented"


class InventedForCausalLM(LlamaForCausalLM):
    config_class = InventedConfig
"""


def test_code_of_a_models_own_is_run_only_where_the_command_line_allows_it(
    folder: Path, tmp_path: Path, store: Path, spec_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a spec nor a plan nor an expert allows it: they may come from anywhere."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code, trust = folder / "modeling_invented.py", "--trust-remote-code"
    code.write_text(MODELING)
    classes = {"AutoConfig": "InventedConfig", "AutoModelForCausalLM": "InventedForCausalLM"}
    names = {key: f"modeling_invented.{name}" for key, name in classes.items()}
    change_config(folder, model_type="invented", architectures=["InventedForCausalLM"], auto_map=names)
    base = resolve_base(Base(model=str(folder), trust_remote_code=True), store)
    assert not base.family.tested
    assert check_family(base) == ["ffn", "kv_groups", "query_heads"]

    spec_data |= {"base": {"model": str(folder), "trust_remote_code": True}, "evaluate": {"enabled": False}}
    spec_data |= {"relevance": "random", "compensation": "none"}
    spec, plan, out = tmp_path / "tiny.yaml", tmp_path / "plan.json", tmp_path / "expert"
    spec.write_text(yaml.safe_dump(spec_data))
    call("compose", spec, "--out", plan, trust)
    call("prune", plan, "--out", out, trust)
    document = read_json(out / "expertprune.json")
    assert document["base"]["trust_remote_code"] is document["spec"]["base"]["trust_remote_code"] is True
    assert (out / code.name).read_text() == MODELING
    assert "Python code of its own" in (out / "README.md").read_text()
    expert = load_model(out, torch.float32, CPU, trust_remote_code=True)
    assert type(expert).__name__ == "InventedForCausalLM"
    assert expert.config.intermediate_size == 24

    mark = tmp_path / "was run"
    code.write_text(f"open({str(mark)!r}, 'w')\n{MODELING}")
    refused = (
        "model_type 'invented' comes with Python code of its own (auto_map: modeling_invented.py), which is not run"
    )
    for command in (("validate", spec), ("evaluate", out), ("prune", plan, "--out", tmp_path / "other")):
        said = " ".join(call(*command, code=2).stderr.split())
        assert refused in said
        assert "unless you give --trust-remote-code" in said
    assert not mark.exists()
    call("validate", spec, trust)
    assert mark.exists()


# --- experts of experts -----------------------------------------------------------------------------------------------


def test_pruning_twice_keeps_the_provenance_of_both(spec_data: dict[str, Any], tmp_path: Path) -> None:
    spec_data["evaluate"] = {"enabled": False}
    first = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "first")
    one, sources = read_json(first / "expertprune.json"), spec_data["corpora"]["sources"]
    assert one["ancestor"] is None
    spec_data |= {"base": str(first), "name": "again", "budget": {"kv_groups": 1}}
    swapped = {name: {"path": each["evaluation"], "evaluation": each["path"]} for name, each in sources.items()}
    again = {**spec_data, "corpora": {"sources": swapped}, "evaluate": {"enabled": True}}
    with pytest.raises(
        SpecError, match="12 of 12 evaluation documents also calibrate the expert, or one that it is cut from"
    ):
        expertprune.build(parse_spec(again, "spec", tmp_path), tmp_path / "second")
    for number, source in enumerate(sources.values()):
        write_corpus(Path(source["path"]), seed=50 + number)
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
