"""One profile, many plans: how retention falls as the budget grows."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import Expert, portable_base, portable_spec
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.sweep import Point, Sweep, SweptBase
from expertprune.engine.tasks import Engine, Local, RemoteCall, Report, Shard, Task
from expertprune.engine.team import team
from expertprune.errors import CheckpointError, PlanError, SpecError, gathered
from expertprune.evaluation.measure import Measuring, group_of
from expertprune.files import (
    EXPERT_FILE,
    check_output,
    check_writable,
    digest_of,
    disk_errors,
    one_at_a_time,
    require_room,
    store_folder,
)
from expertprune.models.base import ResolvedBase
from expertprune.progress import Track, silent
from expertprune.pruning.write import bytes_needed
from expertprune.spec.schema import Budget, Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.elsewhere import SentSpec, agree, run_with
from expertprune.stages.evaluate import measuring
from expertprune.stages.forecast import tell
from expertprune.stages.points import holds, load_point, make_point, point_elsewhere, point_key, save_point
from expertprune.stages.profile import profile_tasks
from expertprune.stages.sizes import of_size, problem_of, sized_keys
from expertprune.stages.validate import Found, Prepared, SpecLike, about, as_spec, check_unlisted, find, prepare

SWEEP_FILE = "sweep.json"


def sweep(
    spec: SpecLike,
    budgets: Sequence[float],
    out: str | Path | None = None,
    keep: bool = False,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    engine: Engine | None = None,
    told: Callable[[Sweep], object] | None = None,
) -> Sweep:
    """Build and evaluate an expert for each budget; the base is profiled and loaded once.

    What it will take is logged first.

    Args:
        budgets: fractions to remove in place of the spec's budget: of all parameters where it says `parameters` or
            `max_parameters`, else of every structure that it names.
        out: a folder for `sweep.json`, written after each budget; what it holds already is not computed again.
        keep: keep the experts, in `out/NAME-BUDGET`.
        engine: what runs a task for each corpus and each budget; default: this process.
        told: called after each budget, with the points that are known by then.

    Raises:
        SpecError: illegal budgets, all of them at once; or a spec with `budget.retention`, which finds its own.
        CheckpointError: `out` cannot be written, or holds something else; or the sweep does not fit into memory or on a
            disk.
    """
    engine = engine or Local()
    sweeping = _begin(spec, overrides, budgets, out, keep, store, track, engine)

    def finished() -> None:
        written = sweeping.write()
        if told is not None:
            told(written)

    engine.run(sweeping.tasks(), track, finished)
    return sweeping.write()


def sweep_shard(
    spec: SpecLike,
    budgets: Sequence[float],
    shard: Shard,
    out: str | Path | None = None,
    keep: bool = False,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Report:
    """A shard's part of a sweep, in the store (see `sweep`); it waits for the profiles of all shards."""
    sweeping = _begin(spec, overrides, budgets, out, keep, store, track, shard)
    return shard.work(sweeping.tasks(), track)


def _begin(
    given: SpecLike,
    overrides: Mapping[str, Any] | None,
    budgets: Sequence[float],
    out: str | Path | None,
    keep: bool,
    store: str | Path | None,
    track: Track,
    engine: Engine,
) -> _Sweeping:
    """Check everything, profile what is not profiled, and decide the plans."""
    if keep and out is None:
        raise SpecError("the experts need a folder to be kept in: give out (--out)")
    spec = as_spec(given, overrides)
    legal, problems = _budgets(spec, budgets)
    folder = None if out is None else Path(out)
    known = {} if folder is None else _known(folder)
    with about(given), team().after_the_first():
        found = run_with(find(spec, store_folder(store)), engine.device)
    if not any(corpus.evaluation for corpus in found.evaluated if group_of(corpus) != "other"):
        raise SpecError("evaluate.corpora: none of them has documents, and a sweep measures bits per byte on documents")
    prepared = _prepared(found, legal, problems)
    check_unlisted(next(iter(prepared.values())))
    places = {} if folder is None or not keep else {value: folder / f"{spec.name}-{value!r}" for value in prepared}
    for value, place in places.items():
        _check_place(place, prepared[value].spec)
        check_output(place, overwrite=True, inputs=found.inputs)
    if team().leads and isinstance(engine, Local):  # a forecast is of this machine
        tell({f"budget {value:g}": each for value, each in prepared.items()}, list(places.values()))
    found.base.checkpoint.fetch(track)
    agree(found, folder)
    found.running.keep_states(lasting=len(prepared) > 1)
    tasks = {task.digest: task for each in prepared.values() for task in profile_tasks(each)}
    engine.run(list(tasks.values()), track)
    plans = {value: plan_of(each, track, run=False) for value, each in prepared.items()}
    sweeping = _Sweeping(found, prepared, plans, places, folder, known)
    _room(found.base, [plans[task] for task in plans if not sweeping.done(task)], folder if keep else None)
    return sweeping


@dataclass(frozen=True)
class _Sweeping:
    """A sweep whose plans are decided.

    Attributes:
        places: where experts are kept; empty if they are not.
        folder: of `sweep.json`.
        known: points of earlier runs in that file, by key, when this one began.
    """

    found: Found
    prepared: Mapping[float, Prepared]
    plans: Mapping[float, Plan]
    places: Mapping[float, Path]
    folder: Path | None
    known: Mapping[str, Point]

    @cached_property
    def evaluator(self) -> Measuring:
        """It measures all experts that are built in this process; the base reads once."""
        other_tokens = any(plan.vocabulary is not None for plan in self.plans.values())
        return measuring(self.found.running, self.found.evaluated, self.found.spec.evaluate, other_tokens)

    @cached_property
    def keys(self) -> dict[float, str]:
        return {value: point_key(plan, self.found) for value, plan in self.plans.items()}

    def point(self, value: float) -> Point | None:
        key = self.keys[value]
        return self.known.get(key) or load_point(self.found.store, key)

    def done(self, value: float) -> bool:
        kept = value not in self.places or holds(self.places[value], self.plans[value], evaluated=True)
        return kept and self.point(value) is not None

    def tasks(self) -> list[Task]:
        return [self._task(number, value) for number, value in enumerate(self.plans, 1)]

    def _task(self, number: int, value: float) -> Task:
        place = self.places.get(value)

        def run(track: Track) -> None:
            label = f"{number} of {len(self.plans)}, budget {value:g}: "
            point = make_point(
                self.prepared[value], self.plans[value], value, place, self.evaluator, _labelled(track, label)
            )
            save_point(self.found.store, point)

        kept = None if place is None else str(place.resolve())
        arguments = {
            "sent": SentSpec.of(self.prepared[value]),
            "budget": value,
            "place": kept,
            "expected": self.keys[value],
        }
        return Task(
            name=f"budget {value:g}",
            digest=digest_of([self.keys[value], kept]),
            done=lambda: self.done(value),
            run=run,
            elsewhere=RemoteCall(point_elsewhere, arguments),
        )

    def write(self) -> Sweep:
        """The points that are known by now; in the folder too, if there is one, beside those of other sweeps."""
        base = self.found.base
        points = [point for value in self.plans if (point := self.point(value)) is not None]
        result = Sweep(
            name=self.found.spec.name,
            base=SweptBase(model=portable_base(base.name), digest=base.digest, parameters=base.checkpoint.parameters),
            settings=self.found.spec.evaluate,
            points=points,
        )
        if self.folder is not None and team().leads:
            current = {point.key for point in points}
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(self.folder):  # another sweep may have written there meanwhile
                others = {**self.known, **_points(self.folder)}
                earlier = [point for key, point in others.items() if key not in current]
                result.model_copy(update={"earlier": earlier}).save(self.folder / SWEEP_FILE)
        return result


def _labelled(track: Track, label: str) -> Track:
    return lambda stage, steps: track(label + stage, steps)


# --- budgets --------------------------------------------------------------------------------------------------------


def _budgets(spec: Spec, values: Sequence[float]) -> tuple[dict[float, Budget], list[str]]:
    """The legal ones of the budgets, and what is wrong with the others.

    Raises:
        SpecError: the spec cannot be swept, or no budget is legal.
    """
    keys: list[str] = []
    wrong: list[str] = []
    problems: list[str] = []
    if spec.budget.retention is not None:
        wrong.append(
            "budget.retention: a spec with a retention floor finds its own budget, so there is nothing to sweep: build "
            "it, or give budget.parameters in its place"
        )
    else:
        with gathered(wrong):
            keys = sized_keys(spec.budget)
    if not spec.evaluate.enabled:
        wrong.append("evaluate.enabled: a sweep is made of evaluations: set it to true")
    if "bits_per_byte" not in (spec.evaluate.metrics or ("bits_per_byte",)):
        wrong.append("evaluate.metrics: a sweep measures bits_per_byte: add it")
    legal: dict[float, Budget] = {}
    for value in values:
        if (problem := problem_of(value)) is not None:
            problems.append(f"budgets: {problem}")
        elif float(value) in legal:
            problems.append(f"budgets: {value:g} is there twice")
        else:
            legal[float(value)] = of_size(spec.budget, keys, float(value))
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


# --- the folder -----------------------------------------------------------------------------------------------------


def _known(out: Path) -> dict[str, Point]:
    """The points of earlier runs by key. Raises `CheckpointError` if the folder cannot be used."""
    if any((out / name).exists() for name in (EXPERT_FILE, "config.json")):
        raise CheckpointError(f"{out}: holds a model; choose another --out for the sweep")
    check_writable(out / SWEEP_FILE)
    return _points(out)


def _points(out: Path) -> dict[str, Point]:
    """The points that the folder's file holds, by key. Raises `CheckpointError` if it is something else."""
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


def _room(base: ResolvedBase, plans: Sequence[Plan], out: Path | None) -> None:
    """Raises `CheckpointError` unless the disk has room for all experts that are kept, or for the largest that is not."""
    needed = [bytes_needed(plan, base) for plan in plans]
    if out is not None:
        require_room(out, sum(needed))
    elif needed:
        require_room(Path(tempfile.gettempdir()), max(needed))
