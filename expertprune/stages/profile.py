"""Measure every corpus of a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertprune.artifacts.profile import FORWARD, VOCABULARY, Profile, ProfileKey, ProfilePart
from expertprune.composition.scoring import needed_part
from expertprune.corpora.batches import Batch
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.engine.tasks import Call, Engine, Local, Report, Shard, Task
from expertprune.errors import CheckpointError, SpecError
from expertprune.files import digest_of
from expertprune.models.passes import TextRun
from expertprune.models.running import to_stream
from expertprune.models.spool import Limits
from expertprune.profiling.gradients import backward_bytes
from expertprune.profiling.store import description, measure, profile_key, profile_path
from expertprune.progress import Track, silent
from expertprune.relevance import Pass
from expertprune.spec.schema import Budget
from expertprune.stages.elsewhere import check_same, received, run_with, sent
from expertprune.stages.validate import Prepared, SpecLike, validate
from expertprune.units import Structure


def profiles_of(
    prepared: Prepared, track: Track, run: bool = True, engine: Engine | None = None
) -> dict[CorpusName, Profile]:
    """The profile of every corpus, with the pass that the criterion needs; what is stored is not measured again.

    Args:
        run: whether what is missing may be measured.
        engine: where it is measured; default: here.

    Raises:
        SpecError: something is missing and must not be measured.
        CheckpointError: the backward pass does not fit into memory.
    """
    names = corpus_names(prepared.spec)
    if run:
        (engine or Local()).run(profile_tasks(prepared), track)
    places = {name: _place(prepared, name) for name in names}
    for name, place in places.items():
        if place.missing:
            lacking = " and the ".join(map(str, place.missing))
            raise SpecError(f"the profile of {name} lacks the {lacking} pass: run the profile stage")
    return {name: Profile(place.path) for name, place in places.items()}


def profile_tasks(prepared: Prepared) -> list[Task]:
    """The profile of each corpus, as a task."""
    return [_task(prepared, name) for name in corpus_names(prepared.spec)]


def _task(prepared: Prepared, name: CorpusName) -> Task:
    place = _place(prepared, name)
    arguments = {**sent(prepared), "corpus": str(name), "expected": place.key.digest}
    return Task(
        name=f"profile {name}",
        digest=digest_of([place.key.digest, *map(str, place.parts)]),
        done=lambda: not place.missing,
        run=lambda track: profile_corpus(prepared, name, track),
        elsewhere=Call(profile_elsewhere, arguments),
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


def _place(prepared: Prepared, name: CorpusName) -> _Place:
    spec, part = prepared.spec, needed_part(prepared.spec.relevance)
    parts = [FORWARD]
    if part is not None and _cuts_units(spec.budget):
        parts.append(part)
    if spec.budget.vocabulary is not None:
        parts.append(VOCABULARY)
    key = profile_key(prepared.base, prepared.calibration[name].documents, spec.calibration.max_tokens)
    return _Place(key, profile_path(prepared.store, key), parts)


def profile_corpus(prepared: Prepared, name: CorpusName, track: Track) -> None:
    """Run the passes over a corpus that its profile lacks."""
    base, text, place = prepared.base, prepared.calibration[name], _place(prepared, name)
    base.checkpoint.fetch(track)
    missing = place.missing
    if any(each.made_by is Pass.GRADIENT for each in missing):  # asked before the model is loaded for any pass
        check_backward_fits(prepared, text.batches)
    if missing:
        run_text = TextRun(prepared.running.model, base.family, base.layers, text.batches)
        measure(run_text, missing, place.path, description(base, str(name), text.documents, place.key), track)


def profile_elsewhere(
    spec: Mapping[str, Any],
    store: str,
    means: Mapping[str, str],
    corpus: str,
    expected: str,
    track: Track = silent,
) -> None:
    """`profile_corpus` in a process that shares the store with the one that asks.

    Raises:
        UsageError: this machine would measure something else than `expected`, the profile's digest.
    """
    prepared, name = received(spec, store, means), CorpusName.parse(corpus)
    check_same(f"profile {corpus}", expected, _place(prepared, name).key.digest)
    profile_corpus(prepared, name, track)


def _cuts_units(budget: Budget) -> bool:
    """Whether units of layers are to go, and not vocabulary rows alone, which no criterion scores."""
    return any(getattr(budget, each.value) for each in Structure) or budget.overall or budget.retention is not None


def check_backward_fits(prepared: Prepared, batches: Sequence[Batch]) -> None:
    """Raises `CheckpointError` where a backward pass through the whole model would not fit into memory."""
    base = prepared.base
    if to_stream(base.checkpoint, base, Limits.of_environment()):
        return  # one layer is held at a time
    size = torch.empty(0, dtype=base.dtype).element_size()
    tokens = max(batch.ids.numel() for batch in batches)
    weights = base.checkpoint.parameters * size
    rows, chosen = base.checkpoint.config.get("vocab_size", 0), base.family.experts_per_token(base.checkpoint.config)
    needed = weights + backward_bytes(base.layers, rows, tokens, chosen)
    free = Limits.of_environment().free(base.device)
    free += weights if prepared.running.loaded else 0
    other = "regional, which needs one layer at a time" if base.family.has_ffn else "impact, which needs none"
    if needed > free:
        raise CheckpointError(
            f"relevance.criterion: {prepared.spec.relevance.criterion} needs a backward pass through the whole model, about "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; take criterion {other}, "
            "or lower calibration.tokens_per_batch"
        )


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
    prepared = spec if isinstance(spec, Prepared) else validate(spec, overrides, store)
    return profiles_of(run_with(prepared, engine.device if engine is not None else None), track, engine=engine)


def profile_shard(
    spec: SpecLike,
    shard: Shard,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Report:
    """A shard's part of the profiles of a spec, in the store."""
    return shard.work(profile_tasks(validate(spec, overrides, store)), track)
