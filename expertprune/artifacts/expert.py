"""An expert on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.errors import CheckpointError, ExpertpruneError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.spec.schema import Base

EXPERT_FILE = "expertprune.json"


def load_expert(folder: Path) -> dict[str, Any]:
    """The contents of an expert's `expertprune.json`. Raises `CheckpointError` if the folder is no expert."""
    path = folder / EXPERT_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no expert (it has no {EXPERT_FILE})") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(about, dict) or about.get("kind") != "expert":
        raise CheckpointError(f"{path}: is not an expert's description")
    needed = ("name", "base", "parameters", "corpora", "versions", "spec", "plan")
    if lacking := [key for key in needed if not about.get(key)]:
        raise CheckpointError(f"{path}: damaged: it lacks {', '.join(lacking)}")
    return about


def earlier_expert(folder: Path) -> dict[str, Any]:
    """Where a base is an expert itself: its description, without what was measured, under the key `expert`."""
    if not (folder / EXPERT_FILE).is_file():
        return {}
    return {"expert": {key: value for key, value in load_expert(folder).items() if key != "evaluation"}}


def calibrated_digests(about: Mapping[str, Any] | None) -> set[str]:
    """Digests of all documents that calibrated an expert or one of its ancestors."""
    digests: set[str] = set()
    while about is not None:
        digests |= {digest for corpus in about["corpora"].values() for digest in corpus["documents"]}
        about = about["base"].get("expert")
    return digests


def recorded_base(about: Mapping[str, Any], base: Base, store: Path) -> ResolvedBase:
    """The base of an expert. Raises `CheckpointError` if it is not where the spec says, or is another model."""
    try:
        resolved = resolve_base(base, store)
    except ExpertpruneError as error:
        raise CheckpointError(
            f"the base of this expert cannot be found ({error}); say where it is with --base"
        ) from None
    if resolved.digest != about["base"]["digest"]:
        raise CheckpointError(
            f"{resolved.folder}: is not the base of this expert (digest {resolved.digest[:12]}, "
            f"recorded {about['base']['digest'][:12]})"
        )
    return resolved
