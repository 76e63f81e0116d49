"""Families that no file describes: recognized by their tensors, and held against the oracle before anything is cut."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import expertprune
from expertprune.arch import families, recognized
from expertprune.errors import CheckpointError
from expertprune.models.depth import check_kinds
from expertprune.models.loading import load_model
from expertprune.pruning.selfcheck import check_family
from expertprune.pruning.slicing import cut_tensor
from expertprune.spec.reading import parse_spec
from expertprune.units import GONE
from tests.oracle import change_config, load, logits_of, random_plan, resolved
from tests.patching import everywhere
from tests.pruning.cutting import assert_cut_as_planned, tiny_base
from tests.tiny import WIDTHS, save_tiny, tiny_tokenizer


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


# Blocks side by side; and norms behind the blocks.
@pytest.mark.parametrize("model_type", ["cohere", "exaone4"])
def test_a_recognized_family_is_cut_as_masked(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert model_type not in families()
    with caplog.at_level(logging.WARNING):
        base = resolved(save_unlisted(tmp_path / "base", model_type), tmp_path / "store")
    assert not base.family.tested
    assert f"model_type '{model_type}' is not listed" in caplog.text
    assert check_family(base, layer_widths=True) == ["ffn", "kv_groups", "query_heads", "widths of single layers"]
    assert_cut_as_planned(random_plan(base, 1, ffn=19, heads_per_group=1, kv_groups=2), base, tmp_path / "expert")


def test_layers_without_positions_by_a_rule_are_written_out(tmp_path: Path) -> None:
    """Every second layer of this SmolLM3 has none; without layer 1 the first of them is the third that stays."""
    folder = save_unlisted(tmp_path / "base", "smollm3", num_hidden_layers=5, no_rope_layer_interval=2)
    change_config(folder, remove=["no_rope_layers", "layer_types"])
    base = resolved(folder, tmp_path / "store")
    check_kinds(base.checkpoint, base.family, base.layers, [1], False)
    kept = [GONE if layer == 1 else shape.all_kept for layer, shape in enumerate(base.layers)]
    assert base.family.pruned_config(base.checkpoint.config, kept)["no_rope_layers"] == [1, 1, 0, 1]


def test_the_log_says_when_the_oracle_holds_and_the_expert_is_built(
    tmp_path: Path, spec_data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec_data |= {"base": str(save_unlisted(tmp_path / "base", "gemma")), "evaluate": {"enabled": False}}
    with caplog.at_level(logging.WARNING):
        out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    assert "the oracle holds on a tiny random copy (ffn, kv_groups, query_heads)" in caplog.text
    config = load(out).config
    assert (config.model_type, config.intermediate_size) == ("gemma", 24)


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
    said = f"{folder}: the oracle fails for model_type '{model_type}' on a tiny random copy: .*{re.escape(words)}"
    with pytest.raises(CheckpointError, match=f"{said}.*Nothing was cut"):
        expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    assert not (tmp_path / "expert").exists()
    assert not list(store.glob("profiles/*"))


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma4_text", "LayerRecorder"),  # its layers take more than hidden states by position
        ("gemma4_unified_text", "is not homogeneous across layers"),  # nor can single layers have widths of their own
    ],
)
def test_a_class_that_fails_is_refused_as_the_oracle_fails(model_type: str, words: str, tmp_path: Path) -> None:
    changes = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_hidden_layers": 6}
    base = resolved(save_unlisted(tmp_path / "base", model_type, **changes), tmp_path / "store")
    with pytest.raises(CheckpointError, match=f"oracle fails for model_type '{model_type}'.*class fails: .*{words}"):
        check_family(base, layer_widths=True)


def test_the_oracle_holds_and_sees_what_changes_no_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one tensor that are cut elsewhere; and query heads that read other KV heads, so other heads leave with one."""
    base = tiny_base(tmp_path, "llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert check_family(base) == ["ffn", "kv_groups", "query_heads"]
    assert torch.equal(torch.rand(3), expected), "the random numbers of others are left alone"

    def rolled(name: str, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        cut = cut_tensor(name, tensor, *rest)
        return cut.roll(4, 0) if name == "self_attn.k_proj.weight" and cut is not tensor else cut

    with monkeypatch.context() as patched:
        everywhere(patched, "expertprune.pruning.slicing.cut_tensor", rolled)
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight, or what goes into it"):
            check_family(base)
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "repeat_kv", lambda states, repeats: states.repeat(1, repeats, 1, 1))
    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: eager)
    with pytest.raises(CheckpointError, match=r"cutting kv_groups: model\.layers\.0\.self_attn\.o_proj\.weight, or"):
        check_family(base)


# --- what is recognized -----------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "invented", "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 6,
    "num_key_value_heads": 3,
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"model.layers.0.mlp.{name}_proj.weight": (32, 24) for name in ("gate", "up")},
    **{f"model.layers.0.self_attn.{name}_proj.weight": (12, 24) for name in ("k", "v")},
    **{f"model.layers.0.self_attn.{name}_proj.weight": (24, 24) for name in ("q", "o")},
    "model.layers.0.mlp.down_proj.weight": (24, 32),
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


def test_what_is_more_or_less_than_that_is_none() -> None:
    for name, shape in (
        ("model.layers.0.mlp.experts.0.gate_proj.weight", (32, 24)),
        ("vision.layers.0.mlp.gate_proj.weight", (32, 24)),  # a second stack of layers
        ("model.layers.0.mlp.down_proj.weight", (32, 24)),  # an output that is none
    ):
        assert recognized(CONFIG, {**SHAPES, name: shape}) is None, name
    for lost in (name for name in SHAPES if "proj" in name):
        assert recognized(CONFIG, {name: shape for name, shape in SHAPES.items() if name != lost}) is None, lost
    for lost in CONFIG.keys() - {"model_type", "num_key_value_heads"}:
        assert recognized({key: value for key, value in CONFIG.items() if key != lost}, SHAPES) is None, lost


def test_a_cap_on_the_attention_logits_asks_for_the_implementation_that_has_it(tmp_path: Path) -> None:
    for cap, expected in (({}, "sdpa"), ({"attn_logit_softcapping": 30.0}, "eager")):
        family = recognized({**CONFIG, **cap}, SHAPES)
        assert family is not None
        assert family.attention_implementation == expected
    folder = save_tiny(tmp_path / "base", "gemma2")
    capped = load_model(folder, torch.float32, torch.device("cpu"))
    change_config(folder, attn_logit_softcapping=1e9)
    assert not torch.allclose(logits_of(capped), logits_of(load_model(folder, torch.float32, torch.device("cpu"))))
