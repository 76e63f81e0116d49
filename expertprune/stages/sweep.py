"""One profile, many plans: how retention falls as the budget grows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert, portable, portable_spec
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.sweep import SWEEP_SCHEMA, Point, Sweep, SweptBase
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.evaluation.measure import Measuring
from expertprune.evaluation.retention import pooled
from expertprune.files import (
    check_output,
    check_parent,
    digest_of,
    folder_size,
    require_room,
    staged_folder,
    store_folder,
    temporary_folder,
)
from expertprune.models.base import ResolvedBase
from expertprune.progress import Track, silent
from expertprune.pruning.repair import Passengers
from expertprune.pruning.write import bytes_needed
from expertprune.spec.schema import Budget, Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import Meanwhile, evaluated_after, measure_folder, measuring, record
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Found, Prepared, SpecLike, as_spec, check_unlisted, find, prepare
from expertprune.units import Structure

SWEEP_FILE = "sweep.json"


def sweep(
    spec: SpecLike,
    budgets: Sequence[float],
    out: str | Path | None = None,
    keep: bool = False,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Sweep:
    """Build and evaluate an expert for each budget; the base is profiled and loaded once.

    Args:
        budgets: fractions to remove in place of the spec's budget: of all parameters where it says `parameters` or
            `max_parameters`, else of every structure that it names.
        out: a folder for `sweep.json`, written after each budget; what it holds already is not computed again.
        keep: keep the experts, in `out/NAME-BUDGET`.

    Raises:
        SpecError: illegal budgets, all of them at once; or a spec with `budget.retention`, which finds its own.
        CheckpointError: `out` cannot be written, or holds something else.
    """
    spec = as_spec(spec, overrides)
    if keep and out is None:
        raise SpecError("the experts need a folder to be kept in: give out (--out)")
    legal, problems = _budgets(spec, budgets)
    folder = None if out is None else Path(out)
    known = {} if folder is None else _known(folder)
    found = find(spec, store_folder(store))
    if not any(corpus.evaluation for corpus in found.evaluated):
        raise SpecError("evaluate.corpora: none of them has documents, and a sweep measures bits per byte on documents")
    prepared = _prepared(found, legal, problems)
    check_unlisted(next(iter(prepared.values())))
    places = {} if folder is None or not keep else {value: folder / f"{spec.name}-{value!r}" for value in prepared}
    for value, place in places.items():
        _check_place(place, prepared[value].spec)
        check_output(place, overwrite=True, inputs=found.inputs)

    plans = {value: plan_of(each, track) for value, each in prepared.items()}
    keys = {value: _key(plan, found) for value, plan in plans.items()}
    todo = [value for value in plans if keys[value] not in known or (keep and not _holds(places[value], plans[value]))]
    _room(found.base, [plans[value] for value in todo], folder if keep else None)
    base = SweptBase(model=found.base.name, digest=found.base.digest, parameters=found.base.checkpoint.parameters)
    result = Sweep(name=spec.name, base=base, settings=spec.evaluate, points=[])
    evaluator: Measuring | None = None
    for number, (value, plan) in enumerate(plans.items(), 1):
        if value in todo:
            step = _labelled(track, f"{number} of {len(plans)}, budget {value:g}: ")
            if evaluator is None:
                other_tokens = plan.vocabulary is not None
                evaluator = measuring(found.running, found.evaluated, spec.evaluate, other_tokens)
            point = _made(prepared[value], plan, keys[value], places.get(value), evaluator, value, step)
            known[point.key] = point
        result = result.model_copy(update={"points": [*result.points, known[keys[value]]]})
        if folder is not None:
            current = {point.key for point in result.points}
            earlier = [point for key, point in known.items() if key not in current]
            result.model_copy(update={"earlier": earlier}).save(folder / SWEEP_FILE)
    return result


# --- budgets --------------------------------------------------------------------------------------------------------


def _budgets(spec: Spec, values: Sequence[float]) -> tuple[dict[float, Budget], list[str]]:
    """The legal ones of the budgets, and what is wrong with the others.

    Raises:
        SpecError: the spec cannot be swept, or no budget is legal.
    """
    structures = [structure.value for structure in Structure if getattr(spec.budget, structure.value)]
    if not structures and spec.budget.vocabulary is not None:
        structures = ["vocabulary"]
    overall = spec.budget.overall
    wrong, problems = [], []
    if spec.budget.retention is not None:
        wrong.append(
            "budget.retention: a spec with a retention floor finds its own budget, so there is nothing to sweep: build "
            "it, or give budget.parameters in its place"
        )
    elif not overall and not structures:
        wrong.append("budget: it removes nothing: say which structures the budgets are of, or budget.parameters")
    if not spec.evaluate.enabled:
        wrong.append("evaluate.enabled: a sweep is made of evaluations: set it to true")
    if "bits_per_byte" not in (spec.evaluate.metrics or ("bits_per_byte",)):
        wrong.append("evaluate.metrics: a sweep measures bits_per_byte: add it")
    legal: dict[float, Budget] = {}
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            problems.append(f"budgets: {value!r} is not a fraction to remove, above 0 and below 1")
        elif float(value) in legal:
            problems.append(f"budgets: {value:g} is there twice")
        else:
            keys = {"parameters": value, "max_parameters": None} if overall else dict.fromkeys(structures, value)
            legal[float(value)] = Budget.model_validate({**spec.budget.model_dump(), **keys})
    if not values:
        problems.append("budgets: name at least one, such as 0.25")
    if wrong or not legal:
        raise SpecError([*wrong, *problems])
    return legal, problems


def _prepared(found: Found, budgets: Mapping[float, Budget], problems: list[str]) -> dict[float, Prepared]:
    """The spec under each budget. Raises `SpecError` with the problems and all budgets that cannot be reached."""
    prepared = {}
    for value, budget in budgets.items():
        try:
            prepared[value] = prepare(found, budget)
        except PlanError as error:
            problems.append(f"budgets: {value:g}: {error}")
    if problems:
        raise SpecError(problems)
    return prepared


# --- one point ------------------------------------------------------------------------------------------------------


def _made(
    prepared: Prepared, plan: Plan, key: str, kept: Path | None, evaluator: Measuring, budget: float, track: Track
) -> Point:
    """Write and measure one expert. One that is in its place already is only measured."""
    if kept is not None and _holds(kept, plan):
        evaluation = record(kept, measure_folder(evaluator, kept, prepared.running, track))
        return _point(budget, key, plan, evaluation, folder_size(kept))
    meanwhile = Meanwhile(evaluator)
    with _written(prepared, plan, kept, meanwhile.passengers, track) as folder:
        evaluation = record(folder, meanwhile.result(folder, prepared.running, track))
        return _point(budget, key, plan, evaluation, folder_size(folder))


@contextlib.contextmanager
def _written(
    prepared: Prepared, plan: Plan, kept: Path | None, passengers: Passengers | None, track: Track
) -> Iterator[Path]:
    """The folder of a new expert: its place, which was checked, or one that vanishes after the block."""
    if kept is not None:
        with staged_folder(kept, overwrite=True) as folder:
            write_folder(prepared, plan, folder, track, passengers)
        with evaluated_after(kept):
            yield kept
        return
    with temporary_folder() as folder:
        write_folder(prepared, plan, folder, track, passengers)
        yield folder


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


def _key(plan: Plan, found: Found) -> str:
    """Digest of the plan, its spec included, and of what is measured."""
    examples = [
        [corpus.name, [document.text for document in corpus.evaluation], [asdict(asked) for asked in corpus.questions]]
        for corpus in found.evaluated
    ]
    return digest_of([SWEEP_SCHEMA, plan.document(), str(found.base.dtype), examples])


def _labelled(track: Track, label: str) -> Track:
    return lambda stage, steps: track(label + stage, steps)


# --- the folder -----------------------------------------------------------------------------------------------------


def _known(out: Path) -> dict[str, Point]:
    """The points of earlier runs by key. Raises `CheckpointError` if the folder cannot be used."""
    check_parent(out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: exists and is not a folder")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: cannot be written: no permission to write in {existing}")
    try:
        sweep = Sweep.load(out / SWEEP_FILE)
    except FileNotFoundError:
        return {}
    return {point.key: point for point in (*sweep.points, *sweep.earlier)}


def _check_place(place: Path, spec: Spec) -> None:
    """Raises `CheckpointError` if something else than an expert of this spec is where one is to be kept."""
    if not place.exists() or (place.is_dir() and not place.is_symlink() and not any(place.iterdir())):
        return
    with contextlib.suppress(CheckpointError):
        if Expert.load(place).spec == portable_spec(spec):
            return
    raise CheckpointError(f"{place}: exists, and is no expert of this spec and budget; choose another --out")


def _holds(place: Path, plan: Plan) -> bool:
    """Whether the expert of a plan is there."""
    try:
        return Expert.load(place).plan.digest == portable(plan).digest
    except CheckpointError:
        return False


def _room(base: ResolvedBase, plans: Sequence[Plan], out: Path | None) -> None:
    """Raises `CheckpointError` unless the disk has room for all experts that are kept, or for the largest that is not."""
    needed = [bytes_needed(plan, base) for plan in plans]
    if out is not None:
        require_room(out, sum(needed))
    elif needed:
        require_room(Path(tempfile.gettempdir()), max(needed))
