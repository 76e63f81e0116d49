"""What a smaller vocabulary costs and saves, before anything is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.plan import VocabularyPlan
from expertprune.composition.parameters import aligned, removed_with_rows
from expertprune.composition.rows import RowRanking, choose_rows, essentials
from expertprune.corpora.documents import Document
from expertprune.errors import PlanError
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


@dataclass
class TradeOff:
    """Vocabularies of several sizes. `corpora` and each entry of `sizes` map a corpus to what its
    text gives.
    """

    name: str
    base: dict[str, Any]
    always_kept: dict[str, int]
    smallest: int
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {"kind": "vocabulary", **asdict(self)}


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
        the base's.

    Raises:
        CheckpointError: the base's tokenizer cannot be cut.
        PlanError: a number of rows is fewer than must be kept, or no cut.
    """
    prepared = validate(spec, overrides, store)
    must, of = essentials(prepared.base), vocabulary_rows(prepared.base.checkpoint, prepared.base.family)
    asked = [aligned(count) for count in rows]
    for count in asked:
        if not must.smallest <= count < of:
            raise PlanError(f"--rows {count}: must be at least {must.smallest:,} and below the base's {of:,}")
    own = prepared.spec.budget
    if own.vocabulary is None:  # so that profiles hold what rows are chosen by
        spec = prepared.spec.model_copy(update={"budget": own.model_copy(update={"vocabulary": 0.5})})
        prepared = replace(prepared, spec=spec)
    profiles = profiles_of(prepared, track)
    ranking = RowRanking(prepared.spec, prepared.base, profiles)
    if not asked:
        fractions = (round(of * fraction / ROW_MULTIPLE) * ROW_MULTIPLE for fraction in _FRACTIONS)
        asked = [count for count in fractions if must.smallest <= count < of]
        if own.vocabulary is not None:
            asked.append(choose_rows(prepared.spec, prepared.base, profiles).rows.rows)
    return _measured(prepared, ranking, [ranking.plan(count) for count in sorted(set(asked))])


def _measured(prepared: Prepared, ranking: RowRanking, plans: list[VocabularyPlan]) -> TradeOff:
    from tokenizers import Tokenizer

    must, of = ranking.must, ranking.of
    base, parameters = prepared.base, prepared.base.checkpoint.parameters
    about = {"model": base.name, "parameters": parameters, "rows": of, "tokens": len(must.vocabulary.by_id)}
    kept = {reason: len(ids) for reason, ids in must.reasons.items() if ids}
    result = TradeOff(prepared.spec.name, {**about, "tokenizer": must.vocabulary.kind.value}, kept, must.smallest)
    texts = {str(name): _text(prepared, str(name), corpus.calibration) for name, corpus in prepared.corpora.items()}
    tokenizer = Tokenizer.from_str(json.dumps(must.vocabulary.data))
    encoded = {name: _encoded(tokenizer, text) for name, text in texts.items()}
    calibrated = {str(name): int(rows.occurrences.sum()) for name, rows in ranking.corpora.items()}
    for name, text in texts.items():
        tokens = sum(map(len, encoded[name]))
        about = {"calibration_tokens": calibrated[name], "split": text.split, "words": text.words, "tokens": tokens}
        result.corpora[name] = {**about, "tokens_per_word": tokens / max(1, text.words)}
    for plan in plans:
        why = plan.why
        assert why is not None
        smaller = Tokenizer.from_str(json.dumps(trimmed(must.vocabulary, plan.rows.kept).data))
        corpora = {}
        for name, text in texts.items():
            ids, of_base = set(plan.rows.kept), result.corpora[name]
            covered = sum(index in ids for document in encoded[name] for index in document)
            tokens = sum(map(len, _encoded(smaller, text)))
            corpora[name] = {
                "calibration_coverage": why.coverage[name],
                "unseen": why.unseen[name].document() if name in why.unseen else None,
                "coverage": covered / max(1, of_base["tokens"]),
                "tokens_per_word": tokens / max(1, of_base["words"]),
                "tokens_of_base": tokens / max(1, of_base["tokens"]),
            }
        saved = removed_with_rows(base, plan.rows.rows)
        size = {"rows": plan.rows.rows, "parameters": parameters - saved, "fraction": 1 - saved / parameters}
        result.sizes.append({**size, "saved": saved, "threshold": why.threshold, "corpora": corpora})
    return result


def _text(prepared: Prepared, name: str, calibration: Sequence[Document]) -> Text:
    held_out = next((corpus.evaluation for corpus in prepared.evaluated if corpus.name == name), ())
    split, documents = ("evaluation", held_out) if held_out else ("calibration", calibration)
    return Text(split, [document.text for document in documents])


def _encoded(tokenizer: Any, text: Text) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch(text.texts, add_special_tokens=False)]
