"""All stages in a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.files import check_inputs, check_output, require_room, staged_folder
from expertprune.progress import Track, silent
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import Meanwhile, evaluated_after, measuring, record
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
    """All stages in a row: profile, compose, prune, evaluate.

    The folder appears when the expert is whole. It is evaluated afterwards.

    Raises:
        UnevaluatedError: the expert is there, and its evaluation failed.
    """
    out = Path(out)
    check_output(out, overwrite, inputs=[] if isinstance(spec, Spec) else [Path(spec)])
    prepared = validate(spec, overrides, store)
    check_inputs(out, prepared.inputs)
    require_room(out, prepared.base.checkpoint.weight_bytes)
    plan = plan_of(prepared, track)
    meanwhile = None
    if prepared.spec.evaluate.enabled:
        other_tokens = plan.vocabulary is not None
        meanwhile = Meanwhile(measuring(prepared.running, prepared.evaluated, prepared.spec.evaluate, other_tokens))
    with staged_folder(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track, meanwhile.passengers if meanwhile is not None else None)
    if meanwhile is not None:
        with evaluated_after(out):
            record(out, meanwhile.result(out, prepared.running, track))
    return out
