"""Which vocabulary rows are kept: composition for rows, as `composition` is for the units of layers. No model runs."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertprune.artifacts.plan import VocabularyPlan
from expertprune.artifacts.profile import VOCABULARY, Profile
from expertprune.composition.budget import wanted_rows
from expertprune.composition.scoring import rules
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.models.base import ResolvedBase
from expertprune.models.inventory import vocabulary_rows
from expertprune.models.loading import load_tokenizer
from expertprune.spec.schema import Spec
from expertprune.tokenizing import Vocabulary, essential_ids, read_vocabulary
from expertprune.units import ROW_MULTIPLE, KeptRows

FEW_TOKENS = 10_000  # of a corpus, below which the choice between rare rows is a guess


_EXAMPLES = 12


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Essentials:
    """A base's vocabulary, and the tokens that stay whatever the corpora say, by reason."""

    vocabulary: Vocabulary
    reasons: Mapping[str, set[int]]

    @property
    def ids(self) -> set[int]:
        return set().union(*self.reasons.values())

    @property
    def smallest(self) -> int:
        """The smallest number of rows that can be kept."""
        return _aligned(len(self.ids))


def _aligned(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def essentials(base: ResolvedBase) -> Essentials:
    """What must be kept of a base's vocabulary.

    Raises:
        CheckpointError: its tokenizer is of a kind that cannot be cut, or has more tokens than the model has rows.
    """
    return _essentials(base.folder, base.tokenizer_digest, vocabulary_rows(base.checkpoint, base.family))


@functools.lru_cache(maxsize=4)
def _essentials(folder: Path, digest: str, rows: int) -> Essentials:
    vocabulary = read_vocabulary(folder)
    if vocabulary.size > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {vocabulary.size - 1}, and the model has rows for {rows} only; "
            "they do not belong together"
        )
    return Essentials(vocabulary, essential_ids(vocabulary, folder, load_tokenizer(folder)))


def foreseen_rows(spec: Spec, base: ResolvedBase) -> int | None:
    """The rows that the budget comes to, as far as that can be said without profiles.

    Raises:
        PlanError: the number is smaller than what must be kept, or cuts nothing.
        CheckpointError: the base's tokenizer cannot be cut.
    """
    if spec.budget.vocabulary is None:
        return None
    must = essentials(base)  # before all else: a tokenizer of another kind is refused whatever the number
    rows = wanted_rows(spec.budget, base)
    if rows is not None and rows < must.smallest:
        counts = ", ".join(f"{reason} {len(ids):,}" for reason, ids in must.reasons.items() if ids)
        raise PlanError(
            f"budget.vocabulary: {rows:,} rows are fewer than must be kept; the smallest legal number is {must.smallest:,} "
            f"({counts})"
        )
    return rows


@dataclass(frozen=True)
class RowScores:
    """Relevance of rows (`[rows]`), who gave it (index into the dimensions, or their number for `general`), and counts.

    `counts` are each corpus' occurrences `[rows]`, `weights` the corpus' part in a coverage.
    """

    score: Tensor
    source: Tensor
    counts: Mapping[CorpusName, Tensor]
    weights: Mapping[CorpusName, float]

    def coverage(self, name: CorpusName, kept: Iterable[int]) -> float:
        """The part of a corpus' tokens whose rows are kept."""
        counts = self.counts[name]
        return float(counts[torch.tensor(sorted(kept), dtype=torch.int64)].sum() / counts.sum())


def score_rows(spec: Spec, profiles: Mapping[CorpusName, Profile]) -> RowScores:
    """The relevance of every row.

    On a corpus it is the token's frequency plus the mean probability that the model puts on it. Values of a dimension: the
    largest; dimensions: by the spec's rule; general: at least `β` times its relevance (`compose.fusion.beta`). So under
    `intersection` a row goes when it is irrelevant to every value and below the general floor. In a coverage each
    dimension has the same weight, and within it each value.

    Raises:
        SpecError: a profile lacks the pass over the vocabulary.
    """
    relevance, counts = {}, {}
    for name in corpus_names(spec):
        part = profiles[name].part(VOCABULARY)
        if part is None:
            raise SpecError(f"the profile of {name} lacks the {VOCABULARY} pass: run the profile stage")
        counts[name] = part.read("count").double()
        relevance[name] = counts[name] / counts[name].sum() + part.read("mass").double()
    chosen = spec.dimensions.chosen
    per_dimension = torch.stack(
        [torch.stack([relevance[CorpusName(d, value)] for value in values]).amax(0) for d, values in chosen.items()]
    )
    score = rules.named(spec.compose.rule, "compose.rule")(per_dimension)
    source = (per_dimension - score).abs().argmin(0)
    if spec.general:
        general = torch.stack([relevance[CorpusName("general", value)] for value in spec.general]).amax(0)
        general = general * spec.compose.fusion.beta
        source = torch.where(general > score, len(chosen), source)
        score = torch.maximum(score, general)
    weights = {CorpusName(d, value): 1 / len(chosen) / len(values) for d, values in chosen.items() for value in values}
    return RowScores(score, source, counts, weights)


def choose_rows(spec: Spec, base: ResolvedBase, profiles: Mapping[CorpusName, Profile]) -> VocabularyPlan:
    """Decide which vocabulary rows are kept.

    Raises:
        PlanError: the budget keeps every row, or fewer than must be kept.
        SpecError: a profile lacks the pass over the vocabulary.
        CheckpointError: the base's tokenizer cannot be cut.
    """
    wanted = foreseen_rows(spec, base)
    must, scores = essentials(base), score_rows(spec, profiles)
    _warn_of_few(scores)
    asked = spec.budget.vocabulary
    if wanted is None:
        assert isinstance(asked, dict)
        wanted = _aligned(len(_covering(must, scores, asked["coverage"])))
        of = vocabulary_rows(base.checkpoint, base.family)
        if wanted >= of:
            raise PlanError(
                f"budget.vocabulary: coverage {asked['coverage']:g} keeps every one of {of:,} rows, so there is nothing to "
                "cut; ask for less, or leave it out"
            )
    return plan_rows(spec, base, scores, wanted)


def plan_rows(spec: Spec, base: ResolvedBase, scores: RowScores, wanted: int) -> VocabularyPlan:
    """The plan that keeps a number of rows, a multiple of `ROW_MULTIPLE` that is no smaller than what must be kept."""
    must, of = essentials(base), vocabulary_rows(base.checkpoint, base.family)
    order = ranking(must, scores)
    kept = filled(must, order, wanted)
    rows = KeptRows(of, tuple(sorted(kept)), _padding(must, scores, kept, of, wanted))
    return VocabularyPlan(rows, base.tokenizer_digest, _why(spec, must, scores, order, kept))


def ranking(must: Essentials, scores: RowScores) -> list[int]:
    """Ids of tokens that need not stay, most relevant first; among equals the lower id."""
    free = torch.tensor(sorted(set(must.vocabulary.by_id) - must.ids), dtype=torch.int64)
    return list(free[scores.score[free].argsort(descending=True, stable=True)].tolist())


def filled(must: Essentials, order: Sequence[int], wanted: int) -> set[int]:
    """As many tokens as there is room for: by relevance, each with all that it needs; one that no longer fits is passed."""
    kept = must.ids
    for index in order:
        if len(kept) >= wanted:
            break
        new = must.vocabulary.needs(index) - kept
        if len(kept) + len(new) <= wanted:
            kept |= new
    return kept


def _covering(must: Essentials, scores: RowScores, coverage: float) -> set[int]:
    """The most relevant tokens that together cover so much of the calibration corpora."""
    share = torch.zeros_like(scores.score)
    for name, weight in scores.weights.items():
        share += weight * scores.counts[name] / scores.counts[name].sum()
    gains, kept = share.tolist(), must.ids
    missing = 1 - sum(gains[index] for index in kept)
    for index in ranking(must, scores):
        if missing <= 1 - coverage + 1e-12:
            break
        new = must.vocabulary.needs(index) - kept
        missing -= sum(gains[each] for each in new)
        kept |= new
    return kept


def _padding(must: Essentials, scores: RowScores, kept: set[int], of: int, wanted: int) -> tuple[int, ...]:
    """Base rows to fill up with where tokens do not: those that never had a token, then the least relevant that is kept.

    A row of zeros would have logit zero, and so a probability; these have what the base gives to rows of no use.
    """
    lacking = wanted - len(kept)
    spare = [row for row in range(of) if row not in must.vocabulary.by_id][:lacking]
    least = min(kept, key=lambda index: (float(scores.score[index]), index))
    return tuple(spare + [least] * (lacking - len(spare)))


def _why(spec: Spec, must: Essentials, scores: RowScores, order: Sequence[int], kept: set[int]) -> dict[str, Any]:
    """Why these rows (see `VocabularyPlan`)."""
    score, source = scores.score.tolist(), scores.source.tolist()
    names = [*spec.dimensions.chosen, *(["general"] if spec.general else [])]
    dropped = [index for index in order if index not in kept]
    threshold = score[dropped[0]] if dropped else None
    chosen = [index for index in order if index in kept]
    parts = set().union(*(must.vocabulary.needs(index) - {index} for index in chosen))
    own = [index for index in chosen if index not in parts or threshold is None or score[index] >= threshold]
    sources = Counter(names[source[index]] for index in own)
    protected = {reason: len(ids) for reason, ids in must.reasons.items() if ids}
    protected |= {name: sources[name] for name in names} | {"parts of kept tokens": len(chosen) - len(own)}
    return {
        "requested": spec.budget.vocabulary,
        "threshold": threshold,
        "protected": protected,
        "coverage": {str(name): scores.coverage(name, kept) for name in scores.counts},
        "tokens": {str(name): int(counts.sum()) for name, counts in scores.counts.items()},
        "last_kept": [must.vocabulary.text(index) for index in own[-_EXAMPLES:]],
        "first_dropped": [must.vocabulary.text(index) for index in dropped[:_EXAMPLES]],
    }


def _warn_of_few(scores: RowScores) -> None:
    for name, counts in scores.counts.items():
        if (total := int(counts.sum())) < FEW_TOKENS:
            log.warning(
                "corpus %s: rows are chosen from %s tokens, fewer than %s; give it more documents, or keep more rows",
                name, f"{total:,}", f"{FEW_TOKENS:,}",
            )  # fmt: skip
