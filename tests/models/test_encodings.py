"""Checkpoints in FP8 blocks and in MXFP4 are read as transformers dequantizes them, and experts of them are bfloat16."""

from __future__ import annotations

import functools
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
from expertprune.models.checkpoint import SINGLE, Checkpoint
from expertprune.models.encodings import BlockFp8
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.running import RunningBase, stream_folder
from expertprune.models.tensorfile import TensorInfo
from expertprune.serving.engine import check_folder
from expertprune.serving.throughput import bytes_per_token
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


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each kind, not to be changed."""

    @functools.cache
    def made(kind: str) -> Path:
        torch.manual_seed(0)
        family, widths, settings, stored = ENCODED[kind]
        place = tmp_path_factory.mktemp(kind)
        plain = save_tiny(place / "plain", family, max_shard_size="20KB", **widths)
        return quantized(plain, place / "encoded", settings, stored)

    return made


@pytest.mark.slow
def test_a_quantized_expert_is_evaluated_as_its_weights_are_worth(tmp_path: Path, store: Path) -> None:
    """Of W4A16, whose tensors are packed; layers run one by one, as `evaluate` runs them."""
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    plain = save_tiny(tmp_path / "plain")
    folder, packed = Path(shutil.copytree(plain, tmp_path / "packed")), {}
    tensors = load_file(plain / SINGLE)
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 7
        steps = (tensors.pop(name) / scale).round().to(torch.int8)
        shape = torch.tensor(steps.shape)
        packed |= {
            f"{name}_packed": pack(steps, 4),
            f"{name}_scale": scale,
            f"{name}_shape": shape,
            name: steps * scale,
        }
    stored = {name: tensor for name, tensor in packed.items() if not name.endswith("weight")}
    save_file(tensors | stored, folder / SINGLE, metadata={"format": "pt"})
    values = {name: tensor for name, tensor in packed.items() if name.endswith("weight")}
    save_file(tensors | values, plain / SINGLE, metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "observer": "minmax"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    change_config(folder, quantization_config={**settings, "ignore": ["lm_head"], "config_groups": groups})
    base = replace(resolved(plain, store), dtype=torch.float32)
    text = TextRun(stream_folder(folder, base), base.family, base.layers, make_batches(IDS.tolist(), 99))
    ((_, found),) = text.logits(text.batches[0], text.finish().hidden[0])
    assert (found - logits_of(load_model(plain, torch.float32), IDS)).abs().max() < 1e-5


def rows(tensor: Tensor) -> Tensor:
    return tensor[..., :-1, :]


def columns(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        (
            "fp8",
            ("_scale_inv", rows),
            r"weight_scale_inv is \[\d, \d\], and its matrix and weight_block_size in config",
        ),
        ("fp8", ("_scale_inv", columns), "weight_scale_inv is "),
        ("fp8", [8, 8], "weight_scale_inv is "),
        ("mxfp4", ("_scales", rows), r"_proj_blocks is \[6, 64, \d, 16\], and its scales make it \[6, 63, \d, 16\]"),
        ("mxfp4", ("_scales", columns), "_proj_blocks is "),
        ("mxfp4", ("_blocks", columns), "_proj_blocks is "),
        ("fp8", ("_proj.weight", torch.flatten), r"_proj\.weight has scales, and is \[\d+\]"),
        ("mxfp4", ("_blocks", torch.flatten), "_proj_blocks has scales, and is "),
    ],
)
def test_scales_that_do_not_go_with_their_values_are_refused(
    kind: str, changed: Any, words: str, encoded: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoded(kind), tmp_path / "less"))
    if isinstance(changed, list):
        change_config(folder, quantization_config={**FP8, "weight_block_size": changed})
    else:
        ending, less = changed
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path).items()
            save_file(
                {name: less(each).contiguous() if name.endswith(ending) else each for name, each in tensors}, path
            )
    with pytest.raises(CheckpointError, match=rf"{folder}: model-.*safetensors: model\.layers\..*{words}"):
        Checkpoint(folder)


def test_what_an_encoded_folder_takes_is_counted_as_stored(encoded: Callable[[str], Path]) -> None:
    for kind in ENCODED:
        folder = encoded(kind)
        sizes = {name: each.nbytes for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
        assert check_folder(folder).weight_bytes == sum(sizes.values())
        assert bytes_per_token(Checkpoint(folder)) == sum(sizes.values()) - sizes["model.embed_tokens.weight"]
