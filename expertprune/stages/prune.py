"""Apply a plan: cut, repair and write the expert."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from expertprune.artifacts.expert import BaseRecord, CorpusRecord, Expert, ancestor_of, portable, portable_base
from expertprune.artifacts.plan import Plan, load_plan
from expertprune.composition.plan import as_kept, check_kept
from expertprune.composition.scoring import check_criterion
from expertprune.engine.team import team
from expertprune.errors import PlanError, under
from expertprune.files import check_inputs, check_output, require_room, store_folder
from expertprune.models.origin import origin_of
from expertprune.models.sources import trim
from expertprune.profiling.store import profile_key
from expertprune.progress import Track, silent
from expertprune.pruning.repair import Passengers, check_repair
from expertprune.pruning.write import RepairInput, bytes_needed, check_plan
from expertprune.pruning.write import prune as write_expert
from expertprune.reporting.card import write_card
from expertprune.spec.reading import TRUST, parse_spec, trusting
from expertprune.stages.elsewhere import agree
from expertprune.stages.validate import Found, Prepared, check_unlisted, find, prepare


def prune(
    plan: Plan | str | Path,
    out: str | Path,
    overwrite: bool = False,
    store: str | Path | None = None,
    track: Track = silent,
    trust_remote_code: bool = False,
) -> Path:
    """Apply a plan: cut, repair as the plan's spec says, and write the expert's folder. It is not evaluated.

    Args:
        trust_remote_code: run Python code that comes with the base. What the plan says of it is no permission.
    """
    out = Path(out)
    check_output(out, overwrite, inputs=[] if isinstance(plan, Plan) else [Path(plan)])
    where = f"plan {plan.name!r}" if isinstance(plan, Plan) else str(plan)
    plan = plan if isinstance(plan, Plan) else load_plan(Path(plan))
    spec = parse_spec(dict(plan.spec), where, Path.cwd())
    spec = trusting(spec, {TRUST: trust_remote_code})
    with under(where), team().after_the_first():
        found = find(spec, store_folder(store), evaluate=False)
    agree(found, out)
    check_inputs(out, found.inputs)
    check_plan(plan, found.base)
    plan = as_kept(plan, found.base, found.spec.budget)
    with under(where):
        check_kept(plan, found.base, spec.serve_with)
    require_room(out, bytes_needed(plan, found.base))
    _check_corpora(found, plan)
    with under(where):
        prepared = prepare(found)
    check_unlisted(prepared)
    with team().staged(out, overwrite) as folder:
        write_folder(prepared, plan, folder, track)
    return out


def _check_corpora(found: Found, plan: Plan) -> None:
    """Raises `PlanError` if a corpus is no longer what it was when the plan was made: the repair would mix the two."""
    for name, text in found.calibration.items():
        key = profile_key(found.base, text.digest, found.spec.calibration.max_tokens)
        if not key.same_text(plan.profiles.get(str(name))):
            raise PlanError(f"corpus {name} has changed since the plan was made: compose it again")


def write_folder(
    prepared: Prepared, plan: Plan, folder: Path, track: Track = silent, passengers: Passengers | None = None
) -> None:
    """Cut, repair as the spec says, and write the expert and its card into an empty folder.

    Args:
        passengers: text that the repair takes along, if it takes any.
    """
    write_weights(prepared, plan, folder, track, passengers)
    if team().leads:
        expert = describe_expert(prepared, plan, folder)
        write_card(expert)
        expert.remember_places(prepared.spec, prepared.store)


def write_weights(
    prepared: Prepared, plan: Plan, folder: Path, track: Track = silent, passengers: Passengers | None = None
) -> None:
    """The same without a card and a description."""
    trim()  # what the profiles held
    with track("prune and repair", len(prepared.base.layers)) as step:
        given = None
        if check_repair(prepared.spec.compensation.method).runs_model and plan.cuts_layers:
            settings, running = prepared.spec.compensation, prepared.running
            batches, own = prepared.repair_batches(), prepared.repair_batches(team().share)
            given = RepairInput(running.model, batches, settings, passengers, prepared.store, running.states, own)
        write_expert(plan, prepared.base, folder, given, step)
    trim()


def describe_expert(prepared: Prepared, plan: Plan, folder: Path) -> Expert:
    """The expert of a plan, not evaluated yet."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    from expertprune import __version__

    base = prepared.base
    return Expert(
        plan=portable(plan),
        base=BaseRecord(
            model=portable_base(base.name),
            digest=base.digest,
            tokenizer_digest=base.tokenizer_digest,
            revision=prepared.spec.base.revision,
            trust_remote_code=prepared.spec.base.trust_remote_code,
            weight_bytes=base.checkpoint.weight_bytes,
            hub=origin_of(base.name, base.folder),
        ),
        corpora={
            str(name): CorpusRecord(
                digest=corpus.digest,
                documents=[each.digest for each in corpus.calibration],
                generated=corpus.generated,
            )
            for name, corpus in prepared.corpora.items()
        },
        versions={"expertprune": __version__, **versions},
        criterion_paper=check_criterion(prepared.spec.relevance.criterion).paper,
        ancestor=ancestor_of(base),
        folder=folder,
    )
