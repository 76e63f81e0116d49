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

from expertprune.arch import family_of
from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import Checkpoint, headers
from expertprune.models.costs import unit_parameters
from expertprune.models.loading import load_model, model_class
from expertprune.models.shards import write_weights
from expertprune.models.tensorfile import DTYPES, in_order, written_file
from expertprune.units import Structure
from tests.oracle import change_config, pad_headers, read_json, resolved, stored_tensors
from tests.tiny import save_tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sharded tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# --- damage

SHARD = "model-00002-of-00004.safetensors"


def damaged(start: int, garbage: bytes) -> Callable[[Path], Any]:
    """Other bytes at a place of a shard; the rest of the file is cut off where there are none."""

    def change(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        end = start + len(garbage) if garbage else len(content)
        (folder / SHARD).write_bytes(content[:start] + garbage + content[end:])

    return change


def without_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")


def index_with(weight_map: Any, more: bool = False) -> Callable[[Path], Any]:
    """Another weight map in the index, or more entries of it."""

    def change(folder: Path) -> None:
        index = read_json(folder / INDEX)
        index["weight_map"] = index["weight_map"] | weight_map if more else weight_map
        (folder / INDEX).write_text(json.dumps(index))

    return change


def without(name: str) -> Callable[[Path], Any]:
    """A tensor is taken out everywhere."""

    def change(folder: Path) -> None:
        index = read_json(folder / INDEX)
        path = folder / index["weight_map"].pop(name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps(index))

    return change


def without_layer(layer: int) -> Callable[[Path], Any]:
    """A layer's tensors are taken out of the index and of all files, as where its shards were never made."""

    def change(folder: Path) -> None:
        for name in list(read_json(folder / INDEX)["weight_map"]):
            if name.startswith(f"model.layers.{layer}."):
                without(name)(folder)

    return change


def narrower(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    path = folder / read_json(folder / INDEX)["weight_map"][name]
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:, :30].contiguous()}, path, metadata={"format": "pt"})


def says(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: change_config(folder, **changes)


def holds(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


DISAGREES = "config.json disagrees with the weights"
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no more than a start": (damaged(6000, b""), [f"{SHARD}: truncated or corrupt"]),
    "an empty file": (damaged(0, b""), [f"{SHARD}: truncated or corrupt"]),
    "header is no JSON": (damaged(8, b"not json"), [f"{SHARD}: truncated or corrupt"]),
    "header longer than the file": (damaged(0, (2**62).to_bytes(8, "little")), [f"{SHARD}: truncated or corrupt"]),
    "header cut short": (damaged(0, (5).to_bytes(8, "little")), [f"{SHARD}: truncated or corrupt"]),
    "no shard": (
        lambda folder: (folder / SHARD).unlink(),
        [f"{SHARD}: no such file, though the folder's index names it"],
    ),
    "no weights": (without_weights, ["no weights"]),
    "pickled": (pickled, ["pytorch_model.bin", "convert it to safetensors"]),
    "a tensor of no file": (
        index_with({"model.extra.weight": SHARD}, more=True),
        [f"{INDEX}: lists tensors that no file holds: model.extra.weight"],
    ),
    **{
        f"index names {file!r}": (index_with({"model.norm.weight": file}, more=True), [f"{INDEX}: {file!r}"])
        for file in ("../x.safetensors", "inner/x.safetensors", "/x.safetensors")
    },
    **{
        f"weight map {what}": (index_with(what), [])
        for what in (["a"], {"a": 3}, {}, {"model.norm.weight": ""}, {"model.norm.weight": ".."})
    },
    **{
        f"{name} with {content!r}": (holds(name, content), [f"{name}: {problem}"])
        for name in ("config.json", INDEX)
        for content, problem in (
            (b"{", "not valid JSON"),
            (b"[]", "not a JSON object"),
            (b'{"a": "\xff"}', "not UTF-8 text"),
        )
    },
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
    "wide neurons": (
        says(intermediate_size=64),
        [DISAGREES, "gate_proj.weight is [32, 24], the config makes axis 0 64"],
    ),
    "many neurons": (says(intermediate_size=16), [DISAGREES, "(and 4 more)"]),  # 3 matrices of 3 layers, five are named
    "heads": (says(num_attention_heads=12), [DISAGREES, "q_proj.weight is [24, 24], the config makes axis 0 48"]),
    "KV heads": (says(num_key_value_heads=1), [DISAGREES, "k_proj.weight is [12, 24], the config makes axis 0 4"]),
    "head_dim": (says(head_dim=8), [DISAGREES, "q_proj.weight is [24, 24], the config makes axis 0 48"]),
    "layers": (says(num_hidden_layers=4), [DISAGREES, "num_hidden_layers is 4, and no tensor belongs to layer 3;"]),
    "many layers": (says(num_hidden_layers=7), ["no tensor belongs to layers 3 to 6"]),
    "a layer in the middle": (without_layer(1), ["num_hidden_layers is 3, and no tensor belongs to layer 1;"]),
    "hidden": (says(hidden_size=48), [DISAGREES, "48"]),
    "no up": (without("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight is missing"]),
    "no o": (without("model.layers.1.self_attn.o_proj.weight"), ["model.layers.1.self_attn.o_proj.weight is missing"]),
    "one layer narrower": (narrower, ["model.layers.1.mlp.down_proj.weight is [24, 30]"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_by_name(damage: str, folder: Path, store: Path) -> None:
    """Files outside the folder may not be named even where they exist and are sound."""
    (folder / "inner").mkdir()
    for place in (folder.parent, folder / "inner"):
        save_file({"model.norm.weight": torch.ones(24)}, place / "x.safetensors")
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError) as error:
        resolved(folder, store)
    for each in (str(folder), *words):
        assert each in str(error.value)


def test_missing_bias_that_the_family_always_has(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "qwen2", "qwen2", max_shard_size="20KB")
    without("model.layers.2.self_attn.k_proj.bias")(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.k_proj\.bias is missing"):
        resolved(folder, store)


# --- reading


def test_dtype_is_that_of_most_parameters(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() if t.ndim == 2 else t for n, t in load_file(path).items()}, path)
    assert Checkpoint(folder).dtype == torch.bfloat16


# --- costs


PER_UNIT = [  # of a Llama without biases and with them
    (Structure.FFN, 3 * 24, 3 * 24 + 2),  # a row of gate, a row of up, a column of down
    (Structure.QUERY_HEADS, 2 * 4 * 24, 2 * 4 * 24 + 4),  # head_dim rows of q, head_dim columns of o
    # two query heads, and rows of k and v
    (Structure.KV_GROUPS, 2 * (2 * 4 * 24) + 2 * 4 * 24, 2 * (2 * 4 * 24 + 4) + 2 * (4 * 24 + 4)),
]


@pytest.mark.parametrize("biases", [False, True])
def test_unit_parameters_written_out(biases: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "base", attention_bias=biases, mlp_bias=biases))
    shape = family_of("llama").layer_shapes(checkpoint.config)[0]
    for structure, *expected in PER_UNIT:
        assert unit_parameters(checkpoint, family_of("llama"), shape, 1, structure) == expected[biases]


# --- writing


def test_a_file_written_tensor_by_tensor_is_that_of_safetensors(tmp_path: Path) -> None:
    """Byte for byte, for all dtypes, a scalar and an empty tensor."""
    tensors = {f"{9 - rank}.{name}": torch.arange(6).reshape(2, 3).to(dtype)
               for rank, (name, dtype) in enumerate(DTYPES.items()) if name != "F8_E8M0"}  # fmt: skip
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), "straße": torch.ones(1)}
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with written_file(tmp_path / "parts", expected, {"format": "pt"}) as made:
        for name in in_order({name: tensor.dtype for name, tensor in tensors.items()}):
            made.add(name, tensors[name])
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    with written_file(tmp_path / "parts", expected) as made:
        made.add("9.BOOL", torch.ones(1, 2, dtype=torch.bool))  # smaller than expected, and the others do not come
    assert load_file(tmp_path / "parts")["9.BOOL"].tolist() == [[True, True]]


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


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "additional_chat_templates"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """An expert would hold the content of any file of this machine."""
    target = tmp_path / "secret"
    if name == "additional_chat_templates":
        target.mkdir()
    else:
        shutil.copy(folder / "config.json", target)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to a file outside the folder"):
        Checkpoint(folder)


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(tmp_path: Path, folder: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "same.json").symlink_to("config.json")
    assert Checkpoint(snapshot).parameters == Checkpoint(folder).parameters


# --- folders that are replaced while they are read


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """Another model of the same shapes, in as many shards."""
    return save_tiny(tmp_path / "other", "llama", max_shard_size="20KB")


def exchange(one: Path, two: Path) -> None:
    """What `build --overwrite` does to the folder at its output."""
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def test_two_folders_are_never_read_as_one(folder: Path, other: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder)
    first, *_, last = checkpoint.tensors
    checkpoint.read(first)
    exchange(folder, other)
    with pytest.raises(CheckpointError, match="was replaced while it was read; run the command again"):
        checkpoint.read(last)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        write_weights(checkpoint, tmp_path / "out", lambda name, tensor: None)
    exchange(folder, other)
    write_weights(checkpoint, tmp_path / "out", lambda name, tensor: None)


@pytest.mark.parametrize("before", ["headers", "from_pretrained"])
def test_a_model_is_not_loaded_from_two_folders(
    before: str, folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def first(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not done:
                done.append(exchange(folder, other))
            return original(*args, **kwargs)

        return call

    if before == "headers":
        monkeypatch.setattr("expertprune.models.checkpoint.headers", first(headers))
    else:
        monkeypatch.setattr("expertprune.models.loading.model_class", first(model_class))
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        load_model(folder, torch.float32)
    assert done
