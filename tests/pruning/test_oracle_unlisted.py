"""Families that no file describes: recognized by their tensors, and held against the oracle before anything is cut."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import expertprune
from expertprune.arch import families, recognized
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.pruning.selfcheck import check_family
from expertprune.pruning.slicing import cut_tensor
from expertprune.spec.reading import parse_spec
from tests.oracle import assert_same, exact, load, logits_of, masked_logits, pruned, random_plan, read_json, resolved
from tests.patching import everywhere
from tests.tiny import WIDTHS, save_tiny, tiny_tokenizer

UNLISTED = ["cohere", "exaone4", "gemma", "smollm3"]


def save_unlisted(folder: Path, model_type: str, **changes: Any) -> Path:
    """A random model of transformers' own class, as an ordinary folder."""
    torch.manual_seed(3)
    config = CONFIG_MAPPING[model_type](**{**WIDTHS, "head_dim": 4, "pad_token_id": 1, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def refusal(base: ResolvedBase, layer_widths: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        check_family(base, layer_widths)
    return str(error.value)


@pytest.mark.parametrize("model_type", UNLISTED)
def test_a_family_that_looks_like_one_is_recognized_said_and_cut_as_masked(
    model_type: str, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert model_type not in families()
    folder = save_unlisted(tmp_path / "base", model_type)
    with caplog.at_level(logging.WARNING):
        base = resolved(folder, store)
    assert not base.family.tested
    assert f"model_type '{model_type}' is not listed" in caplog.text
    assert "checked on a tiny random copy" in caplog.text
    assert base.layers[0].query_heads == 6
    assert check_family(base, layer_widths=True) == ["ffn", "kv_groups", "query_heads", "widths of single layers"]
    plan = random_plan(base, 1, ffn=19, heads_per_group=1, kv_groups=2)
    assert_same(logits_of(exact(pruned(plan, base, tmp_path / "expert"))), masked_logits(exact(folder), plan))


def test_the_log_says_when_the_oracle_holds_and_the_expert_is_built(
    tmp_path: Path, spec_data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec_data["base"] = str(save_unlisted(tmp_path / "base", "gemma"))
    spec_data["evaluate"] = {"enabled": False}
    with caplog.at_level(logging.WARNING):
        out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    assert "the oracle holds on a tiny random copy (ffn, kv_groups, query_heads)" in caplog.text
    assert read_json(out / "config.json")["intermediate_size"] == 24
    assert load(out).config.model_type == "gemma"


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        # its norms take their mean over all heads
        ("olmo3", {}, "cutting kv_groups: model.layers.0.self_attn.q_norm.weight is off: it has [24], and the cut"),
        # its class takes the width of a head from the hidden size, whatever head_dim says
        ("stablelm", {}, "self_attn.q_proj.weight is off: it has [16, 24], and the cut model needs [24, 24]"),
        # what a block writes is scaled before it is added
        ("granite", {"residual_multiplier": 0.5}, "model.layers.0.mlp.down_proj.weight is off: the layer does not add"),
    ],
)
def test_nothing_is_cut_where_the_oracle_fails_and_the_tensor_is_named(
    model_type: str, changes: dict[str, Any], words: str, tmp_path: Path, spec_data: dict[str, Any], store: Path
) -> None:
    folder = save_unlisted(tmp_path / "base", model_type, **changes)
    spec_data["base"] = str(folder)
    with pytest.raises(CheckpointError) as error:
        expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    message = str(error.value)
    assert words in message
    assert message.startswith(f"{folder}: the oracle fails for model_type '{model_type}' on a tiny random copy: ")
    assert "Nothing was cut" in message
    assert not (tmp_path / "expert").exists()
    assert not list(store.glob("profiles/*"))


@pytest.fixture
def base(tmp_path: Path, store: Path) -> ResolvedBase:
    return resolved(save_tiny(tmp_path / "base", "llama"), store)


def test_the_oracle_sees_rows_that_are_cut_elsewhere(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that takes other rows of one tensor gives the right shapes and a wrong model."""
    original = cut_tensor

    def rolled(name: str, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        cut = original(name, tensor, *rest)
        return cut.roll(4, 0) if name == "self_attn.k_proj.weight" and cut is not tensor else cut

    everywhere(monkeypatch, "expertprune.pruning.slicing.cut_tensor", rolled)
    assert "model.layers.0.self_attn.k_proj.weight, or what goes into it" in refusal(base)


def test_the_oracle_sees_heads_that_read_other_groups(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query head h reads KV head h modulo their number here, so the heads that leave with a group are others."""

    def interleaved(states: torch.Tensor, repeats: int) -> torch.Tensor:
        return states.repeat(1, repeats, 1, 1)

    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "repeat_kv", interleaved)
    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: eager)
    message = refusal(base)
    assert "cutting kv_groups: model.layers.0.self_attn.o_proj.weight, or what goes into it, is off" in message


def test_it_holds_for_a_listed_family_and_leaves_the_random_numbers_of_others_alone(base: ResolvedBase) -> None:
    torch.manual_seed(5)
    assert check_family(base) == ["ffn", "kv_groups", "query_heads"]
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# --- what is recognized -----------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "invented",
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.gate_proj.weight": (32, 24),
    "model.layers.0.mlp.up_proj.weight": (32, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 32),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.self_attn.k_proj.weight": (12, 24),
    "model.layers.0.self_attn.v_proj.weight": (12, 24),
    "model.layers.0.self_attn.o_proj.weight": (24, 24),
    "model.embed_tokens.weight": (64, 24),
}


def test_modules_are_found_wherever_they_stand() -> None:
    shapes = {name.replace("model.layers", "trunk.h").replace("self_attn", "mix"): s for name, s in SHAPES.items()}
    family = recognized(CONFIG, shapes)
    assert family is not None
    assert (family.layers, family.ffn.output, family.attention.output) == ("trunk.h", "mlp.down_proj", "mix.o_proj")
    assert {tensor.name for tensor in family.tensors if not tensor.optional} == {
        name.removeprefix("trunk.h.0.") for name in shapes if ".h." in name
    }


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.mlp.experts.0.gate_proj.weight": (32, 24)},
        {"vision.layers.0.mlp.gate_proj.weight": (32, 24)},
        {"model.layers.0.mlp.down_proj.weight": (32, 24)},
    ],
    ids=["experts", "a second stack of layers", "an output that is none"],
)
def test_what_is_more_than_that_is_none(more: dict[str, tuple[int, ...]]) -> None:
    assert recognized(CONFIG, {**SHAPES, **more}) is None


def test_what_is_less_is_none() -> None:
    for lost in (name for name in SHAPES if "proj" in name):
        assert recognized(CONFIG, {name: shape for name, shape in SHAPES.items() if name != lost}) is None, lost
    for lost in CONFIG.keys() - {"model_type", "num_key_value_heads"}:
        assert recognized({key: value for key, value in CONFIG.items() if key != lost}, SHAPES) is None, lost


def test_a_cap_on_the_attention_logits_asks_for_the_implementation_that_has_it() -> None:
    for cap, expected in (({}, "sdpa"), ({"attn_logit_softcapping": 30.0}, "eager")):
        family = recognized({**CONFIG, **cap}, SHAPES)
        assert family is not None
        assert family.attention_implementation == expected


def test_a_listed_family_with_a_cap_runs_capped(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "gemma2")
    capped = load_model(folder, torch.float32, torch.device("cpu"))
    assert capped.config._attn_implementation == "eager"
    config = json.loads((folder / "config.json").read_text()) | {"attn_logit_softcapping": 1e9}
    (folder / "config.json").write_text(json.dumps(config))
    assert not torch.allclose(logits_of(capped), logits_of(load_model(folder, torch.float32, torch.device("cpu"))))
