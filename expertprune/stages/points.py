"""One point of a sweep: an expert of one budget, built, measured, and kept in the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert, portable
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.sweep import SWEEP_SCHEMA, Point
from expertprune.engine.team import team
from expertprune.errors import CheckpointError
from expertprune.evaluation.changes import of_corpora
from expertprune.evaluation.measure import Measuring
from expertprune.evaluation.retention import pooled
from expertprune.files import computed_by, digest_of, folder_size, read_kept, write_json
from expertprune.models.checkpoint import Checkpoint
from expertprune.progress import Track, silent
from expertprune.pruning.repair import Passengers
from expertprune.stages.compose import plan_of
from expertprune.stages.elsewhere import SentSpec, check_same
from expertprune.stages.evaluate import Meanwhile, evaluated_after, measure_folder, measuring, record
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Found, Prepared

# The rooms that write and measure experts: a change to any of them makes new points.
_SOURCES = ("arch", "corpora", "engine/team.py", "evaluation", "models", "pruning", "stages/evaluate.py",
            "stages/points.py", "stages/prune.py", "tokenizing", "units.py")  # fmt: skip


def point_key(plan: Plan, found: Found) -> str:
    """Digest of the plan, its spec included, of what is measured, and of the code that prunes and measures."""
    examples, base = [corpus.measured for corpus in found.evaluated], found.base
    about = [SWEEP_SCHEMA, plan.document(), str(base.dtype), examples, base.templates_digest]
    return digest_of([*about, computed_by(_SOURCES)])


def make_point(
    prepared: Prepared, plan: Plan, budget: float, kept: Path | None, evaluator: Measuring, track: Track
) -> Point:
    """Write and measure the expert of a plan. One that is in its place already is only measured.

    Args:
        kept: its place, which was checked; `None`: it vanishes afterwards.
        evaluator: of the base's experts.
    """
    key = point_key(plan, prepared)
    if kept is not None and team().lead(lambda: holds(kept, plan)):
        evaluation = measure_folder(evaluator, kept, prepared.running, track)
        record(kept, evaluation, of_corpora(evaluator.corpora, evaluation.corpora), portable(plan).digest)
        return _point(budget, key, plan, evaluation, folder_size(kept))
    meanwhile = Meanwhile(evaluator)
    with _written(prepared, plan, kept, meanwhile.passengers, track) as folder:
        evaluation = meanwhile.result(folder, prepared.running, track)
        record(folder, evaluation, of_corpora(evaluator.corpora, evaluation.corpora), portable(plan).digest)
        return _point(budget, key, plan, evaluation, folder_size(folder))


@contextlib.contextmanager
def _written(
    prepared: Prepared, plan: Plan, kept: Path | None, passengers: Passengers | None, track: Track
) -> Iterator[Path]:
    """The folder of a new expert: its place, which was checked, or one that vanishes after the block."""
    if kept is not None:
        with team().staged(kept, overwrite=True) as folder:
            write_folder(prepared, plan, folder, track, passengers)
        with evaluated_after(kept):
            yield kept
        return
    with team().temporary(prepared.store) as folder:
        write_folder(prepared, plan, folder, track, passengers)
        yield folder


def holds(place: Path, plan: Plan, evaluated: bool = False) -> bool:
    """Whether the expert of a plan is there, with all its weights, and, if asked for, with its evaluation."""
    try:
        expert = Expert.load(place)
        if evaluated and expert.evaluation is None:
            return False
        return expert.plan.digest == portable(plan).digest and bool(Checkpoint(place).tensors)
    except CheckpointError:
        return False


def point_elsewhere(
    sent: SentSpec,
    budget: float,
    place: str | None,
    expected: str,
    track: Track = silent,
) -> None:
    """`make_point` in a process that shares the store with the one that asks; the point goes there.

    Raises:
        UsageError: this machine would measure something else than `expected`, the point's key.
    """
    prepared = sent.prepared()
    plan = plan_of(prepared, track, run=False)
    check_same(f"budget {budget:g}", expected, point_key(plan, prepared))
    evaluator = measuring(prepared.running, prepared.evaluated, prepared.spec.evaluate, plan.vocabulary is not None)
    place_kept = None if place is None else Path(place)
    save_point(prepared.store, make_point(prepared, plan, budget, place_kept, evaluator, track))


def load_point(store: Path, key: str) -> Point | None:
    """A point that was measured before; a damaged file is measured again."""
    return read_kept(_path(store, key), Point)


def save_point(store: Path, point: Point) -> None:
    """Keep a point in the store."""
    if team().leads:
        write_json(_path(store, point.key), point.model_dump(mode="json"))
    team().wait()


def _path(store: Path, key: str) -> Path:
    return store / "sweeps" / f"{key}.json"


def _point(budget: float, key: str, plan: Plan, evaluation: Evaluation, size: int) -> Point:
    return Point(
        budget=budget,
        key=key,
        parameters=plan.parameters.document(),
        fraction=plan.parameters.after / plan.parameters.before,
        bytes=size,
        expert=pooled(evaluation, "expert"),
        general=pooled(evaluation, "general"),
        corpora={
            name: each.model_copy(update={"per_document": [], "per_question": []})
            for name, each in evaluation.corpora.items()
        },
    )
