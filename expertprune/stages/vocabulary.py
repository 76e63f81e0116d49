"""What a smaller vocabulary costs and saves, before anything is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.artifacts.plan import VocabularyPlan
from expertprune.artifacts.profile import VOCABULARY
from expertprune.composition.parameters import aligned, removed_with_rows
from expertprune.composition.rows import RowRanking, choose_rows, essentials
from expertprune.composition.tradeoff import BaseVocabulary, CorpusCoverage, CorpusTokens, TradeOff, VocabularySize
from expertprune.corpora.documents import CorpusName, Document
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.inventory import vocabulary_rows
from expertprune.progress import Track, silent
from expertprune.stages.profile import profiles_of
from expertprune.stages.validate import Prepared, SpecLike, validate
from expertprune.tokenizing import trimmed
from expertprune.units import ROW_MULTIPLE

_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the base's rows, shown where no sizes are asked for


@dataclass(frozen=True)
class Text:
    """A corpus' measured text: its evaluation documents, or where it has none, those that
    calibrate.
    """

    split: str
    texts: list[str]

    @property
    def words(self) -> int:
        """Stretches without white space: words, in languages that part them so."""
        return sum(len(text.split()) for text in self.texts)


def vocabulary(
    spec: SpecLike,
    rows: Sequence[int] = (),
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> TradeOff:
    """Rows, coverage, tokens per word and parameters at several sizes; profiles that are missing
    are made first.

    Args:
        rows: numbers of rows to show; default: what the spec's budget comes to, and fractions of
        the base's; where more than half must stay, the fewest that can.

    Raises:
        CheckpointError: the base's tokenizer cannot be cut.
        PlanError: a number of rows is fewer than must be kept, or no cut; or all rows must stay.
    """
    prepared = validate(spec, overrides, store)
    must, of = essentials(prepared.base), vocabulary_rows(prepared.base.checkpoint, prepared.base.family)
    asked = [aligned(count) for count in rows]
    for given, count in zip(rows, asked, strict=True):
        if not must.smallest <= count < of:
            limits = f"must be at least {must.smallest:,} and below the base's {of:,}"
            raise PlanError(f"--rows {given}: its next multiple of {ROW_MULTIPLE} {limits}")
    profiles = profiles_of(prepared, track, also=[VOCABULARY])
    ranking = RowRanking(prepared.spec, prepared.base, profiles)
    if not asked:
        fractions = (round(of * fraction / ROW_MULTIPLE) * ROW_MULTIPLE for fraction in _FRACTIONS)
        halfway = aligned((must.smallest + of) // 2)
        asked = [count for count in fractions if must.smallest <= count < of] or [
            count for count in (must.smallest, halfway) if count < of
        ]
        if not asked:
            raise PlanError(f"all {of:,} rows of the vocabulary must stay, so there is nothing to show")
        if prepared.spec.budget.vocabulary is not None:
            asked.append(choose_rows(prepared.spec, prepared.base, profiles).rows.rows)
    return _measured(prepared, ranking, [ranking.plan(count) for count in sorted(set(asked))])


def _measured(prepared: Prepared, ranking: RowRanking, plans: list[VocabularyPlan]) -> TradeOff:
    from tokenizers import Tokenizer

    must, base = ranking.must, prepared.base
    tokenizer = Tokenizer.from_str(json.dumps(must.vocabulary.data))
    corpora: dict[str, CorpusTokens] = {}
    encoded: dict[str, tuple[Text, list[list[int]]]] = {}
    for name, corpus in prepared.corpora.items():
        text = _text(prepared, name, corpus.calibration)
        ids = _encoded(tokenizer, text)
        tokens = sum(map(len, ids))
        encoded[str(name)] = text, ids
        corpora[str(name)] = CorpusTokens(
            calibration_tokens=int(ranking.corpora[name].occurrences.sum()),
            split=text.split,
            words=text.words,
            tokens=tokens,
            tokens_per_word=tokens / max(1, text.words),
        )
    return TradeOff(
        name=prepared.spec.name,
        base=BaseVocabulary(
            model=base.name,
            parameters=base.checkpoint.parameters,
            rows=ranking.of,
            tokens=len(must.vocabulary.by_id),
            tokenizer=must.vocabulary.kind.value,
        ),
        always_kept={reason: len(ids) for reason, ids in must.reasons.items() if ids},
        smallest=must.smallest,
        corpora=corpora,
        sizes=[_size(base, ranking, plan, corpora, encoded) for plan in plans],
    )


def _size(
    base: ResolvedBase,
    ranking: RowRanking,
    plan: VocabularyPlan,
    of_base: Mapping[str, CorpusTokens],
    encoded: Mapping[str, tuple[Text, list[list[int]]]],
) -> VocabularySize:
    from tokenizers import Tokenizer

    why, kept, before = plan.why, set(plan.rows.kept), base.checkpoint.parameters
    assert why is not None
    smaller = Tokenizer.from_str(json.dumps(trimmed(ranking.must.vocabulary, plan.rows.kept).data))
    corpora = {}
    for name, (text, documents) in encoded.items():
        covered = sum(index in kept for document in documents for index in document)
        tokens, words, own = of_base[name].tokens, text.words, sum(map(len, _encoded(smaller, text)))
        corpora[name] = CorpusCoverage(
            calibration_coverage=why.coverage[name],
            unseen=why.unseen.get(name),
            coverage=covered / max(1, tokens),
            tokens_per_word=own / max(1, words),
            tokens_of_base=own / max(1, tokens),
        )
    saved = removed_with_rows(base, plan.rows.rows)
    return VocabularySize(
        rows=plan.rows.rows,
        parameters=before - saved,
        fraction=1 - saved / before,
        saved=saved,
        threshold=why.threshold,
        corpora=corpora,
    )


def _text(prepared: Prepared, name: CorpusName, calibration: Sequence[Document]) -> Text:
    held_out = next((corpus.evaluation for corpus in prepared.evaluated if corpus.name == name), ())
    split, documents = ("evaluation", held_out) if held_out else ("calibration", calibration)
    return Text(split, [document.text for document in documents])


def _encoded(tokenizer: Any, text: Text) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch(text.texts, add_special_tokens=False)]
