"""Checkpoints in FP8 blocks and in MXFP4 are read as transformers dequantizes them, and experts of them are bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expertprune.errors import CheckpointError
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.encodings import BlockFp8, Mxfp4
from expertprune.models.loading import load_model
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
    monkeypatch.setattr("expertprune.models.encodings._PART", 64 * 7)  # seven rows at a time
    assert torch.equal(read(Mxfp4(), "w", stored), expected)


def quantized(folder: Path, out: Path) -> tuple[Path, dict[str, Tensor]]:
    """A copy of a folder with the matrices of its layers in FP8 blocks; and what they are worth, in bfloat16."""
    shutil.copytree(folder, out)
    values: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in list(tensors.items()):
            values[name] = tensor.bfloat16()
            tensors[name] = values[name]
            if tensor.ndim == 2 and "layers" in name:
                rows, columns = (-(-size // block) for size, block in zip(tensor.shape, (8, 16), strict=True))
                scales = torch.rand(rows, columns) / 4
                wide = scales.repeat_interleave(8, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
                tensors[name] = (tensor / wide).to(torch.float8_e4m3fn)
                values[name] = (tensors[name].float() * wide).bfloat16()
                tensors[name + "_scale_inv"] = scales
        save_file(tensors, path, metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    if index.is_file():
        places = {name: path.name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    change_config(out, quantization_config=FP8)
    return out, values


def test_an_fp8_base_is_the_model_of_its_values_and_gives_bfloat16_experts(store: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = save_tiny(tmp_path / "plain", max_shard_size="20KB")
    folder, values = quantized(plain, tmp_path / "fp8")
    for path in plain.glob("*.safetensors"):
        save_file({name: values[name] for name in load_file(path)}, path, metadata={"format": "pt"})
    base, dense = resolved(folder, store), resolved(plain, store)
    assert base.checkpoint.dtype is torch.bfloat16
    assert {name: info.shape for name, info in base.checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in values.items()
    }
    assert base.checkpoint.parameters == dense.checkpoint.parameters
    found = logits_of(load_model(folder, torch.float32), IDS)
    assert torch.equal(found, logits_of(load_model(plain, torch.float32), IDS))
    for widths in ({"ffn": 20}, {}):  # cut, and as it is
        experts = [pruned(random_plan(each, 0, **widths), each, tmp_path / f"{each.folder.name}-{len(widths)}")
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
