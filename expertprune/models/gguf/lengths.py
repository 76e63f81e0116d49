"""Check the counts and lengths that a GGUF file states against its own length, before anybody reads them.

Readers trust these numbers: an array of 2**60 values makes them loop until memory is gone. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from expertprune.errors import CheckpointError
from expertprune.files import opened

_HEAD = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of keys
_LEAST_KEY, _LEAST_TENSOR = 13, 24  # bytes that one takes
_DIMENSIONS = 4
# Bytes of a value by the number of its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_lengths(file: Path) -> None:
    """Raises `CheckpointError` if a GGUF file is shorter than its header says, or has arrays of arrays."""
    with opened(file) as content:
        size = file.stat().st_size
        if size < _HEAD.size:
            raise CheckpointError(f"{file}: no whole GGUF file: it has {size} bytes")
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(file, data)
            walk.metadata()


class _Walk:
    """A place in a file's header."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0

    def metadata(self) -> None:
        """Pass over all keys and the descriptions of all tensors."""
        magic, _, tensors, keys = _HEAD.unpack_from(self.data)
        self.at = _HEAD.size
        if magic != b"GGUF":
            raise CheckpointError(f"{self.file}: no GGUF file: it does not begin with GGUF")
        self._need(keys, _LEAST_KEY)
        self._need(tensors, _LEAST_TENSOR)
        for _ in range(keys):
            self._skip(self._number("<Q"), 1)
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._skip(self._number("<Q"), 1)
            dimensions = self._number("<I")
            if dimensions > _DIMENSIONS:
                raise CheckpointError(
                    f"{self.file}: a tensor has {dimensions} dimensions; the format has {_DIMENSIONS}"
                )
            self._skip(dimensions, 8)
            self._skip(1, 12)  # type and offset

    def _value(self, kind: int) -> None:
        if kind in _SIZES:
            self._skip(1, _SIZES[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"), 1)
        elif kind == _ARRAY:
            self._array(self._number("<I"), self._number("<Q"))
        else:
            raise CheckpointError(
                f"{self.file}: a value of its metadata is of type {kind}, which the format does not have"
            )

    def _array(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            self._skip(count, _SIZES[kind])
        elif kind == _STRING:
            self._need(count, 8)
            for _ in range(count):
                self._skip(self._number("<Q"), 1)
        else:
            raise CheckpointError(f"{self.file}: its metadata has an array of values of type {kind}")

    def _number(self, form: str) -> int:
        at = self.at
        self._skip(1, struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, at)[0])

    def _skip(self, count: int, size: int) -> None:
        self._need(count, size)
        self.at += count * size

    def _need(self, count: int, size: int) -> None:
        if count * size > len(self.data) - self.at:
            raise CheckpointError(f"{self.file}: no whole GGUF file: it is shorter than its header says")
