"""Explain in a plan why units are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from expertprune.artifacts.plan import KindCount, UnitReasons
from expertprune.composition.scoring import Fused, UnitKind


def reasons(kept: Sequence[int], fused: Fused, dimensions: Sequence[str]) -> UnitReasons:
    """The largest score that was dropped, and who and which kinds protected the units that are kept."""
    mask = torch.zeros(fused.score.numel(), dtype=torch.bool)
    mask[torch.tensor(kept)] = True
    names = [*dimensions, "general"]
    counts = Counter(names[index] for index in fused.source[mask].tolist())
    return UnitReasons(
        threshold=float(fused.score[~mask].max()) if not bool(mask.all()) else None,
        protected={name: counts[name] for name in names if name != "general" or fused.kind is not None},
        **_kinds(fused.kind, mask),
    )


def _kinds(kind: Tensor | None, kept: Tensor) -> dict[str, KindCount]:
    if kind is None:
        return {}
    names = {
        "shared": UnitKind.SHARED,
        "expert_exclusive": UnitKind.EXPERT,
        "general_exclusive": UnitKind.GENERAL,
    }
    return {
        name: KindCount(units=int((kind == each).sum()), kept=int(((kind == each) & kept).sum()))
        for name, each in names.items()
    }
