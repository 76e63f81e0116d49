"""Checkpoints read lazily and written sliced; damaged ones are refused by name."""

from __future__ import annotations

import json
import os
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
from expertprune.models.checkpoint import INDEX, SINGLE, Checkpoint, headers, opened_weights
from expertprune.models.costs import unit_parameters
from expertprune.models.loading import load_model, model_class
from expertprune.models.shards import write_weights
from expertprune.models.tensorfile import DTYPES, in_order, written_file
from expertprune.units import Structure
from tests.oracle import change_config, load, pad_headers, read_json, resolved, stored_tensors
from tests.tiny import save_tiny

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sharded tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# --- damage ---------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], Any]


def without_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")


def index_with(weight_map: Any, more: bool = False) -> Damage:
    """Another weight map in the index, or more entries of it."""

    def change(folder: Path) -> None:
        index = read_json(folder / INDEX)
        index["weight_map"] = index["weight_map"] | weight_map if more else weight_map
        (folder / INDEX).write_text(json.dumps(index))

    return change


def without(part: str) -> Damage:
    """Tensors are taken out of the index and of all files, as where their shards were never made."""

    def change(folder: Path) -> None:
        places = read_json(folder / INDEX)["weight_map"]
        index_with({name: file for name, file in places.items() if part not in name})(folder)
        for path in folder.glob("*.safetensors"):
            kept = {name: tensor for name, tensor in load_file(path).items() if part not in name}
            save_file(kept, path, metadata={"format": "pt"})

    return change


def narrower(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    path = folder / read_json(folder / INDEX)["weight_map"][name]
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:, :30].contiguous()}, path, metadata={"format": "pt"})


def says(**changes: Any) -> Damage:
    return lambda folder: change_config(folder, **changes)


def holds(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


DISAGREES = "config.json disagrees with the weights: "
DAMAGES: dict[str, tuple[Damage, str]] = {
    "cut off": (lambda folder: os.truncate(folder / SHARD, 6000), f"{SHARD}: truncated or corrupt"),
    "header longer than the file": (holds(SHARD, (2**62).to_bytes(8, "little")), f"{SHARD}: truncated or corrupt"),
    "no shard": (
        lambda folder: (folder / SHARD).unlink(),
        f"{SHARD}: no such file, though the folder's index names it",
    ),
    "no weights": (without_weights, "no weights"),
    "pickled": (pickled, "pytorch_model.bin, which could run code when read; convert it to safetensors"),
    "a tensor of no file": (
        index_with({"model.extra.weight": SHARD}, more=True),
        f"{INDEX}: lists tensors that no file holds: model.extra.weight",
    ),
    **{
        f"index names {file!r}": (index_with({"model.norm.weight": file}, more=True), f"{INDEX}: {file!r}")
        for file in ("../x.safetensors", "inner/x.safetensors", "/x.safetensors")
    },
    **{
        f"index names {file!r}": (index_with({"model.norm.weight": file}), "though the folder's index names it")
        for file in ("", "..")
    },
    **{f"weight map {what}": (index_with(what), f"{INDEX}: ") for what in (["a"], {"a": 3}, {})},
    "config cut off": (holds("config.json", b"{"), "config.json: not valid JSON"),
    "index no text": (holds(INDEX, b'{"a": "\xff"}'), f"{INDEX}: not UTF-8 text"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "wide neurons": (says(intermediate_size=64), "gate_proj.weight is [32, 24], the config makes axis 0 64"),
    "KV heads": (says(num_key_value_heads=1), "k_proj.weight is [12, 24], the config makes axis 0 4"),
    "layers": (says(num_hidden_layers=4), f"{DISAGREES}num_hidden_layers is 4, and no tensor belongs to layer 3;"),
    "many layers": (says(num_hidden_layers=7), "no tensor belongs to layers 3 to 6"),
    "no second layer": (without("layers.1."), "num_hidden_layers is 3, and no tensor belongs to layer 1;"),
    "no up": (without("layers.1.mlp.up_proj"), "model.layers.1.mlp.up_proj.weight is missing"),
    "one layer narrower": (narrower, "model.layers.1.mlp.down_proj.weight is [24, 30]"),
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
    assert str(folder) in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "additional_chat_templates"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """An expert would hold the content of any file of this machine."""
    (tmp_path / "secret").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "secret" / "config.json")
    (folder / name).unlink(missing_ok=True)
    target = tmp_path / "secret" / ("" if name == "additional_chat_templates" else "config.json")
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


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
def test_unit_parameters_written_out(biases: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "base", attention_bias=biases, mlp_bias=biases))
    shape = family_of("llama").layer_shapes(checkpoint.config)[0]
    head = 2 * 4 * 24 + 4 * biases  # head_dim rows of q, head_dim columns of o
    expected = {
        Structure.FFN: 3 * 24 + 2 * biases,  # a row of gate, a row of up, a column of down
        Structure.QUERY_HEADS: head,
        Structure.KV_GROUPS: 2 * head + 2 * (4 * 24 + 4 * biases),  # two query heads, and rows of k and v
    }
    for structure, parameters in expected.items():
        assert unit_parameters(checkpoint, family_of("llama"), shape, 1, structure) == parameters


# --- read and written -----------------------------------------------------------------------------------------------


def test_dtype_is_that_of_most_parameters(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() if t.ndim == 2 else t for n, t in load_file(path).items()}, path)
    assert Checkpoint(folder).dtype == torch.bfloat16


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


def test_only_files_with_a_changed_tensor_are_written_anew_and_more_tensors_are_listed(
    folder: Path, tmp_path: Path
) -> None:
    pad_headers(folder)
    base, out, name = Checkpoint(folder), tmp_path / "out", "model.layers.1.mlp.up_proj.weight"
    out.mkdir()
    changed = base.tensors[name].file
    write_weights(
        base,
        out,
        lambda each, tensor: tensor[:5] if each == name else None,
        lambda file: iter([("more", torch.ones(3))] if file == changed else []),
    )
    for file in base.shards:
        assert ((out / file).read_bytes() == (folder / file).read_bytes()) == (file != changed)
    before, after = stored_tensors(folder), stored_tensors(out)
    assert torch.equal(after.pop("more"), torch.ones(3))
    assert torch.equal(after[name], before[name][:5])
    assert before.keys() == after.keys()
    assert all(torch.equal(after[each], before[each]) for each in before if each != name)
    with safe_open(out / changed, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    old, new = read_json(folder / INDEX), read_json(out / INDEX)
    assert new["weight_map"] == old["weight_map"] | {"more": changed}
    assert old["metadata"]["total_size"] - new["metadata"]["total_size"] == (27 * 24 - 3) * 4
    assert old["metadata"]["total_parameters"] - new["metadata"]["total_parameters"] == 27 * 24 - 3


def test_one_file_counts_before_shards_beside_it_as_in_transformers(
    tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = save_tiny(tmp_path / "both", max_shard_size="20KB", seed=2), tmp_path / "out"
    shutil.copy(save_tiny(tmp_path / "one", seed=1) / SINGLE, folder)
    base, runs = resolved(folder, store).checkpoint, load(folder).state_dict()
    assert f"{SINGLE} is taken, as transformers takes it, and not model-00001" in caplog.text
    assert base.tensors.keys() == runs.keys()
    assert all(torch.equal(base.read(name), runs[name]) for name in runs)
    out.mkdir()
    write_weights(base, out, lambda name, tensor: tensor[:5] if name == "model.norm.weight" else None)
    assert [path.name for path in out.iterdir()] == [SINGLE]


def test_a_file_is_opened_once_for_all_its_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads the header of all its tensors, so that to open it for each one takes their number squared."""
    found, opened = Checkpoint(folder), list[Path]()

    def noted(path: Path) -> Any:
        opened.append(path)
        return opened_weights(path)

    monkeypatch.setattr("expertprune.models.checkpoint.opened_weights", noted)
    for name in (*found.tensors, *found.tensors):
        assert found.read(name).shape == found.tensors[name].shape
    assert sorted(opened) == sorted({folder / info.file for info in found.tensors.values()})
    assert len(opened) < len(found.tensors)


# --- folders that are replaced while they are read ------------------------------------------------------------------


def test_two_folders_are_never_read_as_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, aside = save_tiny(tmp_path / "other", "llama", max_shard_size="20KB"), tmp_path / "aside"
    checkpoint, out = Checkpoint(folder), tmp_path / "out"
    first, *_, last = checkpoint.tensors
    out.mkdir()

    def exchange() -> None:
        """What `build --overwrite` does to the folder at its output."""
        folder.rename(aside)
        other.rename(folder)
        aside.rename(other)

    def replaced(read: Callable[[], Any]) -> None:
        with pytest.raises(CheckpointError, match="was replaced while it was read; run the command again"):
            read()

    checkpoint.read(first)
    exchange()
    replaced(lambda: checkpoint.read(last))
    replaced(lambda: write_weights(checkpoint, out, lambda name, tensor: None))
    exchange()
    write_weights(checkpoint, out, lambda name, tensor: None)
    # a model: before the headers are read, and before transformers reads the weights
    for place, original in (("checkpoint.headers", headers), ("loading.model_class", model_class)):
        first_time = iter([exchange])

        def exchange_first(path: Path, original: Any = original, first_time: Any = first_time) -> Any:
            next(first_time, lambda: None)()
            return original(path)

        with monkeypatch.context() as patched:
            patched.setattr(f"expertprune.models.{place}", exchange_first)
            replaced(lambda: load_model(folder, torch.float32))
        assert next(first_time, None) is None
