"""Read what a report is made of from an expert's folder and the store; no model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from expertprune.artifacts.changes import Changes
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.artifacts.timing import Timing
from expertprune.composition.scoring import needed_part
from expertprune.errors import CheckpointError
from expertprune.files import THROUGHPUT_FILE, store_folder
from expertprune.models.checkpoint import Checkpoint
from expertprune.reporting.page.reasons import decided

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifacts:
    """What a report is made of.

    `changes` are the largest of the evaluation, with their texts. `profiles` holds those of the
    plan's corpora that the store still has, with the pass that the plan was made from, and `absent`
    the names of the other corpora. `bytes` is the size of the weights' files.
    """

    expert: Expert
    bytes: int
    timing: Timing | None
    changes: Changes | None
    profiles: dict[str, Profile]
    absent: list[str]
    store: Path


def read_artifacts(folder: Path, store: str | Path | None = None) -> Artifacts:
    """Everything that a report needs of an expert's folder and the store; no model is loaded.

    Raises:
        CheckpointError: the folder is no expert, is half-written, or holds a damaged file.
        PlanError: its plan is damaged.
    """
    expert = Expert.load(folder)
    place, plan = store_folder(store), expert.plan
    # A plan that chose no unit inside a layer was made without the criterion's own pass.
    part = needed_part(expert.spec.relevance) if decided(plan) else None
    profiles = {name: _stored(place / "profiles" / f"{digest}.safetensors", plan, part)
                for name, digest in plan.profiles.items()}  # fmt: skip
    there = {name: found for name, found in profiles.items() if found is not None}
    absent = [name for name, found in profiles.items() if found is None]
    return Artifacts(
        expert=expert,
        bytes=Checkpoint(folder).weight_bytes,
        timing=Timing.read(folder / THROUGHPUT_FILE),
        changes=Changes.read(folder),
        profiles=there,
        absent=absent,
        store=place,
    )


def _stored(path: Path, plan: Plan, part: ProfilePart | None) -> Profile | None:
    """A profile of the plan's base with this part too, if it can be read."""
    if not path.is_file() or (part is not None and not part.path(path).is_file()):
        return None
    try:
        found = Profile(path)
        return found if found.layers == plan.shapes else None
    except (CheckpointError, KeyError, TypeError) as error:
        log.warning("%s is left out: %s", path, error)
        return None
