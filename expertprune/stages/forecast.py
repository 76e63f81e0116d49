"""What a build will take, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertprune.composition.parameters import removed_parameters, removed_with_rows
from expertprune.corpora.batches import encode
from expertprune.corpora.documents import Document, corpus_names
from expertprune.engine.forecast import Forecast, Forecaster, Work
from expertprune.engine.memory import Sizes, TextSize, together
from expertprune.engine.team import team
from expertprune.evaluation.documents import texts_of
from expertprune.evaluation.questions import choices_of
from expertprune.evaluation.reading import Reading
from expertprune.files import require_rooms
from expertprune.models.inventory import vocabulary_rows
from expertprune.models.spool import Limits
from expertprune.progress import foretold
from expertprune.relevance import Pass
from expertprune.spec.schema import Spec
from expertprune.stages.floor import BUILDS
from expertprune.stages.outlook import notes, unnamed_languages
from expertprune.stages.profile import is_repaired, parts_lacking, parts_wanted
from expertprune.stages.validate import Prepared, SpecLike, validate, validation_documents


def forecast(
    spec: SpecLike | Prepared,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    stored: bool = False,
) -> Forecast:
    """Memory, disk and time of a build of a spec, from its base's headers and a few seconds of measurement.

    Args:
        stored: leave out passes whose results are in the store. To know them, the weights' digest is needed, which takes
            reading them once. Otherwise nothing counts as stored.

    Raises:
        CheckpointError: the build does not fit into memory, or on a disk; the message says with which setting it would.
    """
    return of_experts({"": spec if isinstance(spec, Prepared) else validate(spec, overrides, store)}, stored)


def of_experts(experts: Mapping[str, Prepared], stored: bool = False, places: Sequence[Path] = ()) -> Forecast:
    """The same of several experts of one base and one text, by name.

    Args:
        places: where experts are written that stay, if it is known.
    """
    first = next(iter(experts.values()))
    first.store.mkdir(parents=True, exist_ok=True)
    limits, work = Limits.of_environment(), _work(first, stored)
    forecaster = Forecaster.measured(first.base, _sizes(first), work, limits, first.store)
    found = forecaster.of_experts(
        {name: (_sizes(each), replace(work, **_expert(each))) for name, each in experts.items()}
    )
    _check_rooms(found, first, limits, places)
    return found


def tell(experts: Mapping[str, Prepared], places: Sequence[Path] = ()) -> None:
    """Log what is about to be done will take, and what a user should know before; see `of_experts` for what it refuses."""
    first = next(iter(experts.values()))
    lines = "\n  ".join(of_experts(experts, stored=True, places=places).lines())
    about = "about" if len(experts) == 1 else "at most (what is known already is not built again)"
    foretold.info("%s: this will take %s %s", first.spec.name, about, lines)
    warnings = list(unnamed_languages(first))
    for note in notes(first):
        foretold.log(logging.WARNING if note in warnings else logging.INFO, "%s: %s", first.spec.name, note)


def _check_rooms(found: Forecast, prepared: Prepared, limits: Limits, places: Sequence[Path]) -> None:
    """Raises `CheckpointError` where a disk has no room for what is to be written there."""
    store, weights = prepared.store, prepared.base.checkpoint.folder
    in_store = weights.is_relative_to(store.resolve()) or weights.is_relative_to(store)
    needs = {"--store": (store, found.stored + (found.fetched if in_store else 0))}
    if not in_store and found.fetched:  # they come to the hub's cache
        needs["HF_HOME"] = (weights, found.fetched)
    if limits.spool is not None:
        needs["--spool"] = (limits.spool, found.memory.spool)
    if places:
        needs["--out"] = (places[0], found.written * len(places))
    require_rooms(needs)


def _sizes(prepared: Prepared) -> Sizes:
    base, widths = prepared.base, prepared.widths
    if widths is None:
        return Sizes.of(base, cut=_may_be_cut(prepared.spec))
    pairs = [(shape, new) for shape, new in zip(base.layers, widths, strict=True) if not new.gone]
    kept = max(new.ffn for new in widths), max(new.query_heads * shape.head_dim for shape, new in pairs)
    cut = (
        any(new.ffn < shape.ffn or new.experts < shape.experts for shape, new in pairs)
        or any(new.gone for new in widths),
        any(new.query_heads < shape.query_heads for shape, new in pairs),
    )
    return Sizes.of(base, kept, cut, max(new.experts for new in widths))


def _may_be_cut(spec: Spec) -> tuple[bool, bool]:
    budget = spec.budget
    if budget.overall or budget.retention is not None:
        return True, True
    return bool(budget.ffn or budget.experts), bool(budget.query_heads or budget.kv_groups)


def _work(prepared: Prepared, stored: bool) -> Work:
    spec, base, share = prepared.spec, prepared.base, team().share
    parts = parts_wanted(spec)
    lacking = parts_lacking(prepared) if stored and base.checkpoint.pending is None else {}
    profiled: dict[str, TextSize] = {}
    for name in corpus_names(spec):
        if lacking.get(name, parts):
            profiled[str(name)] = TextSize.of(share(prepared.calibration[name].batches))
    retention = spec.budget.retention is not None
    return Work(
        profiled=profiled,
        gradient=any(part.made_by is Pass.GRADIENT for part in parts),
        vocabulary=spec.budget.vocabulary is not None,
        repaired=TextSize.of(share(prepared.repair_batches())) if is_repaired(spec) else None,
        evaluated=_evaluated(prepared) if spec.evaluate.enabled else None,
        together=is_repaired(spec) and spec.budget.vocabulary is None,
        tried=BUILDS if retention else 0,
        held_back=_held_back(prepared) if retention else None,
        **_expert(prepared),
    )


def _expert(prepared: Prepared) -> dict[str, Any]:
    """What of `Work` differs between experts of one base and one text."""
    base = prepared.base
    before, vocabulary = base.checkpoint.parameters, vocabulary_rows(base.checkpoint, base.family)
    removed = 0 if prepared.widths is None else removed_parameters(base, prepared.widths)
    after = before - removed - removed_with_rows(base, prepared.rows)
    return {
        "kept": 1 - removed / before,
        "rows": 1.0 if prepared.rows is None else prepared.rows / vocabulary,
        "written": base.checkpoint.dtype.itemsize * after,
    }


def _evaluated(prepared: Prepared) -> TextSize | None:
    """What base and expert read to be measured."""
    settings, tokenizer = prepared.spec.evaluate, prepared.base.tokenizer
    metrics = settings.chosen_metrics(prepared.spec.budget.vocabulary is not None)
    texts = []
    for corpus in prepared.evaluated:
        if settings.reads_documents:
            texts.append(_read(prepared, corpus.evaluation, settings.max_tokens))
        if "questions" in metrics:
            texts.append(TextSize.of(team().share(Reading.of(choices_of(corpus.questions, tokenizer)).batches)))
    return together(texts) if texts else None


def _held_back(prepared: Prepared) -> TextSize:
    """What the experts of a retention floor are measured on (see `floor.measuring_held_back`)."""
    limit = prepared.spec.calibration.max_tokens
    return together([_read(prepared, validation_documents(each), limit) for each in prepared.corpora.values()])


def _read(prepared: Prepared, documents: Sequence[Document], max_tokens: int) -> TextSize:
    tokenizer = prepared.base.tokenizer
    return TextSize.of(team().share(Reading.of(encode(texts_of(documents, tokenizer), tokenizer, max_tokens)).batches))
