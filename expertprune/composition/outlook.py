"""What experts of several sizes will keep, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expertprune.composition.excess import Foreseen

BROKEN = 0.8  # of its bits per byte: a base that keeps less of a corpus no longer bears the cut


@dataclass(frozen=True)
class ForeseenSize:
    """A foreseen expert.

    Attributes:
        removed: the fraction that was asked for, of all parameters or of each structure.
        parameters: that stay.
        fraction: of the base's parameters.
        speed: the base's parameters over the expert's, without an embedding of which a token reads one
            row: how many times as fast an expert decodes at most, where reading weights is all that
            takes time.
        corpora: what is kept of each.
        instead: what the other allocation would keep at this size, which is foreseen for one size; empty where there
            is none.
    """

    removed: float
    parameters: int
    fraction: float
    speed: float
    corpora: Mapping[str, Foreseen]
    instead: Mapping[str, Foreseen]


@dataclass(frozen=True)
class Outlook:
    """What experts of several sizes will keep.

    Attributes:
        allocation: global or uniform, as the spec says or as `serve_with` decides.
        sizes: those that can be reached, smallest cut first.
        unreachable: why others cannot, by size.
        times_lost: how many times what profiles alone foresee each corpus loses, as an expert that was built says;
            empty where none was named.
        breaks: the smallest size at which a corpus keeps less than `BROKEN`, by corpus; `None` where none does.
        warnings: what the forecast does not see.
    """

    name: str
    base: str
    parameters: int
    allocation: str
    sizes: Sequence[ForeseenSize]
    unreachable: Mapping[float, str]
    times_lost: Mapping[str, float]
    breaks: Mapping[str, float | None]
    warnings: Sequence[str]

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "forecast", **asdict(self)}
