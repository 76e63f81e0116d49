"""Write safetensors files: tensor by tensor, with one at a time in memory, or whole."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expertprune.files import staged_file

# Dtypes by safetensors' names, in the order in which it ranks them.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


PAUSE = 30.0  # seconds between two savings of hidden states, or of their gradients: quick passes are not slowed down
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class TensorInfo:
    """The file of a tensor, its shape, and its dtype in the words of safetensors."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of `BF16`, `F8_E4M3` or `I64`; a BOOL is a byte
        return self.parameters * (int(bits.group()) if bits else 8) // 8


def absent_bytes(folder: Path, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of the tensors whose files are not in a folder."""
    present = {file: (folder / file).is_file() for file in {info.file for info in tensors.values()}}
    return sum(info.bytes for info in tensors.values() if not present[info.file])


class TensorFile:
    """A file that is being written. Its header comes last, into room that is kept for it."""

    def __init__(self, file: IO[bytes], room: int, metadata: Mapping[str, str] | None) -> None:
        self._file, self._room = file, room
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._end = 0
        file.write(b" " * (8 + room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor behind those that are there."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        self._header[name] = _entry(tensor.dtype, tuple(tensor.shape), self._end, len(data))
        self._end += len(data)

    def finish(self) -> None:
        header = _compact(self._header)
        if len(header) > self._room:
            raise ValueError(f"the header takes {len(header)} bytes, {self._room} were kept")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


@contextlib.contextmanager
def written_file(
    path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFile]:
    """A safetensors file that is whole when the block ends.

    Where exactly the expected tensors are added in the order of `in_order`, the bytes are those of
    `safetensors.torch.save_file`.

    Args:
        expected: tensors that are added in the block, by name. Each may turn out smaller, and some
            may not come.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in in_order({name: dtype for name, (dtype, _) in expected.items()}):
        dtype, shape = expected[name]
        size = dtype.itemsize * math.prod(shape)
        header[name] = _entry(dtype, shape, end, size)
        end += size
    room = len(_compact(header))
    with path.open("wb") as file:
        made = TensorFile(file, room + -room % 8, metadata)
        yield made
        made.finish()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of the store, whole or not at all.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    with staged_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def in_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Names in the order in which safetensors stores them: the widest dtypes first, so that all are aligned."""
    return sorted(dtypes, key=lambda name: (-_RANK[dtypes[name]], name))


def _entry(dtype: torch.dtype, shape: Sequence[int], start: int, size: int) -> dict[str, Any]:
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}


def _compact(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
