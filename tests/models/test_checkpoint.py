"""Checkpoints read lazily and written sliced; damaged ones are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertprune.arch import family_of
from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import Checkpoint, write_weights
from expertprune.models.costs import unit_parameters
from expertprune.units import Structure
from tests.oracle import pad_headers, pruned, random_plan, read_json, resolved, stored_tensors
from tests.tiny import save_tiny, tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sharded tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / read_json(folder / INDEX)["weight_map"][tensor]


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a stored tensor, or remove it everywhere where `change` gives `None`."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    new = change(tensors.pop(name))
    if new is not None:
        tensors[name] = new.contiguous()
    else:
        change_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    save_file(tensors, path, metadata={"format": "pt"})


# --- damage


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


SHARD = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize("keep", [0.99, 0.001, 0.0])
def test_truncated_shard(folder: Path, store: Path, keep: float) -> None:
    truncate(folder / SHARD, keep)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: truncated or corrupt"):
        resolved(folder, store)


def test_truncated_single_file(tmp_path: Path, store: Path) -> None:
    single = save_tiny(tmp_path / "single")
    truncate(single / "model.safetensors", 0.9)
    with pytest.raises(CheckpointError, match=r"single/model\.safetensors: truncated or corrupt"):
        resolved(single, store)


@pytest.mark.parametrize(
    ("start", "garbage"),
    [(8, b"not json"), (0, (2**62).to_bytes(8, "little")), (0, (5).to_bytes(8, "little"))],
    ids=["header is no JSON", "header longer than the file", "header cut short"],
)
def test_corrupt_header(folder: Path, store: Path, start: int, garbage: bytes) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[start : start + len(garbage)] = garbage
    (folder / SHARD).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: truncated or corrupt"):
        resolved(folder, store)


def test_missing_shard(folder: Path, store: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD}: no such file, though the folder's index names it"):
        resolved(folder, store)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_only(folder: Path, store: Path, name: str) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({"a": torch.zeros(2)}, folder / name)
    with pytest.raises(CheckpointError) as error:
        resolved(folder, store)
    assert str(folder) in str(error.value)
    assert name in str(error.value)
    assert "convert it to safetensors" in str(error.value)


def test_no_weights(folder: Path, store: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        resolved(folder, store)


@pytest.mark.parametrize("file", ["../x.safetensors", "inner/x.safetensors", "/x.safetensors"])
def test_index_may_name_files_of_its_own_folder_only(folder: Path, store: Path, file: str) -> None:
    """Even where the file exists and is sound."""
    name = "model.norm.weight"
    (folder / "inner").mkdir()
    for place in (folder.parent, folder / "inner"):
        save_file({name: torch.ones(24)}, place / "x.safetensors")
    change_json(folder / INDEX, lambda index: index["weight_map"].update({name: file}))
    with pytest.raises(CheckpointError) as error:
        resolved(folder, store)
    assert f"{folder / INDEX}: {file!r}" in str(error.value)


def test_index_lists_a_tensor_that_no_file_holds(folder: Path, store: Path) -> None:
    change_json(folder / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": SHARD}))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: lists tensors that no file holds: model\.extra\.weight"):
        resolved(folder, store)


@pytest.mark.parametrize(
    "weight_map",
    [["a"], {"a": 3}, {}, {"model.norm.weight": ""}, {"model.norm.weight": ".."}],
    ids=["a list", "a number for a file", "no tensor", "no file", "the folder above"],
)
def test_index_without_a_usable_weight_map(folder: Path, store: Path, weight_map: Any) -> None:
    change_json(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match=str(folder)):
        resolved(folder, store)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"{", "not valid JSON"), (b"[]", "not a JSON object"), (b'{"a": "\xff"}', "not valid JSON")],
)
def test_broken_json(folder: Path, store: Path, name: str, content: bytes, problem: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{folder / name}: {problem}"):
        resolved(folder, store)


def test_no_config(folder: Path, store: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        resolved(folder, store)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("intermediate_size", 64, "mlp.gate_proj.weight is [32, 24], the config makes axis 0 64"),
        ("num_attention_heads", 12, "self_attn.q_proj.weight is [24, 24], the config makes axis 0 48"),
        ("num_key_value_heads", 1, "self_attn.k_proj.weight is [12, 24], the config makes axis 0 4"),
        ("head_dim", 8, "self_attn.q_proj.weight is [24, 24], the config makes axis 0 48"),
        ("num_hidden_layers", 4, "model.layers.3.mlp.gate_proj.weight is missing"),
        ("hidden_size", 48, "48"),
    ],
)
def test_config_disagrees_with_the_weights(folder: Path, store: Path, key: str, value: int, named: str) -> None:
    change_json(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError) as error:
        resolved(folder, store)
    assert f"{folder}: config.json disagrees with the weights" in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "self_attn.o_proj.weight"])
def test_missing_coupled_tensor(folder: Path, store: Path, name: str) -> None:
    full = f"model.layers.1.{name}"
    change_tensor(folder, full, lambda tensor: None)
    with pytest.raises(CheckpointError) as error:
        resolved(folder, store)
    assert f"{full} is missing" in str(error.value)
    assert str(folder) in str(error.value)


def test_missing_bias_that_the_family_always_has(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "qwen2", "qwen2", max_shard_size="20KB")
    change_tensor(folder, "model.layers.2.self_attn.k_proj.bias", lambda tensor: None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.k_proj\.bias is missing"):
        resolved(folder, store)


def test_one_layer_of_another_width(folder: Path, store: Path) -> None:
    change_tensor(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor[:, :30])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is \[24, 30\]"):
        resolved(folder, store)


def test_many_problems_are_counted(folder: Path, store: Path) -> None:
    """3 layers of gate, up and down: nine tensors disagree, five are named."""
    change_json(folder / "config.json", lambda config: config.update(intermediate_size=16))
    with pytest.raises(CheckpointError, match=r"\(and 4 more\)"):
        resolved(folder, store)


def test_quantized_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({n: t.to(torch.int8) if t.ndim == 2 else t for n, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="stored as I8, so they are quantized"):
        _ = Checkpoint(folder).dtype


# --- reading


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_tensors_are_read_as_they_were_saved(tmp_path: Path, shards: str) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size=shards)
    checkpoint, state = Checkpoint(folder), tiny_model("llama").state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in state.values())
    assert checkpoint.dtype == torch.float32


def test_dtype_is_that_of_most_parameters(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() if t.ndim == 2 else t for n, t in load_file(path).items()}, path)
    assert Checkpoint(folder).dtype == torch.bfloat16


def test_carried_files_are_all_but_weights_cards_and_config(folder: Path) -> None:
    carried = ["LICENSE", "chat_template.jinja", "special.model", "merges.txt"]
    left = ["README.md", "expertprune.json", "pytorch_model.bin", "tf_model.h5", "x.gguf", ".y.partial"]
    for name in carried + left:
        (folder / name).write_text(name)
    names = {path.name for path in Checkpoint(folder).carried_files}
    assert names == {*carried, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


# --- costs

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_attention_heads": 12, "head_dim": 6},
    "llama, biases, tied": {"family": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "gemma3": {"family": "gemma3"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_unit_parameters_are_what_the_cut_model_lacks(variant: str, tmp_path: Path, store: Path) -> None:
    base, layer = resolved(save_tiny(tmp_path / "base", **VARIANTS[variant]), store), 2
    shape = base.layers[layer]
    per_group = shape.query_heads // shape.kv_heads
    cuts = {
        Structure.FFN: ({"ffn": 25}, 7),
        Structure.QUERY_HEADS: ({"heads_per_group": per_group // 2}, 3 * (per_group - per_group // 2)),
        Structure.KV_GROUPS: ({"kv_groups": 2}, 1),
    }
    prefix = f"model.layers.{layer}."
    before = sum(t.numel() for name, t in stored_tensors(base.folder).items() if name.startswith(prefix))
    for structure, (widths, removed) in cuts.items():
        expert = stored_tensors(pruned(random_plan(base, **widths), base, tmp_path / structure))
        # The zero biases that a rewritten config asks for are none of the units'.
        added = sum(expert[name].numel() for name in expert.keys() - base.checkpoint.tensors.keys() if prefix in name)
        after = sum(t.numel() for name, t in expert.items() if name.startswith(prefix)) - added
        assert unit_parameters(base.checkpoint, base.family, shape, layer, structure) == (before - after) / removed


@pytest.mark.parametrize(
    ("biases", "structure", "expected"),
    [
        (False, Structure.FFN, 3 * 24),  # a row of gate, a row of up, a column of down
        (True, Structure.FFN, 3 * 24 + 2),
        (False, Structure.QUERY_HEADS, 2 * 4 * 24),  # head_dim rows of q, head_dim columns of o
        (True, Structure.QUERY_HEADS, 2 * 4 * 24 + 4),
        (False, Structure.KV_GROUPS, 2 * (2 * 4 * 24) + 2 * 4 * 24),  # two query heads, and rows of k and v
        (True, Structure.KV_GROUPS, 2 * (2 * 4 * 24 + 4) + 2 * (4 * 24 + 4)),
    ],
)
def test_unit_parameters_written_out(biases: bool, structure: Structure, expected: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "base", attention_bias=biases, mlp_bias=biases))
    shape = family_of("llama").layer_shapes(checkpoint.config)[0]
    assert unit_parameters(checkpoint, family_of("llama"), shape, 1, structure) == expected


# --- writing


def test_only_files_with_a_changed_tensor_are_written_anew(folder: Path, tmp_path: Path) -> None:
    pad_headers(folder)
    base, out = Checkpoint(folder), tmp_path / "out"
    out.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    write_weights(base, out, lambda n, tensor: tensor[:5] if n == name else None)
    changed = base.tensors[name].file
    for file in base.shards:
        assert ((out / file).read_bytes() == (folder / file).read_bytes()) == (file != changed)
    before, after = stored_tensors(folder), stored_tensors(out)
    assert before.keys() == after.keys()
    assert torch.equal(after[name], before[name][:5])
    assert all(torch.equal(after[n], before[n]) for n in before if n != name)
    with safe_open(out / changed, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    old, new = read_json(folder / INDEX), read_json(out / INDEX)
    assert new["weight_map"] == old["weight_map"]
    assert old["metadata"]["total_size"] - new["metadata"]["total_size"] == 27 * 24 * 4
    assert old["metadata"]["total_parameters"] - new["metadata"]["total_parameters"] == 27 * 24


def test_extra_tensors_are_listed_in_the_index(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_weights(
        Checkpoint(folder),
        out,
        lambda n, t: None,
        lambda file: iter([("more", torch.ones(3))] if file == SHARD else []),
    )
    assert torch.equal(load_file(out / SHARD)["more"], torch.ones(3))
    old, new = read_json(folder / INDEX), read_json(out / INDEX)
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 3 * 4
    assert new["weight_map"] == old["weight_map"] | {"more": SHARD}
