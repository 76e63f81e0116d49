"""Decide which units of a base are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.artifacts.plan import Plan
from expertprune.progress import Track, silent
from expertprune.stages.decide import decide
from expertprune.stages.floor import decide_by_retention
from expertprune.stages.validate import Prepared, SpecLike, validate


def compose(
    spec: SpecLike,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    run: bool = True,
) -> Plan:
    """Decide which units are kept.

    Args:
        run: whether profiles, or passes of them, that are missing may be made first.
    """
    return plan_of(validate(spec, overrides, store), track, run)


def plan_of(prepared: Prepared, track: Track, run: bool = True) -> Plan:
    """The plan of a prepared spec, whatever way its budget is given."""
    return (decide if prepared.spec.budget.retention is None else decide_by_retention)(prepared, track, run)
