"""Checkpoints in FP8 blocks and in MXFP4 are read as transformers dequantizes them, and experts of them are bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expertprune.corpora.batches import make_batches
from expertprune.errors import CheckpointError
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.encodings import BlockFp8, Mxfp4
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.running import RunningBase
from expertprune.models.tensorfile import TensorInfo
from expertprune.spec.schema import Base
from tests.oracle import change_config, logits_of, pruned, random_plan, read_json, resolved
from tests.tiny import save_tiny

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}
IDS = torch.arange(3, 19)[None]


def read(encoding: BlockFp8 | Mxfp4, name: str, tensors: dict[str, Tensor]) -> Tensor:
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    infos = {key: TensorInfo("file", tuple(each.shape), names[each.dtype]) for key, each in tensors.items()}
    found = encoding.read(name, infos, tensors.__getitem__)
    info = encoding.decoded(infos)[name]
    assert (tuple(found.shape), found.dtype, "BF16") == (info.shape, torch.bfloat16, info.dtype)
    assert list(encoding.decoded(infos)) == [name]
    return found


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("scale", ["float32", "exponents"])
def test_fp8_blocks_are_read_as_transformers_reads_them(batch: tuple[int, ...], scale: str) -> None:
    torch.manual_seed(0)
    weight = fp8(*batch, 24, 64)
    scales = torch.rand(*batch, 3, 4) if scale == "float32" else torch.randint(120, 130, (*batch, 3, 4)).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert torch.equal(read(BlockFp8(8, 16), "w", {"w": weight, "w_scale_inv": scales}), expected)


def test_the_last_fp8_blocks_of_an_axis_may_be_smaller() -> None:
    """As DeepSeek-V3 stores matrices of 576 rows in blocks of 128."""
    weight, scales = fp8(5, 3), torch.tensor([[1.0, 2.0], [4.0, 8.0], [0.5, 0.25]])
    factors = [[1, 1, 2], [1, 1, 2], [4, 4, 8], [4, 4, 8], [0.5, 0.5, 0.25]]  # blocks of 2 × 2
    found = read(BlockFp8(2, 2), "w", {"w": weight, "w_scale_inv": scales})
    assert torch.equal(found.float(), weight.float() * torch.tensor(factors))  # powers of two: exact


def test_mxfp4_is_read_as_transformers_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 2, 16)).to(torch.uint8)
    scales = torch.randint(110, 135, (3, 40, 2)).to(torch.uint8)
    stored = {"w_blocks": blocks, "w_scales": scales}
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (3, 64, 40)
    assert torch.equal(read(Mxfp4(), "w", stored), expected)
    monkeypatch.setattr("expertprune.models.encodings._AT_ONCE", 64 * 7)  # seven rows at a time
    assert torch.equal(read(Mxfp4(), "w", stored), expected)


Stored = Callable[[str, Tensor], dict[str, Tensor] | None]


def fp8_of(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Matrices of layers in FP8 blocks."""
    if tensor.ndim != 2 or "layers" not in name:
        return None
    scales = torch.rand(*(-(-size // block) for size, block in zip(tensor.shape, (8, 16), strict=True))) / 4
    wide = scales.repeat_interleave(8, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
    stored = (tensor / wide).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scales, "": (stored.float() * wide).bfloat16()}


def mxfp4_of(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Matrices of routed experts in MXFP4: other values than before, of about their size."""
    if tensor.ndim != 3:
        return None
    experts, into, out = tensor.shape
    blocks = torch.randint(0, 256, (experts, out, into // 32, 16)).to(torch.uint8)
    scales = torch.randint(122, 126, (experts, out, into // 32)).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales, "": convert_moe_packed_tensors(blocks, scales)}


def quantized(folder: Path, out: Path, settings: dict[str, Any], stored: Stored) -> Path:
    """A copy of a folder in fewer bits. The folder itself gets what the copy's values are worth, in bfloat16."""
    shutil.copytree(folder, out)
    places: dict[str, str] = {}
    for path in sorted(out.glob("*.safetensors")):
        values, tensors = {}, {}
        for name, tensor in load_file(path).items():
            found = stored(name, tensor.float()) or {name: tensor.bfloat16(), "": tensor.bfloat16()}
            values[name] = found.pop("")
            tensors |= found
        save_file(tensors, path, metadata={"format": "pt"})
        save_file(values, folder / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    change_config(out, quantization_config=settings)
    return out


ENCODED: dict[str, tuple[str, dict[str, Any], dict[str, Any], Stored]] = {
    "fp8": ("llama", {}, FP8, fp8_of),
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}, {"quant_method": "mxfp4"}, mxfp4_of),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_such_a_base_is_the_model_of_its_values_and_gives_bfloat16_experts(
    kind: str, store: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    family, widths, settings, stored = ENCODED[kind]
    plain = save_tiny(tmp_path / "plain", family, max_shard_size="20KB", **widths)
    folder = quantized(plain, tmp_path / "encoded", settings, stored)
    base, dense = resolved(folder, store), resolved(plain, store)
    assert base.checkpoint.dtype is torch.bfloat16
    assert {name: info.shape for name, info in base.checkpoint.tensors.items()} == {
        name: info.shape for name, info in dense.checkpoint.tensors.items()
    }
    expected = logits_of(load_model(plain, torch.float32), IDS)
    assert torch.equal(logits_of(load_model(folder, torch.float32), IDS), expected)
    text = TextRun(
        RunningBase(replace(base, source="streamed", dtype=torch.float32)).model,
        base.family,
        base.layers,
        make_batches([IDS[0]], 99),
    )
    ((_, streamed),) = text.logits(text.batches[0], text.finish().hidden[0])
    assert (streamed - expected).abs().max() < 1e-5
    for cut in ({"heads_per_group": 1}, {}):  # cut, and as it is
        experts = [pruned(random_plan(each, 0, **cut), each, tmp_path / f"{each.folder.name}-{len(cut)}")
                   for each in (base, dense)]  # fmt: skip
        assert not read_json(experts[0] / "config.json").get("quantization_config")
        one, other = (Checkpoint(expert) for expert in experts)
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            assert one.read(name).dtype is torch.bfloat16
            assert torch.equal(one.read(name), other.read(name))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8", "weight_block_size": None}, "fp8")],
)
def test_other_quantized_bases_are_refused_with_what_is_read(
    settings: dict[str, object], named: str, tmp_path: Path, store: Path
) -> None:
    folder = save_tiny(tmp_path / "model")
    change_config(folder, quantization_config=settings)
    with pytest.raises(CheckpointError) as caught:
        resolve_base(Base(model=str(folder)), store)
    assert f"quantized ({named})" in str(caught.value)
    assert "FP8 in blocks (quant_method: fp8 with weight_block_size) and MXFP4 (quant_method: mxfp4)" in str(
        caught.value
    )
