"""One point of a sweep: an expert of one budget, built, measured, and kept in the store."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.sweep import SWEEP_SCHEMA, Point
from expertprune.evaluation.retention import Floats, pooled
from expertprune.files import digest_of, folder_size, staged_folder, write_json
from expertprune.progress import Track, silent
from expertprune.stages.compose import plan_of
from expertprune.stages.elsewhere import check_same, received
from expertprune.stages.evaluate import evaluate_folder
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Found, Prepared


def point_key(plan: Plan, found: Found) -> str:
    """Digest of the plan, its spec included, and of what is measured."""
    examples = [
        [corpus.name, [document.text for document in corpus.evaluation], [asdict(asked) for asked in corpus.questions]]
        for corpus in found.evaluated
    ]
    return digest_of([SWEEP_SCHEMA, plan.document(), str(found.base.dtype), examples])


def make_point(
    prepared: Prepared,
    plan: Plan,
    budget: float,
    place: Path | None,
    track: Track,
    answers: dict[str, Floats],
) -> Point:
    """Build and measure the expert of a plan.

    Args:
        place: where the expert is kept; `None`: it vanishes afterwards.
        answers: what the base answered, for the next expert (see `evaluate_folder`).
    """
    with _folder(place) as folder:
        write_folder(prepared, plan, folder, track)
        evaluation = evaluate_folder(
            folder, prepared.running, prepared.evaluated, prepared.spec.evaluate, track, answers
        )
        return _point(budget, point_key(plan, prepared), plan, evaluation, folder_size(folder))


def point_elsewhere(
    spec: Mapping[str, Any],
    store: str,
    means: Mapping[str, str],
    budget: float,
    place: str | None,
    expected: str,
    track: Track = silent,
) -> None:
    """`make_point` in a process that shares the store with the one that asks; the point goes there.

    Raises:
        UsageError: this machine would measure something else than `expected`, the point's key.
    """
    prepared = received(spec, store, means)
    plan = plan_of(prepared, track, run=False)
    check_same(f"budget {budget:g}", expected, point_key(plan, prepared))
    save_point(prepared.store, make_point(prepared, plan, budget, None if place is None else Path(place), track, {}))


def load_point(store: Path, key: str) -> Point | None:
    """A point that was measured before; a damaged file is measured again."""
    with contextlib.suppress(OSError, ValueError):
        return Point.model_validate_json(_path(store, key).read_text(encoding="utf-8"))
    return None


def save_point(store: Path, point: Point) -> None:
    write_json(_path(store, point.key), point.model_dump(mode="json"))


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
        corpora={name: each.model_copy(update={"per_document": []}) for name, each in evaluation.corpora.items()},
    )


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """An empty folder for one expert: the staged one of a place that was checked, or one that vanishes afterwards."""
    if kept is not None:
        with staged_folder(kept, overwrite=True) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="expertprune-") as temporary:
            folder = Path(temporary) / "expert"
            folder.mkdir()
            yield folder
