"""GGUF files as bases: checked by their headers, converted when weights are needed, equal to transformers' reading."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file

from expertprune.arch import bundled_models
from expertprune.arch.bundled import BundledModel
from expertprune.errors import CheckpointError
from expertprune.models import base as models
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.checkpoint import INDEX, Checkpoint
from expertprune.models.gguf import conversion
from expertprune.spec.schema import Base
from expertprune.stages.export import export
from tests.engine_of_gguf import finish
from tests.models.test_gguf import READ, tiny
from tests.oracle import fetched, load, read_json
from tests.patching import everywhere


def file_of(family: str, folder: Path, kind: str = "q8_0", **changes: Any) -> Path:
    return export(tiny(folder / "model", family, **changes), folder / f"{family}.gguf", type=kind).path


def of(file: Path, store: Path, dtype: str = "float32") -> ResolvedBase:
    return resolve_base(Base(model=str(file), dtype=dtype), store)


@pytest.mark.parametrize("family", READ)
def test_the_folder_holds_what_transformers_reads_bit_for_bit(family: str, store: Path, tmp_path: Path) -> None:
    file = file_of(family, tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = read.state_dict()
    found = load(fetched(of(file, store)).folder).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_bundled_models_hold_what_transformers_reads_bit_for_bit(name: str, real_store: Path) -> None:
    if any(importlib.util.find_spec(packaged.module) is None for packaged in bundled_models()[name].packaged):
        pytest.skip(f"needs {bundled_models()[name].install}")
    base = fetched(resolve_base(Base(model=name), real_store))
    file = models._bundled_file(name, real_store)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = read.state_dict()
    assert set(base.checkpoint.tensors) == set(expected) - {"lm_head.weight"}
    for each in base.checkpoint.tensors:
        assert torch.equal(base.checkpoint.read(each), expected[each].bfloat16()), each


def test_a_file_is_checked_by_its_header_and_converted_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of("llama", tmp_path)
    base = of(file, store)
    promised = dict(base.checkpoint.tensors)
    steps: list[Any] = []
    assert not list(base.folder.glob("*.safetensors"))
    assert base.checkpoint.parameters == sum(tensor.numel() for tensor in load_all(tmp_path / "model").values())

    @contextmanager
    def track(stage: str, count: int) -> Iterator[Callable[[], None]]:
        steps.append((stage, count))
        yield lambda: steps.append("step")

    base.checkpoint.fetch(track)
    assert steps[0] == ("convert llama.gguf", len(promised))
    assert steps.count("step") == len(promised)
    assert base.checkpoint.tensors == promised
    monkeypatch.setattr(conversion, "_dequantized", None)  # not called again
    assert of(file, store).digest == base.digest


def test_checking_a_file_reads_no_weights(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of("llama", tmp_path)

    def digest(path: Path, *rest: Any) -> str:
        assert path != file
        return str(original(path, *rest))

    original = everywhere(monkeypatch, "expertprune.files.staging.file_digest", digest)
    base = of(file, store)
    assert of(file, store).folder == base.folder
    os.utime(file, ns=(0, 10**18))  # another one, whose header is the same
    assert of(file, store).folder != base.folder
    with pytest.raises(CheckpointError, match="was replaced since it was checked"):
        base.checkpoint.fetch()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_conversion_that_was_stopped_goes_on_from_the_last_whole_file(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of("llama", tmp_path)
    whole = load_all(fetched(of(file, tmp_path / "other")).folder)
    monkeypatch.setattr(conversion, "_SHARD", 50_000)
    base = of(file, store)
    read, seen = conversion._Arrangement.read, []

    def fails(self: Any, name: str, *args: Any) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 20:
            raise OSError("killed")
        return read(self, name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(conversion._Arrangement, "read", fails)
        with pytest.raises(CheckpointError, match="killed"):
            base.checkpoint.fetch()
    before = {path: path.stat().st_mtime_ns for path in base.folder.glob("*.safetensors")}
    assert before
    assert not (base.folder / INDEX).exists()
    again = of(file, store)
    again.checkpoint.fetch()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    index = read_json(base.folder / INDEX)
    files = sorted(path.name for path in base.folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in whole.values())
    found = load_all(base.folder)
    assert set(found) == set(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert Checkpoint(base.folder).tensors == again.checkpoint.tensors


def test_a_tied_model_takes_its_output_matrix_for_both(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundled model whose file stores the matrix twice; a file of the user's stays as it is."""
    file = file_of("qwen2", tmp_path, "f32", tie_word_embeddings=False)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    file = file.rename(tmp_path / "package" / file.name)
    entry = BundledModel(module="package", file=file.name, install="none", licence="none", tied=True)
    monkeypatch.setattr(models, "bundled_models", lambda: {"tiny": entry})
    monkeypatch.syspath_prepend(tmp_path)
    tied = fetched(resolve_base(Base(model="tiny", dtype="float32"), store))
    assert tied.checkpoint.config["tie_word_embeddings"]
    assert "lm_head.weight" not in tied.checkpoint.tensors
    assert torch.equal(tied.checkpoint.read("model.embed_tokens.weight"), stored["output.weight"])
    apart = fetched(of(file, store))
    assert torch.equal(apart.checkpoint.read("model.embed_tokens.weight"), stored["token_embd.weight"])
    assert torch.equal(apart.checkpoint.read("lm_head.weight"), stored["output.weight"])


def test_a_tensor_that_the_model_does_not_have_is_named(store: Path, tmp_path: Path) -> None:
    reader = GGUFReader(file_of("llama", tmp_path))
    writer = GGUFWriter(tmp_path / "b.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.1.attn_sinks.weight", torch.zeros(4).numpy())
    finish(writer)
    with pytest.raises(
        CheckpointError, match=r"holds blk\.1\.attn_sinks\.weight, of which .*LlamaForCausalLM takes noth"
    ):
        of(tmp_path / "b.gguf", store)
    assert not (store / "bases").exists()
