"""All stages in a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import Expert, portable
from expertprune.artifacts.plan import Plan
from expertprune.engine.tasks import Engine, Local, RemoteCall, Task
from expertprune.engine.team import team
from expertprune.errors import CheckpointError
from expertprune.evaluation.changes import of_corpora
from expertprune.files import EXPERT_FILE, check_inputs, check_output, digest_of, require_room
from expertprune.progress import Track, silent
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.elsewhere import SentSpec, agree, run_with
from expertprune.stages.evaluate import Meanwhile, evaluated_after, measure_folder, measuring, record
from expertprune.stages.forecast import tell
from expertprune.stages.profile import profile_tasks
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared, SpecLike, validate


def build(
    spec: SpecLike,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    store: str | Path | None = None,
    track: Track = silent,
    engine: Engine | None = None,
) -> Path:
    """All stages in a row: profile, compose, prune, evaluate.

    What it will take is logged first, before weights are fetched or a model is loaded. The folder appears when the
    expert is whole. It is evaluated afterwards.

    Args:
        engine: what runs a task for each corpus, and one for the expert; default: this process.

    Raises:
        CheckpointError: it does not fit into memory or on a disk; the message has the setting that helps.
        UnevaluatedError: the expert is there, and its evaluation failed.
    """
    out, engine = Path(out), engine or Local()
    read = [] if isinstance(spec, Spec) else [Path(spec)]
    team().lead(lambda: check_output(out, overwrite, inputs=read))
    with team().after_the_first():
        prepared = run_with(validate(spec, overrides, store), engine.device)
    check_inputs(out, prepared.inputs)
    require_room(out, prepared.base.checkpoint.weight_bytes)
    if team().leads and isinstance(engine, Local):  # a forecast is of this machine
        tell({"": prepared}, [out])
    prepared.base.checkpoint.fetch(track)
    agree(prepared, out)
    prepared.running.keep_states(lasting=prepared.spec.budget.retention is not None)
    engine.run(profile_tasks(prepared), track)
    engine.run([_task(prepared, out, overwrite)], track)
    return out


def _task(prepared: Prepared, out: Path, overwrite: bool) -> Task:
    before = _stamp(out)
    sent, place = SentSpec.of(prepared), str(out.resolve())
    return Task(
        name=f"build {prepared.spec.name}",
        digest=digest_of([asdict(sent), place, overwrite, before]),
        done=lambda: _stamp(out) != before,
        run=lambda track: _make(prepared, plan_of(prepared, track), out, overwrite, track),
        elsewhere=RemoteCall(build_elsewhere, {"sent": sent, "out": place, "overwrite": overwrite}),
    )


def _stamp(out: Path) -> tuple[int, int] | None:
    """It changes with every expert that is published in a folder."""
    try:
        status = (out / EXPERT_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def build_elsewhere(
    sent: SentSpec,
    out: str,
    overwrite: bool,
    track: Track = silent,
) -> None:
    """Prune and evaluate in a process that shares the store and `out` with the one that asks.

    A process before this one may have died after it had published the expert: then it is only
    evaluated.
    """
    prepared, place = sent.prepared(), Path(out)
    plan = plan_of(prepared, track)
    if not team().lead(lambda: _published(place, plan)):
        _make(prepared, plan, place, overwrite, track)
    elif prepared.spec.evaluate.enabled:
        evaluator = measuring(prepared.running, prepared.evaluated, prepared.spec.evaluate, plan.vocabulary is not None)
        with evaluated_after(place):
            measured = measure_folder(evaluator, place, prepared.running, track)
            record(place, measured, of_corpora(evaluator.corpora, measured.corpora), portable(plan).digest)


def _published(out: Path, plan: Plan) -> bool:
    """Whether the expert of a plan is there, without an evaluation."""
    try:
        expert = Expert.load(out)
    except CheckpointError:
        return False
    return expert.plan.digest == portable(plan).digest and expert.evaluation is None


def _make(prepared: Prepared, plan: Plan, out: Path, overwrite: bool, track: Track) -> None:
    meanwhile = None
    if prepared.spec.evaluate.enabled:
        other_tokens = plan.vocabulary is not None
        meanwhile = Meanwhile(measuring(prepared.running, prepared.evaluated, prepared.spec.evaluate, other_tokens))
    with team().staged(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track, meanwhile.passengers if meanwhile is not None else None)
    if meanwhile is not None:
        with evaluated_after(out):
            measured = meanwhile.result(out, prepared.running, track)
            record(out, measured, of_corpora(prepared.evaluated, measured.corpora), portable(plan).digest)
