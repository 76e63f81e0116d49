"""All stages in a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.files import check_inputs, check_output, require_room, staged_folder
from expertprune.progress import Track, silent
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import evaluate_folder
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import SpecLike, validate


def build(
    spec: SpecLike,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    store: str | Path | None = None,
    track: Track = silent,
) -> Path:
    """All stages in a row: profile, compose, prune, evaluate. The folder appears when everything is done."""
    out = Path(out)
    check_output(out, overwrite, inputs=[] if isinstance(spec, Spec) else [Path(spec)])
    prepared = validate(spec, overrides, store)
    check_inputs(out, prepared.inputs)
    require_room(out, prepared.base.checkpoint.weight_bytes)
    plan = plan_of(prepared, track)
    with staged_folder(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track)
        if prepared.spec.evaluate.enabled:
            evaluate_folder(folder, prepared.running, prepared.evaluated, prepared.spec.evaluate, track)
    return out
