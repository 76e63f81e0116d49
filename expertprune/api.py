"""The stages as functions: what the command line calls, and what Python users import.

Every function takes a spec as a path or as a `Spec`, and says what it would do wrong before it loads a model.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.artifacts import Evaluation, Plan, Profile, load_plan
from expertprune.corpora import Corpus, CorpusName, load_corpora
from expertprune.deciding import decide
from expertprune.errors import CheckpointError, ExpertpruneError, PlanError, SpecError
from expertprune.evaluation import Floats, batches_needed
from expertprune.evaluation import evaluate as evaluate_models
from expertprune.files import check_output, require_room, staged_folder, store_folder
from expertprune.models import BaseModel, load_model, load_tokenizer, resolve_base
from expertprune.preparing import Prepared, SpecLike, Track, evaluation_corpora, profiles_of, silent, validate
from expertprune.profiling import profile_key
from expertprune.pruning import RepairInput, bytes_needed, check_plan
from expertprune.pruning import prune as write_expert
from expertprune.report import EXPERT_FILE, write_card
from expertprune.retaining import decide_by_retention
from expertprune.scoring import check_criterion
from expertprune.spec import Base, Evaluate, parse_spec

__all__ = ["build", "compose", "evaluate", "load_expert", "profile", "prune", "silent", "validate"]
log = logging.getLogger(__name__)


def profile(
    spec: SpecLike | Prepared,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> dict[CorpusName, Profile]:
    """The profile of every corpus of a spec; stored ones are reused, so only what is missing runs the model.

    A spec that `validate` has prepared is not read again; `store` and `overrides` were given there.
    """
    return profiles_of(spec if isinstance(spec, Prepared) else validate(spec, overrides, store), track)


def compose(
    spec: SpecLike,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    run: bool = True,
) -> Plan:
    """Decide which units are kept.

    Args:
        run: whether profiles, or passes of them, that are missing may be made first.
    """
    return plan_of(validate(spec, overrides, store), track, run)


def plan_of(prepared: Prepared, track: Track, run: bool = True) -> Plan:
    """The plan of a prepared spec, whatever way its budget is given."""
    return (decide if prepared.spec.budget.retention is None else decide_by_retention)(prepared, track, run)


def prune(
    plan: Plan | str | Path,
    out: str | Path,
    overwrite: bool = False,
    store: str | Path | None = None,
    track: Track = silent,
) -> Path:
    """Apply a plan: cut, repair as the plan's spec says, and write the expert's folder. It is not evaluated."""
    out = Path(out)
    check_output(out, overwrite)
    plan = plan if isinstance(plan, Plan) else load_plan(Path(plan))
    spec = parse_spec(plan.spec, f"plan {plan.name!r}", Path.cwd())
    base = resolve_base(spec.base, store_folder(store))
    check_plan(plan, base)
    require_room(out, bytes_needed(plan, base))
    prepared = validate(spec, {"evaluate.enabled": False}, store)
    prepared.spec = spec
    _check_corpora(prepared, plan)
    with staged_folder(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track)
    return out


def _check_corpora(prepared: Prepared, plan: Plan) -> None:
    """Raises `PlanError` if a corpus is no longer what it was when the plan was made: the repair would mix the two."""
    for name in prepared.corpora:
        key = profile_key(prepared.base, prepared.calibration(name)[0], prepared.spec.calibration.max_tokens)
        if plan.profiles.get(str(name)) != key.digest:
            raise PlanError(
                f"corpus {name} (or what the base is run in) has changed since the plan was made: compose it again"
            )


def write_folder(prepared: Prepared, plan: Plan, folder: Path, track: Track = silent) -> None:
    """Cut, repair as the spec says, and write the expert and its card into an empty folder."""
    repair_input = None
    if prepared.spec.compensation.method != "none" and plan.cuts_layers:
        repair_input = RepairInput(prepared.model, prepared.repair_batches(), prepared.spec.compensation)
    with track("prune and repair", len(prepared.base.layers)) as step:
        write_expert(plan, prepared.base, folder, repair_input, step)
    write_card(folder, _about(prepared, plan))


def _about(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """The contents of `expertprune.json`, without an evaluation."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    from expertprune import __version__

    return {
        "kind": "expert",
        "name": plan.name,
        "base": {
            "model": prepared.base.name,
            "path": str(prepared.base.folder),
            "digest": prepared.base.digest,
            "tokenizer_digest": prepared.base.tokenizer_digest,
            "revision": prepared.spec.base.revision,
            "trust_remote_code": prepared.spec.base.trust_remote_code,
            **_earlier(prepared.base.folder),
        },
        "parameters": plan.parameters,
        "corpora": {
            str(name): {"digest": corpus.digest, "documents": [d.digest for d in corpus.calibration]}
            for name, corpus in prepared.corpora.items()
        },
        "versions": {"expertprune": __version__, **versions},
        "criterion_paper": check_criterion(prepared.spec.relevance.criterion).paper,
        "spec": plan.spec,
        "plan": plan.document(),
        "evaluation": None,
    }


def _earlier(folder: Path) -> dict[str, Any]:
    """Where a base is an expert itself: its description, without what was measured, under the key `expert`."""
    if not (folder / EXPERT_FILE).is_file():
        return {}
    return {"expert": {key: value for key, value in load_expert(folder).items() if key != "evaluation"}}


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
    check_output(out, overwrite)
    prepared = validate(spec, overrides, store)
    _room_for_expert(prepared, out)
    not_profiled(prepared.evaluated, {"corpora": {}, "base": _earlier(prepared.base.folder)})
    plan = plan_of(prepared, track)
    with staged_folder(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track)
        if prepared.spec.evaluate.enabled:
            evaluate_folder(folder, prepared.model, prepared.base, prepared.evaluated, prepared.spec.evaluate, track)
    return out


def _room_for_expert(prepared: Prepared, out: Path) -> None:
    size = sum((prepared.base.folder / file).stat().st_size for file in prepared.base.checkpoint.shards)
    require_room(out, size)


def evaluate(
    expert: str | Path,
    corpora: list[str] | None = None,
    base: str | Path | None = None,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Evaluation:
    """Measure an expert against its base again, and write the result into its folder.

    Args:
        corpora: which of its spec's corpora; default: all.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec, such as `{"evaluate.documents": 32}`.

    Raises:
        CheckpointError: the folder is no expert, or the base is not the one that it was cut from.
        SpecError: a document that calibrated the expert is among those to evaluate on.
    """
    folder = Path(expert)
    about = load_expert(folder)
    overrides = dict(overrides or {}) | ({"evaluate.corpora": corpora} if corpora else {})
    if base is not None:
        overrides["base.model"] = str(base)
    spec = parse_spec(about["spec"], str(folder / EXPERT_FILE), Path.cwd(), overrides)
    resolved = recorded_base(about, spec.base, store_folder(store))
    loaded: dict[CorpusName, Corpus] = load_corpora(spec)
    evaluated = not_profiled(evaluation_corpora(spec, loaded), about)
    model = load_model(resolved.folder, resolved.dtype, trust_remote_code=resolved.trust_remote_code)
    return evaluate_folder(folder, model, resolved, evaluated, spec.evaluate, track)


def recorded_base(about: Mapping[str, Any], base: Base, store: Path) -> BaseModel:
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


def not_profiled(corpora: list[Corpus], about: Mapping[str, Any]) -> list[Corpus]:
    """Raises `SpecError` if a document's digest is among those that calibrated the expert, or the expert it is cut from."""
    profiled: set[str] = set()
    description: Mapping[str, Any] | None = about
    while description is not None:
        profiled |= {digest for corpus in description["corpora"].values() for digest in corpus["documents"]}
        description = description["base"].get("expert")
    problems = [
        f"corpus {corpus.name}: {bad} evaluation documents calibrated this expert; evaluate on others"
        for corpus in corpora
        if (bad := sum(document.digest in profiled for document in corpus.evaluation))
    ]
    if problems:
        raise SpecError(problems)
    return corpora


def evaluate_folder(
    folder: Path,
    base_model: Any,
    base: BaseModel,
    corpora: list[Corpus],
    settings: Evaluate,
    track: Track,
    answers: dict[str, Floats] | None = None,
) -> Evaluation:
    """Measure an expert against its running base, and write the result into its folder.

    Args:
        corpora: already guarded against leaks.
        answers: what the base answered, for the next expert of the same base (see `evaluation.evaluate`).
    """
    expert = load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
    tokenizer = load_tokenizer(folder, base.trust_remote_code)
    about = json.loads((folder / EXPERT_FILE).read_text(encoding="utf-8"))
    own = tokenizer if about["plan"].get("vocabulary") else None  # the base's text is then tokenized otherwise
    tokenizer = load_tokenizer(base.folder, base.trust_remote_code) if own is not None else tokenizer
    with track("evaluate", batches_needed(corpora)) as step:
        result = evaluate_models(base_model, expert, tokenizer, corpora, settings, step, answers, own)
    write_card(folder, about | {"evaluation": result.document()})
    return result


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
