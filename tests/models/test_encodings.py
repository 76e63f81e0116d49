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
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.encodings import BlockFp8
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.running import RunningBase
from expertprune.models.tensorfile import TensorInfo
from tests.oracle import change_config, logits_of, pruned, random_plan, read_json, resolved
from tests.tiny import save_tiny

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}
IDS = torch.arange(3, 19)[None]


def test_fp8_blocks_of_several_matrices_with_exponents_are_read_as_transformers_reads_them() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 24, 64).to(torch.float8_e4m3fn)
    scales = torch.randint(120, 130, (3, 3, 4)).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    stored = {"w": TensorInfo("file", (3, 24, 64), "F8_E4M3"), "w_scale_inv": TensorInfo("file", (3, 3, 4), "U8")}
    encoding = BlockFp8(8, 16)
    assert encoding.decoded(stored) == {"w": TensorInfo("file", (3, 24, 64), "BF16")}
    assert torch.equal(encoding.read("w", stored, {"w": weight, "w_scale_inv": scales}.__getitem__), expected)


Stored = Callable[[str, Tensor], dict[str, Tensor] | None]


def fp8_of(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """Matrices of layers in FP8 blocks, the last of which are smaller, as DeepSeek-V3 stores them."""
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
        values: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            found = stored(name, tensor.float()) or {name: tensor.bfloat16(), "": tensor.bfloat16()}
            values[name] = found.pop("")
            tensors |= found
        save_file(tensors, path, metadata={"format": "pt"})
        save_file(values, folder / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    change_config(out, quantization_config=settings)
    return out


ENCODED: dict[str, tuple[str, dict[str, Any], dict[str, Any], Stored]] = {
    "fp8": ("llama", {"hidden_size": 36, "head_dim": 6}, FP8, fp8_of),
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}, {"quant_method": "mxfp4"}, mxfp4_of),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_such_a_base_is_the_model_of_its_values_and_gives_bfloat16_experts(
    kind: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("expertprune.models.encodings._AT_ONCE", 64 * 7)  # seven rows of MXFP4
    family, widths, settings, stored = ENCODED[kind]
    plain = save_tiny(tmp_path / "plain", family, max_shard_size="20KB", **widths)
    folder = quantized(plain, tmp_path / "encoded", settings, stored)
    base, dense = resolved(folder, store), resolved(plain, store)
    assert base.checkpoint.dtype is torch.bfloat16
    shapes = [{name: info.shape for name, info in each.checkpoint.tensors.items()} for each in (base, dense)]
    assert shapes[0] == shapes[1]
    expected = logits_of(load_model(plain, torch.float32), IDS)
    assert torch.equal(logits_of(load_model(folder, torch.float32), IDS), expected)
    streamed = RunningBase(replace(base, source="streamed", dtype=torch.float32)).model
    text = TextRun(streamed, base.family, base.layers, make_batches(IDS.tolist(), 99))
    ((_, found),) = text.logits(text.batches[0], text.finish().hidden[0])
    assert (found - expected).abs().max() < 1e-5
    for cut in ({"heads_per_group": 1}, {}):  # cut, and as it is
        experts = [pruned(random_plan(each, 0, **cut), each, tmp_path / f"{each.folder.name}-{len(cut)}")
                   for each in (base, dense)]  # fmt: skip
        assert not read_json(experts[0] / "config.json").get("quantization_config")
        one, other = (Checkpoint(expert) for expert in experts)
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            assert one.read(name).dtype is torch.bfloat16
            assert torch.equal(one.read(name), other.read(name))
