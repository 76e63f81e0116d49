"""What a report is made of, read from an expert's folder and the store; no model is loaded."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.composition.scoring import needed_part
from expertprune.errors import CheckpointError
from expertprune.files import store_folder
from expertprune.models.checkpoint import Checkpoint
from expertprune.serving.throughput import THROUGHPUT_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifacts:
    """What a report is made of, as it lies on the disk.

    `profiles` holds those of the plan's corpora that the store still has, with the pass that the criterion needs, and
    `absent` the names of the other corpora. `bytes` is the size of the weights' files.
    """

    expert: Expert
    bytes: int
    throughput: dict[str, Any] | None
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
    place, plan, part = store_folder(store), expert.plan, needed_part(expert.spec.relevance)
    profiles = {name: _stored(place / "profiles" / f"{digest}.safetensors", plan, part)
                for name, digest in plan.profiles.items()}  # fmt: skip
    there = {name: found for name, found in profiles.items() if found is not None}
    absent = [name for name, found in profiles.items() if found is None]
    return Artifacts(expert, Checkpoint(folder).weight_bytes, _throughput(folder), there, absent, place)


def _stored(path: Path, plan: Plan, part: ProfilePart | None) -> Profile | None:
    """A profile of the plan's base with the pass that the criterion needs, if the store has it and can read it."""
    if not path.is_file() or (part is not None and not part.path(path).is_file()):
        return None
    try:
        found = Profile(path)
        return found if found.layers == plan.shapes else None
    except (CheckpointError, KeyError, TypeError) as error:
        log.warning("%s is left out: %s", path, error)
        return None


def _throughput(folder: Path) -> dict[str, Any] | None:
    path = folder / THROUGHPUT_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it and measure again") from None
    if not isinstance(data, dict) or data.get("kind") != "throughput":
        raise CheckpointError(f"{path}: is no measurement of throughput; delete it and measure again")
    return data


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """What is wrong with a throughput document that lacks something or holds something else."""
    path = folder / THROUGHPUT_FILE
    return CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}; delete it and measure again")
