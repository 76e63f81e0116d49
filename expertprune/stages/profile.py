"""Measure every corpus of a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.artifacts.profile import FORWARD, VOCABULARY, Profile, ProfileKey, ProfilePart
from expertprune.composition.scoring import needed_part
from expertprune.composition.widths import cuts_units
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.engine.memory import Sizes, TextSize, fitting, graph_estimate, keeping, profiling
from expertprune.engine.tasks import Engine, Local, RemoteCall, Report, Shard, Task
from expertprune.engine.team import team
from expertprune.errors import SpecError
from expertprune.files import digest_of, remove_finished
from expertprune.models.passes import TextRun
from expertprune.models.running import to_stream
from expertprune.models.sources import source_of
from expertprune.models.spool import Limits
from expertprune.models.states import KeepStates, keep_nothing
from expertprune.profiling.store import about_profile, measure, profile_key, profile_path, working_path
from expertprune.progress import Track, silent
from expertprune.pruning.repair import check_repair
from expertprune.relevance import Pass
from expertprune.spec.schema import Spec
from expertprune.stages.elsewhere import SentSpec, agreed, check_same, run_with
from expertprune.stages.validate import Prepared, SpecLike, validate


def profiles_of(
    prepared: Prepared,
    track: Track,
    run: bool = True,
    engine: Engine | None = None,
    also: Sequence[ProfilePart] = (),
) -> dict[CorpusName, Profile]:
    """The profile of every corpus, with the pass that the criterion needs; what is stored is not measured again.

    Args:
        run: whether what is missing may be measured.
        engine: where it is measured; default: here.
        also: parts that each profile must have besides those that the spec needs.

    Raises:
        SpecError: something is missing and must not be measured.
        CheckpointError: the backward pass does not fit into memory.
    """
    names = corpus_names(prepared.spec)
    prepared.base.checkpoint.fetch(track)  # profiles are named by the digest of the weights
    if run:
        (engine or Local()).run(profile_tasks(prepared, also), track)
    places = {name: _place(prepared, name, also) for name in names}
    for name, place in places.items():
        if place.missing:
            lacking = " and the ".join(map(str, place.missing))
            raise SpecError(f"the profile of {name} lacks the {lacking} pass: run `expertprune profile` with this spec")
        if team().leads:
            remove_finished(working_path(place.path))  # of a run that was killed when it had stored the profile
    return {name: Profile(place.path) for name, place in places.items()}


def profile_tasks(prepared: Prepared, also: Sequence[ProfilePart] = ()) -> list[Task]:
    """The profile of each corpus, as a task; for `also` see `profiles_of`."""
    return [_task(prepared, name, also) for name in corpus_names(prepared.spec)]


def _task(prepared: Prepared, name: CorpusName, also: Sequence[ProfilePart]) -> Task:
    place = _place(prepared, name, also)
    arguments = {"sent": SentSpec.of(prepared), "corpus": str(name), "expected": place.key.digest, "also": tuple(also)}
    return Task(
        name=f"profile {name}",
        digest=digest_of([place.key.digest, *map(str, place.parts)]),
        done=lambda: not place.missing,
        run=lambda track: profile_corpus(prepared, name, track, also),
        elsewhere=RemoteCall(profile_elsewhere, arguments),
    )


@dataclass(frozen=True)
class _Place:
    """Where the profile of a corpus is stored, and the results of passes that it must have."""

    key: ProfileKey
    path: Path
    parts: Sequence[ProfilePart]

    @property
    def missing(self) -> list[ProfilePart]:
        return [each for each in self.parts if not each.path(self.path).is_file()]


def _place(prepared: Prepared, name: CorpusName, also: Sequence[ProfilePart] = ()) -> _Place:
    spec = prepared.spec
    key = profile_key(prepared.base, prepared.calibration[name].digest, spec.calibration.max_tokens)
    return _Place(key, profile_path(prepared.store, key), list(dict.fromkeys([*parts_wanted(spec), *also])))


def parts_wanted(spec: Spec) -> list[ProfilePart]:
    """The results of passes that the profile of each corpus must have."""
    parts, part = [FORWARD], needed_part(spec.relevance)
    if part is not None and cuts_units(spec.budget):
        parts.append(part)
    foreseen = ProfilePart(Pass.GRADIENT, spec.relevance.loss)  # where retention is forecast
    if spec.budget.retention is not None and foreseen not in parts:
        parts.append(foreseen)
    if spec.budget.vocabulary is not None:
        parts.append(VOCABULARY)
    return parts


def parts_lacking(prepared: Prepared) -> dict[CorpusName, list[ProfilePart]]:
    """Those that are not in the store, by corpus."""
    return {name: _place(prepared, name).missing for name in corpus_names(prepared.spec)}


def profile_corpus(prepared: Prepared, name: CorpusName, track: Track, also: Sequence[ProfilePart] = ()) -> None:
    """Run the passes over a corpus that its profile lacks; for `also` see `profiles_of`."""
    base, text, place = prepared.base, prepared.calibration[name], _place(prepared, name, also)
    base.checkpoint.fetch(track)
    missing = team().lead(lambda: place.missing)
    if missing:
        _check_fits(prepared, name, missing)
        run_text = team().run(TextRun(prepared.running.model, base.family, base.layers, text.batches))
        about = about_profile(base, str(name), text.documents, place.key, run_text.tokens)
        keep, weights = _keep(prepared, name, missing), prepared.running.weights
        measure(run_text, missing, place.path, about, track, keep, weights)


def _keep(prepared: Prepared, name: CorpusName, missing: Sequence[ProfilePart]) -> KeepStates:
    """What keeps the hidden states of a corpus for the repair, if there is one, and room."""
    running, spec, base = prepared.running, prepared.spec, prepared.base
    if running.states is None or not is_repaired(spec):
        return keep_nothing
    share = team().share  # the repair's share of a corpus is cut as that of its profile
    batches, room = share(prepared.calibration[name].batches), source_of(running.model).room
    gradient = any(each.made_by is Pass.GRADIENT for each in missing)
    repaired = TextSize.of(prepared.repair_batches(share))
    if not keeping(Sizes.of(base), TextSize.of(batches), repaired, gradient, room.left):
        return keep_nothing
    return running.states.keeping(batches, prepared.repaired(share)[name], room)


def profile_elsewhere(
    sent: SentSpec,
    corpus: str,
    expected: str,
    also: Sequence[ProfilePart] = (),
    track: Track = silent,
) -> None:
    """`profile_corpus` in a process that shares the store with the one that asks.

    Raises:
        UsageError: this machine would measure something else than `expected`, the profile's digest.
    """
    prepared, name = sent.prepared(), CorpusName.parse(corpus)
    check_same(f"profile {corpus}", expected, _place(prepared, name).key.digest)
    profile_corpus(prepared, name, track, also)


def is_repaired(spec: Spec) -> bool:
    """Whether an expert is repaired by running the model."""
    return check_repair(spec.compensation.method).runs_model and (cuts_units(spec.budget) or bool(spec.budget.layers))


def _check_fits(prepared: Prepared, name: CorpusName, missing: Sequence[ProfilePart]) -> None:
    """Raises `CheckpointError` where the passes do not fit into memory, before the model is loaded."""
    base, limits = prepared.base, Limits.of_environment()
    sizes, gradient = Sizes.of(base), any(each.made_by is Pass.GRADIENT for each in missing)
    text = TextSize.of(team().share(prepared.calibration[name].batches))
    need = profiling(sizes, text, graph_estimate(base), gradient, False)
    weights = sizes.weights(to_stream(base.checkpoint, base, limits))
    fitting(f"profile {name}", need, 0 if prepared.running.loaded else weights, base, limits)


def profile(
    spec: SpecLike | Prepared,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    engine: Engine | None = None,
) -> dict[CorpusName, Profile]:
    """The profile of every corpus of a spec; stored ones are reused, so only what is missing runs the model.

    A spec that `validate` has prepared is not read again; `store` and `overrides` were given there.

    Args:
        engine: what runs a task for each corpus; default: this process.
    """
    prepared = spec if isinstance(spec, Prepared) else agreed(spec, overrides, store)
    return profiles_of(run_with(prepared, engine.device if engine is not None else None), track, engine=engine)


def profile_shard(
    spec: SpecLike,
    shard: Shard,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Report:
    """A shard's share of the profiles of a spec, in the store."""
    return shard.work(profile_tasks(validate(spec, overrides, store)), track)
