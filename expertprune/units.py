"""Prunable units, the widths of a layer in units, and the units that a layer keeps."""

from __future__ import annotations

import base64
import binascii
import itertools
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor


class Structure(StrEnum):
    """A kind of unit that can be cut."""

    FFN = "ffn"
    QUERY_HEADS = "query_heads"
    KV_GROUPS = "kv_groups"
    EXPERTS = "experts"


DENSE = (Structure.FFN, Structure.QUERY_HEADS, Structure.KV_GROUPS)


class Segment(StrEnum):
    """What one stretch of a tensor's axis belongs to. An axis is a concatenation of segments.

    `QUERY` has `head_dim` positions for each query head, `QUERY_HEAD` has one.
    """

    FFN = "ffn"
    QUERY = "query"
    QUERY_HEAD = "query_head"
    KEY_VALUE = "key_value"
    EXPERT = "expert"


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer, in units.

    Query head `h` reads KV head `h // heads_per_group`. A KV group is one KV head and its query
    heads. `experts` counts routed experts, 0 in a dense layer. With routed experts, `ffn` is the
    width of each one, and neuron `j` of routed expert `e` is the layer's unit `e * ffn + j`. They
    lie in `expert_groups` runs of the same length, each of which keeps as many.

    A width is 0 where the family says that nothing of it can be cut: of an attention that stays
    whole, and of an FFN between layers of routed experts.
    """

    hidden: int
    ffn: int
    query_heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    expert_groups: int = 1

    @property
    def heads_per_group(self) -> int:
        return self.query_heads // max(1, self.kv_heads)

    @property
    def experts_per_group(self) -> int:
        return self.experts // self.expert_groups

    @property
    def neurons(self) -> int:
        """FFN neurons of the layer; with routed experts, of all of them together."""
        return self.ffn * max(1, self.experts)

    def units(self, structure: Structure) -> int:
        """The number of units of a structure."""
        return {
            Structure.FFN: self.neurons,
            Structure.QUERY_HEADS: self.query_heads,
            Structure.KV_GROUPS: self.kv_heads,
            Structure.EXPERTS: self.experts,
        }[structure]

    def segment_rows(self, segment: Segment) -> int:
        """Length of a segment along its axis; `FFN` of one routed expert, where there are any."""
        return {
            Segment.FFN: self.ffn,
            Segment.QUERY: self.query_heads * self.head_dim,
            Segment.QUERY_HEAD: self.query_heads,
            Segment.KEY_VALUE: self.kv_heads * self.head_dim,
            Segment.EXPERT: self.experts,
        }[segment]

    def indivisible(self, gpus: int) -> list[str]:
        """What vLLM cannot share among so many GPUs, in words; KV heads may be fewer than GPUs."""
        found = []
        if self.ffn % gpus:
            found.append(f"{self.ffn} FFN neurons")
        if self.query_heads % gpus:
            found.append(f"{self.query_heads} query heads")
        if self.kv_heads % gpus and gpus % self.kv_heads:
            found.append(f"{self.kv_heads} KV heads")
        return found

    @property
    def all_kept(self) -> KeptUnits:
        return KeptUnits(
            ffn=tuple(range(self.neurons)),
            query_heads=tuple(range(self.query_heads)),
            kv_groups=tuple(range(self.kv_heads)),
            experts=tuple(range(self.experts)),
        )


@dataclass(frozen=True)
class KeptUnits:
    """Indices of the units that one layer keeps, ascending, in the base's numbering.

    `query_heads` lists heads of kept groups only, the same number in each group. With routed
    experts, `ffn` lists neurons of kept ones only, the same number in each. Where the whole layer
    goes, it is `gone` and keeps nothing.
    """

    ffn: tuple[int, ...]
    query_heads: tuple[int, ...]
    kv_groups: tuple[int, ...]
    experts: tuple[int, ...] = ()
    gone: bool = False

    def of(self, structure: Structure) -> tuple[int, ...]:
        return {
            Structure.FFN: self.ffn,
            Structure.QUERY_HEADS: self.query_heads,
            Structure.KV_GROUPS: self.kv_groups,
            Structure.EXPERTS: self.experts,
        }[structure]

    def shape(self, base: LayerShape) -> LayerShape:
        """The layer's shape once the other units are gone."""
        ffn = len(self.ffn) // max(1, len(self.experts))
        return replace(
            base,
            ffn=ffn,
            query_heads=len(self.query_heads),
            kv_heads=len(self.kv_groups),
            experts=len(self.experts),
        )

    def neurons_of(self, expert: int, base: LayerShape) -> tuple[int, ...]:
        """Neurons that one routed expert keeps, in its own numbering."""
        first = expert * base.ffn
        here = slice(bisect_left(self.ffn, first), bisect_left(self.ffn, first + base.ffn))  # they ascend
        return tuple(unit - first for unit in self.ffn[here])

    def rows(self, segment: Segment, base: LayerShape) -> Tensor:
        """Positions inside a segment that stay, `[kept rows]`, int64.

        For neurons of routed experts see `neurons_of`.
        """
        if segment in (Segment.FFN, Segment.EXPERT):
            return torch.tensor(self.ffn if segment is Segment.FFN else self.experts, dtype=torch.int64)
        heads = self.kv_groups if segment is Segment.KEY_VALUE else self.query_heads
        if segment is Segment.QUERY_HEAD:
            return torch.tensor(heads, dtype=torch.int64)
        first = torch.tensor(heads, dtype=torch.int64) * base.head_dim
        return (first[:, None] + torch.arange(base.head_dim)).reshape(-1)


# Of a layer that goes whole: the residual stream passes its place unchanged.
GONE = KeptUnits((), (), (), gone=True)


def new_positions(kept: Sequence[KeptUnits]) -> dict[int, int]:
    """From the position of each layer that stays in the base to its position in the expert, ascending."""
    staying = [layer for layer, units in enumerate(kept) if not units.gone]
    return {layer: position for position, layer in enumerate(staying)}


# The number of written rows is a multiple, so that products over the vocabulary stay aligned.
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class KeptRows:
    """Vocabulary rows that stay, in the base's numbering.

    Attributes:
        of: the number of rows of the base.
        kept: the rows whose tokens stay, ascending. A row's position here is its token's new id.
        padding: rows of the base behind them, without a token, up to a multiple of `ROW_MULTIPLE`.
    """

    of: int
    kept: tuple[int, ...]
    padding: tuple[int, ...] = ()

    @property
    def index(self) -> tuple[int, ...]:
        """The base row of each row that is written."""
        return self.kept + self.padding

    @property
    def rows(self) -> int:
        return len(self.kept) + len(self.padding)


def pack_indices(indices: tuple[int, ...], of: int) -> str:
    """Ascending indices below `of` as a compressed bitmap in base64: tens of kilobytes, where runs
    take a megabyte.

    Bit `i % 8` of byte `i // 8`, counted from the least, says whether `i` is there. zlib compresses
    the bytes.
    """
    bitmap = bytearray(-(-of // 8))
    for index in indices:
        bitmap[index // 8] |= 1 << index % 8
    return base64.b64encode(zlib.compress(bytes(bitmap), 9)).decode()


def unpack_indices(text: str, of: int) -> tuple[int, ...]:
    """The inverse of `pack_indices`; raises `ValueError` if the text is no such bitmap."""
    try:
        bitmap = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), -(-of // 8) + 1)
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"not a bitmap: {error}") from None
    if len(bitmap) != -(-of // 8):
        raise ValueError(f"a bitmap of {len(bitmap)} bytes, not of {of} bits")
    indices = tuple(8 * place + bit for place, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1)
    if indices and indices[-1] >= of:
        raise ValueError(f"index {indices[-1]} is not below {of}")
    return indices


def format_indices(indices: tuple[int, ...]) -> str:
    """Ascending indices as readable runs: `(0, 1, 2, 5)` becomes `"0-2 5"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_indices(text: str, of: int) -> tuple[int, ...]:
    """The inverse of `format_indices`; raises `ValueError` if the text is not ascending runs below `of`."""
    indices: list[int] = []
    for run in text.split():
        first, dash, last = run.partition("-")
        inside = range(int(first), int(last if dash else first) + 1)
        if inside and inside[-1] >= of:  # before the run is written out
            raise ValueError(f"{run!r}: there are only {of}")
        if not inside:
            raise ValueError(f"indices are not ascending: {run!r}")
        indices.extend(inside)
    if any(b <= a for a, b in itertools.pairwise(indices)):
        raise ValueError(f"indices are not ascending: {text[:60]!r}")
    return tuple(indices)
