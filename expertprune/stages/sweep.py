"""One profile, many plans: how retention falls as the budget grows."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from expertprune.artifacts.evaluation import Evaluation, Group
from expertprune.artifacts.expert import Expert, portable, portable_spec
from expertprune.artifacts.plan import Plan
from expertprune.composition.defaults import resolved
from expertprune.composition.plan import foreseen_widths
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.evaluation.retention import Floats, pooled
from expertprune.files import (
    check_parent,
    digest_of,
    folder_size,
    require_room,
    staged_folder,
    store_folder,
    to_json,
    write_json,
)
from expertprune.models.base import resolve_base
from expertprune.progress import Track, silent
from expertprune.pruning.write import bytes_needed
from expertprune.spec.schema import Budget, Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import evaluate_folder
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared, SpecLike, as_spec, validate
from expertprune.units import Structure

SWEEP_SCHEMA = 1


SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One expert of a sweep.

    `budget` is what was asked for, `fraction` the part of the base's parameters that is left, `bytes` the size of the
    expert's folder. `expert` and `general` are retentions pooled over documents (see `pooled`), `corpora` what an evaluation
    says of each corpus. `key` is the digest of all that the numbers depend on.
    """

    budget: float
    key: str
    parameters: dict[str, int]
    fraction: float
    bytes: int
    expert: dict[str, Any] | None
    general: dict[str, Any] | None
    corpora: dict[str, dict[str, Any]]


@dataclass
class Sweep:
    """Experts of one base under several budgets, in the order in which the budgets were given."""

    name: str
    base: dict[str, Any]
    settings: dict[str, Any]
    points: list[Point] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {"kind": "sweep", "schema": SWEEP_SCHEMA, **asdict(self)}


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
    specs = _specs(spec, budgets, store)
    folder = None if out is None else Path(out)
    places = {} if folder is None or not keep else {value: folder / f"{spec.name}-{value!r}" for value in specs}
    known = {} if folder is None else _known(folder)
    for value, place in places.items():
        _check_place(place, specs[value])
    prepared = validate(next(iter(specs.values())), store=store)
    if not any(corpus.evaluation for corpus in prepared.evaluated):
        raise SpecError("evaluate.corpora: none of them has documents, and a sweep measures bits per byte on documents")
    plans = {}
    for value, each in specs.items():
        prepared.spec = each
        plans[value] = plan_of(prepared, track)
    keys = {value: _key(plan, prepared) for value, plan in plans.items()}
    todo = [value for value in specs if keys[value] not in known or (keep and not _holds(places[value], plans[value]))]
    _room(prepared, [plans[value] for value in todo], folder if keep else None)

    parameters = prepared.base.checkpoint.parameters
    base = {"model": prepared.base.name, "digest": prepared.base.digest, "parameters": parameters}
    result = Sweep(spec.name, base, prepared.spec.evaluate.model_dump(mode="json"))
    answers: dict[str, Floats] = {}
    for number, (value, plan) in enumerate(plans.items(), 1):
        if value in todo:
            prepared.spec = specs[value]
            step = _labelled(track, f"{number} of {len(specs)}, budget {value:g}: ")
            with _place(places.get(value)) as place:
                write_folder(prepared, plan, place, step)
                settings = prepared.spec.evaluate
                evaluation = evaluate_folder(
                    place, prepared.model, prepared.base, prepared.evaluated, settings, step, answers
                )
                point = _point(value, keys[value], plan, evaluation, folder_size(place))
            known[point.key] = point
        result.points.append(known[keys[value]])
        if folder is not None:
            _save(folder, result, known)
    return result


# --- budgets --------------------------------------------------------------------------------------------------------


def _specs(spec: Spec, budgets: Sequence[float], store: str | Path | None) -> dict[float, Spec]:
    """The spec under each budget. Raises `SpecError` with everything that is wrong with spec and budgets."""
    problems = []
    structures = [structure.value for structure in Structure if getattr(spec.budget, structure.value)]
    if not structures and spec.budget.vocabulary is not None:
        structures = ["vocabulary"]
    overall = spec.budget.overall
    if spec.budget.retention is not None:
        problems.append(
            "budget.retention: a spec with a retention floor finds its own budget, so there is nothing to sweep: build it, "
            "or give budget.parameters in its place"
        )
    elif not overall and not structures:
        problems.append("budget: it removes nothing: say which structures the budgets are of, or budget.parameters")
    if not spec.evaluate.enabled:
        problems.append("evaluate.enabled: a sweep is made of evaluations: set it to true")
    if "bits_per_byte" not in (spec.evaluate.metrics or ("bits_per_byte",)):
        problems.append("evaluate.metrics: a sweep measures bits_per_byte: add it")
    sound = not problems
    legal = []
    for value in budgets:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            problems.append(f"budgets: {value!r} is not a fraction to remove, above 0 and below 1")
        elif float(value) in legal:
            problems.append(f"budgets: {value:g} is there twice")
        else:
            legal.append(float(value))
    if not budgets:
        problems.append("budgets: name at least one, such as 0.25")
    specs = {}
    if sound:
        base = resolve_base(spec.base, store_folder(store))
        for value in legal:
            keys = {"parameters": value, "max_parameters": None} if overall else dict.fromkeys(structures, value)
            budget = Budget.model_validate({**spec.budget.model_dump(), **keys})
            specs[value] = resolved(spec.model_copy(update={"budget": budget}), base)
            try:
                foreseen_widths(specs[value], base)
            except PlanError as error:
                problems.append(f"budgets: {value:g}: {error}")
    if problems:
        raise SpecError(problems)
    return specs


# --- one point ------------------------------------------------------------------------------------------------------


def _point(budget: float, key: str, plan: Plan, evaluation: Evaluation, size: int) -> Point:
    corpora = {
        name: result.model_dump(mode="json", exclude={"per_document"}) for name, result in evaluation.corpora.items()
    }
    before, after = plan.parameters["before"], plan.parameters["after"]
    expert, general = (
        None if (found := pooled(evaluation, group)) is None else found.model_dump(mode="json")
        for group in get_args(Group)
    )
    point = Point(budget, key, {"before": before, "after": after}, after / before, size, expert, general, corpora)
    # As it is read back from the file, where what is undefined is null: a sweep that went on equals one that ran through.
    return Point(**json.loads(to_json(asdict(point))))


def _key(plan: Plan, prepared: Prepared) -> str:
    """Digest of the plan, its spec included, and of what is measured."""
    examples = [
        [corpus.name, [document.text for document in corpus.evaluation], [asdict(asked) for asked in corpus.questions]]
        for corpus in prepared.evaluated
    ]
    return digest_of([SWEEP_SCHEMA, plan.document(), str(prepared.base.dtype), examples])


def _labelled(track: Track, label: str) -> Track:
    return lambda stage, steps: track(label + stage, steps)


# --- the folder -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _place(kept: Path | None) -> Iterator[Path]:
    """An empty folder for one expert: the staged one of a place that was checked, or one that vanishes afterwards."""
    if kept is not None:
        with staged_folder(kept, overwrite=True) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="expertprune-") as temporary:
            folder = Path(temporary) / "expert"
            folder.mkdir()
            yield folder


def _known(out: Path) -> dict[str, Point]:
    """The points of earlier runs by key. Raises `CheckpointError` if the folder cannot be used."""
    check_parent(out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: exists and is not a folder")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: cannot be written: no permission to write in {existing}")
    path = out / SWEEP_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") != "sweep" or data.get("schema") != SWEEP_SCHEMA:
            raise ValueError(f"its kind and schema are not 'sweep' and {SWEEP_SCHEMA}")
        points = [Point(**entry) for entry in (*data["points"], *data["earlier"])]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a sweep ({error}); remove it, or choose another folder") from None
    return {point.key: point for point in points}


def _save(out: Path, result: Sweep, known: Mapping[str, Point]) -> None:
    """Write what is finished; points of other budgets or another spec stay, as `earlier`."""
    current = {point.key for point in result.points}
    earlier = [asdict(point) for key, point in known.items() if key not in current]
    write_json(out / SWEEP_FILE, {**result.document(), "earlier": earlier})


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


def _room(prepared: Prepared, plans: Sequence[Plan], out: Path | None) -> None:
    """Raises `CheckpointError` unless the disk has room for all experts that are kept, or for the largest that is not."""
    needed = [bytes_needed(plan, prepared.base) for plan in plans]
    if out is not None:
        require_room(out, sum(needed))
    elif needed:
        require_room(Path(tempfile.gettempdir()), max(needed))
