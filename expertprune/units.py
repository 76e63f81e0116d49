"""The nouns of structured pruning: what a unit is, how wide a layer is, which units of a layer are kept."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
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
    """What one stretch of a tensor's axis is made of; an axis is a concatenation of segments."""

    FFN = "ffn"
    QUERY = "query"
    KEY_VALUE = "key_value"
    EXPERT = "expert"


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer, in units.

    Query head `h` reads KV head `h // heads_per_group`; a KV group is one KV head and its query heads. A layer that routes
    tokens to `experts` has no FFN neurons of its own (`ffn` is 0).
    """

    hidden: int
    ffn: int
    query_heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0

    @property
    def heads_per_group(self) -> int:
        return self.query_heads // self.kv_heads

    def units(self, structure: Structure) -> int:
        """How many units of a structure the layer has."""
        return {
            Structure.FFN: self.ffn,
            Structure.QUERY_HEADS: self.query_heads,
            Structure.KV_GROUPS: self.kv_heads,
            Structure.EXPERTS: self.experts,
        }[structure]

    def segment_rows(self, segment: Segment) -> int:
        """Length of a segment along its tensor axis."""
        return {
            Segment.FFN: self.ffn,
            Segment.QUERY: self.query_heads * self.head_dim,
            Segment.KEY_VALUE: self.kv_heads * self.head_dim,
            Segment.EXPERT: self.experts,
        }[segment]

    @property
    def all_kept(self) -> KeptUnits:
        return KeptUnits(
            ffn=tuple(range(self.ffn)),
            query_heads=tuple(range(self.query_heads)),
            kv_groups=tuple(range(self.kv_heads)),
            experts=tuple(range(self.experts)),
        )


@dataclass(frozen=True)
class KeptUnits:
    """Indices, in the base's numbering and ascending, of the units that one layer keeps.

    `query_heads` lists only heads of kept groups, the same number in each.
    """

    ffn: tuple[int, ...]
    query_heads: tuple[int, ...]
    kv_groups: tuple[int, ...]
    experts: tuple[int, ...] = ()

    def of(self, structure: Structure) -> tuple[int, ...]:
        return {
            Structure.FFN: self.ffn,
            Structure.QUERY_HEADS: self.query_heads,
            Structure.KV_GROUPS: self.kv_groups,
            Structure.EXPERTS: self.experts,
        }[structure]

    def shape(self, base: LayerShape) -> LayerShape:
        """The layer's shape once the other units are gone."""
        return LayerShape(
            base.hidden, len(self.ffn), len(self.query_heads), len(self.kv_groups), base.head_dim, len(self.experts)
        )

    def rows(self, segment: Segment, base: LayerShape) -> Tensor:
        """Positions inside a segment that stay, `[kept rows]`, int64."""
        if segment in (Segment.FFN, Segment.EXPERT):
            return torch.tensor(self.ffn if segment is Segment.FFN else self.experts, dtype=torch.int64)
        heads = self.query_heads if segment is Segment.QUERY else self.kv_groups
        first = torch.tensor(heads, dtype=torch.int64) * base.head_dim
        return (first[:, None] + torch.arange(base.head_dim)).reshape(-1)


def format_indices(indices: tuple[int, ...]) -> str:
    """Ascending indices as readable runs: `(0, 1, 2, 5)` becomes `"0-2 5"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_indices(text: str) -> tuple[int, ...]:
    """The inverse of `format_indices`; raises `ValueError` if the text is not ascending runs."""
    indices: list[int] = []
    for run in text.split():
        first, dash, last = run.partition("-")
        inside = range(int(first), int(last if dash else first) + 1)
        if not inside:
            raise ValueError(f"indices are not ascending: {run!r}")
        indices.extend(inside)
    if any(b <= a for a, b in itertools.pairwise(indices)):
        raise ValueError(f"indices are not ascending: {text[:60]!r}")
    return tuple(indices)
