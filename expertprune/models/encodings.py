"""Checkpoints stored in fewer bits that can still be bases: how their tensors are read as bfloat16.

Two ways of storing are read: FP8 with one scale per block of a matrix (DeepSeek-V3), and MXFP4 (gpt-oss). A tensor
appears under the name and with the shape that it has in the unquantized model. Its scales do not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.models.tensorfile import TensorInfo

READ = "FP8 in blocks (quant_method: fp8 with weight_block_size) and MXFP4 (quant_method: mxfp4)"


_SCALE = "_scale_inv"


_BLOCKS, _SCALES = "_blocks", "_scales"


_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the eight positive codes of FP4 (E2M1)


_GROUP = 32  # values that share an exponent in MXFP4


_AT_ONCE = 2**24  # values decoded at once


Get = Callable[[str], Tensor]


class Encoding(Protocol):
    """How tensors are stored."""

    def decoded(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors of the unquantized model; raises `CheckpointError` where scales are not those of their values."""

    def parts(self, name: str, stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        """What is stored of a tensor of the unquantized model."""

    def read(self, name: str, stored: Mapping[str, TensorInfo], get: Get) -> Tensor:
        """A tensor of the unquantized model; `get` reads one as it is stored."""


def encoding_of(config: Mapping[str, Any]) -> Encoding | None:
    """The encoding that a config names, if it is one that is read."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    block = settings.get("weight_block_size")
    sizes = [size for size in block if isinstance(size, int) and size > 0] if isinstance(block, list) else []
    if settings.get("quant_method") == "fp8" and len(sizes) == 2 and sizes == block:
        return BlockFp8(*sizes)
    return Mxfp4() if settings.get("quant_method") == "mxfp4" else None


@dataclass(frozen=True)
class BlockFp8:
    """Matrices in FP8, each with a matrix of scales: `value = stored × scale of its block` of `rows × columns` values.

    The last blocks of an axis may be smaller. The scales of `name` are `name_scale_inv`.
    """

    rows: int
    columns: int

    def decoded(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        scaled = {name for name in stored if name + _SCALE in stored}
        for name in sorted(scaled):
            _check_axes(name, stored, 2)
            *matrices, height, width = stored[name].shape
            wanted = (*matrices, -(-height // self.rows), -(-width // self.columns))
            _check_shape(name + _SCALE, stored, wanted, "its matrix and weight_block_size in config.json")
        return {
            name: replace(info, dtype="BF16") if name in scaled else info
            for name, info in stored.items()
            if name.removesuffix(_SCALE) not in scaled or name in scaled
        }

    def parts(self, name: str, stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        return (name, name + _SCALE) if name + _SCALE in stored else (name,)

    def read(self, name: str, stored: Mapping[str, TensorInfo], get: Get) -> Tensor:
        if name + _SCALE not in stored:
            return get(name)
        values, scales = get(name), _real(get(name + _SCALE))
        height, width = values.shape[-2:]
        wide = scales.repeat_interleave(self.columns, -1)[..., :width]
        result = torch.empty(values.shape, dtype=torch.bfloat16)
        for block in range(scales.shape[-2]):
            rows = slice(block * self.rows, min((block + 1) * self.rows, height))
            result[..., rows, :] = values[..., rows, :].float() * wide[..., block : block + 1, :]
        return result


def _check_axes(name: str, stored: Mapping[str, TensorInfo], least: int) -> None:
    """Raises `CheckpointError` where a tensor that has scales is no matrix in blocks."""
    if len(shape := stored[name].shape) < least:
        raise CheckpointError(
            f"{stored[name].file}: {name} has scales, and is {list(shape)}, where {least} axes or more are needed; "
            "fetch or copy the model again"
        )


def _check_shape(name: str, stored: Mapping[str, TensorInfo], wanted: tuple[int, ...], makers: str) -> None:
    """Raises `CheckpointError` where scales do not go with their values; `makers` are what says their shape."""
    if (found := stored[name].shape) != wanted:
        raise CheckpointError(
            f"{stored[name].file}: {name} is {list(found)}, and {makers} make it {list(wanted)}; "
            "fetch or copy the model again"
        )


def _real(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents, `2 ** (byte - 127)`."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


@dataclass(frozen=True)
class Mxfp4:
    """Matrices of routed experts in FP4 (E2M1), two values a byte, the lower half first; 32 values share an exponent.

    `name_blocks` is `[experts, output, groups, 16]`, `name_scales` `[experts, output, groups]`, and the tensor
    `[experts, input, output]`: `value = code × 2 ** (scale - 127)`.
    """

    def decoded(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for name, info in stored.items():
            whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            if whole + _BLOCKS not in stored or whole + _SCALES not in stored:
                found[name] = info
            elif name.endswith(_BLOCKS):
                _check_axes(name, stored, 3)
                _check_shape(name, stored, (*stored[whole + _SCALES].shape, _GROUP // 2), "its scales")
                *experts, output, groups, _ = info.shape
                found[whole] = TensorInfo(info.file, (*experts, groups * _GROUP, output), "BF16")
        return found

    def parts(self, name: str, stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        return (name,) if name in stored else (name + _BLOCKS, name + _SCALES)

    def read(self, name: str, stored: Mapping[str, TensorInfo], get: Get) -> Tensor:
        if name in stored:
            return get(name)
        blocks, scales = get(name + _BLOCKS), get(name + _SCALES)
        *experts, output, groups, size = blocks.shape
        codes = blocks.reshape(-1, output, groups, size)
        exponents = scales.reshape(-1, output, groups, 1).to(torch.int32) - 127
        table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
        result = torch.empty(len(codes), groups * _GROUP, output, dtype=torch.bfloat16)
        step = max(1, _AT_ONCE // (groups * _GROUP))
        for expert, start in ((e, s) for e in range(len(codes)) for s in range(0, output, step)):
            rows = slice(start, min(start + step, output))
            part = codes[expert, rows]
            pairs = torch.stack([table[(part & 15).int()], table[(part >> 4).int()]], dim=-1)
            values = pairs.reshape(*part.shape[:2], 2 * size)
            result[expert, :, rows] = torch.ldexp(values, exponents[expert, rows]).reshape(-1, groups * _GROUP).T
        return result.reshape(*experts, groups * _GROUP, output)
