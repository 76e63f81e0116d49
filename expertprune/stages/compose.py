"""Decide which units of a base are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.artifacts.plan import Plan
from expertprune.composition.plan import compose as compose_profiles
from expertprune.engine.team import team
from expertprune.progress import Track, silent
from expertprune.stages.floor import plan_by_retention
from expertprune.stages.profile import profiles_of
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
    """The plan of a prepared spec, whatever way its budget is given.

    Args:
        run: whether profiles, or passes of them, that are missing may be made first.

    Raises:
        SpecError: a profile is missing and must not be made.
        PlanError: the budget is not reachable.
    """
    profiles = profiles_of(prepared, track, run)
    if prepared.spec.budget.retention is not None:
        return plan_by_retention(prepared, profiles, track)
    return team().lead(lambda: compose_profiles(prepared.spec, prepared.base, profiles))
