"""What a build will take, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.composition.parameters import removed_parameters, removed_with_rows
from expertprune.corpora.batches import encode
from expertprune.corpora.documents import corpus_names
from expertprune.engine.forecast import Forecast, Forecaster, Work
from expertprune.engine.memory import Sizes, TextSize, together
from expertprune.evaluation.documents import texts_of
from expertprune.evaluation.questions import choices_of
from expertprune.evaluation.reading import Reading
from expertprune.models.spool import Limits
from expertprune.relevance import Pass
from expertprune.spec.schema import Spec
from expertprune.stages.profile import is_repaired, parts_lacking, parts_wanted
from expertprune.stages.validate import Prepared, SpecLike, validate


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
        CheckpointError: the build does not fit into memory; the message says with which setting it would.
    """
    prepared = spec if isinstance(spec, Prepared) else validate(spec, overrides, store)
    prepared.store.mkdir(parents=True, exist_ok=True)
    sizes, work = _sizes(prepared), _work(prepared, stored)
    return Forecaster.measured(prepared.base, sizes, work, Limits.of_environment(), prepared.store).forecast()


def _sizes(prepared: Prepared) -> Sizes:
    base, widths = prepared.base, prepared.widths
    if widths is None:
        return Sizes.of(base, cut=_may_be_cut(prepared.spec))
    pairs = [(shape, new) for shape, new in zip(base.layers, widths, strict=True) if not new.gone]
    kept = max(new.ffn for new in widths), max(new.query_heads * shape.head_dim for shape, new in pairs)
    cut = (
        any(new.ffn < shape.ffn for shape, new in pairs) or any(new.gone for new in widths),
        any(new.query_heads < shape.query_heads for shape, new in pairs),
    )
    return Sizes.of(base, kept, cut)


def _may_be_cut(spec: Spec) -> tuple[bool, bool]:
    budget = spec.budget
    if budget.overall or budget.retention is not None:
        return True, True
    return bool(budget.ffn), bool(budget.query_heads or budget.kv_groups)


def _work(prepared: Prepared, stored: bool) -> Work:
    spec, base = prepared.spec, prepared.base
    before = base.checkpoint.parameters
    removed = 0 if prepared.widths is None else removed_parameters(base, prepared.widths)
    after = before - removed - removed_with_rows(base, prepared.rows)
    parts = parts_wanted(spec)
    lacking = parts_lacking(prepared) if stored and base.checkpoint.pending is None else {}
    profiled: dict[str, TextSize] = {}
    for name in corpus_names(spec):
        if lacking.get(name, parts):
            profiled[str(name)] = TextSize.of(prepared.calibration[name].batches)
    evaluated = _evaluated(prepared) if spec.evaluate.enabled else None
    return Work(
        profiled=profiled,
        gradient=any(part.made_by is Pass.GRADIENT for part in parts),
        vocabulary=spec.budget.vocabulary is not None,
        repaired=TextSize.of(prepared.repair_batches()) if is_repaired(spec) else None,
        evaluated=evaluated,
        together=is_repaired(spec) and spec.budget.vocabulary is None,
        kept=1 - removed / before,
        written=base.checkpoint.dtype.itemsize * after,
    )


def _evaluated(prepared: Prepared) -> TextSize | None:
    """What base and expert read to be measured."""
    settings, tokenizer = prepared.spec.evaluate, prepared.running.tokenizer
    metrics = settings.chosen_metrics(prepared.spec.budget.vocabulary is not None)
    texts = []
    for corpus in prepared.evaluated:
        if set(metrics) - {"questions"}:
            asked = encode(texts_of(corpus.evaluation, tokenizer), tokenizer, settings.max_tokens)
            texts.append(TextSize.of(Reading.of(asked).batches))
        if "questions" in metrics:
            texts.append(TextSize.of(Reading.of(choices_of(corpus.questions, tokenizer)).batches))
    return together(texts) if texts else None
