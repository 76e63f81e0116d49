"""From the spec's base to a folder that can be cut: names, dtypes, devices and digests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertprune.errors import CheckpointError, SpecError
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model, load_tokenizer, run_dtype
from expertprune.spec.schema import Base
from expertprune.units import LayerShape
from tests.oracle import change_config, logits_of, resolved
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_folder_is_resolved_and_its_model_computes_what_the_saved_one_does(folder: Path, store: Path) -> None:
    change_config(folder, quantization_config=None)
    base = resolved(folder, store)
    assert (base.folder, base.name, base.trust_remote_code) == (folder, str(folder), False)
    assert base.layers == (LayerShape(hidden=24, ffn=32, query_heads=6, kv_heads=3, head_dim=4),) * 3
    model = load_model(folder, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model("llama")), atol=1e-5, rtol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(folder)("the heart")["input_ids"] == tiny_tokenizer()("the heart")["input_ids"]


BF16, F32 = torch.bfloat16, torch.float32


def test_auto_runs_in_the_stored_dtype_on_a_gpu_and_on_a_cpu_in_the_faster_one(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, gain, asked, stored, run in (
        ("cpu", 1.4, "auto", BF16, F32), ("cpu", 2.0, "auto", BF16, BF16), ("cpu", 2.0, "auto", torch.float16, F32),
        ("cpu", 2.0, "float32", BF16, F32), ("cuda", 0.1, "auto", BF16, BF16), ("cuda", 2.0, "float32", BF16, F32),
    ):  # fmt: skip
        monkeypatch.setattr("expertprune.models.loading.bfloat16_gain", lambda gain=gain: gain)
        assert run_dtype(asked, stored, torch.device(device)) is run
    model = str(save_tiny(tmp_path / "model", dtype=BF16))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    base = resolve_base(Base(model=model, device="cuda:0"), store)
    assert (base.device, base.checkpoint.dtype, base.dtype) == (torch.device("cuda:0"), BF16, BF16)
    assert resolve_base(Base(model=model, device="cpu", dtype="float32"), store).dtype is F32
    with pytest.raises(SpecError, match=r"base\.device: cuda:1: torch finds 1 GPU"):
        resolve_base(Base(model=model, device="cuda:1"), store)


def test_the_digests_change_with_what_they_cover(tiny_llama: Path, folder: Path, store: Path) -> None:
    def digests(of: Path) -> tuple[str, str]:
        base = resolved(of, store)
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


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for load in (lambda folder: load_model(folder, torch.float32), load_tokenizer):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load(tmp_path)


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
