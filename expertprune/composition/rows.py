"""Which vocabulary rows are kept. No model runs here."""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertprune.artifacts.plan import RowReasons, VocabularyPlan
from expertprune.artifacts.profile import VOCABULARY, Profile
from expertprune.composition.coverage import UnseenTokens, rows_for
from expertprune.composition.parameters import aligned, wanted_rows
from expertprune.composition.scoring import givers, rules
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import CheckpointError, PlanError, SpecError, under
from expertprune.models.base import ResolvedBase
from expertprune.models.inventory import vocabulary_rows
from expertprune.profiling.rows import FOLDS
from expertprune.spec.schema import Spec
from expertprune.spec.values import Coverage
from expertprune.tokenizing import Vocabulary, essential_ids
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
        return aligned(len(self.ids))


@functools.lru_cache(maxsize=4)
def essentials(base: ResolvedBase) -> Essentials:
    """What must be kept of a base's vocabulary.

    Raises:
        CheckpointError: its tokenizer is of a kind that cannot be cut, or has more tokens than the
        model has rows.
    """
    vocabulary, rows = base.vocabulary, vocabulary_rows(base.checkpoint, base.family)
    if vocabulary.size > rows:
        raise CheckpointError(
            f"{base.folder}: the tokenizer has ids up to {vocabulary.size - 1}, and the model has rows for {rows} only; "
            "they do not belong together"
        )
    return Essentials(vocabulary, essential_ids(vocabulary, base.folder, base.tokenizer))


def foreseen_rows(spec: Spec, base: ResolvedBase) -> int | None:
    """The rows that the budget comes to, as far as that can be said without profiles.

    Raises:
        PlanError: the number is smaller than what must be kept, or cuts nothing.
        CheckpointError: the base's tokenizer cannot be cut.
    """
    if spec.budget.vocabulary is None:
        return None
    with under("budget.vocabulary"):
        must = essentials(base)  # before all else: a tokenizer of another kind is refused whatever the number
    rows = wanted_rows(spec.budget, base)
    if rows is not None and rows < must.smallest:
        counts = ", ".join(f"{reason} {len(ids):,}" for reason, ids in must.reasons.items() if ids)
        raise PlanError(
            f"budget.vocabulary: {rows:,} rows (they go up to a multiple of {ROW_MULTIPLE}) are fewer than must be kept; "
            f"the smallest legal number is {must.smallest:,} ({counts})"
        )
    return rows


class CorpusRows:
    """How often each vocabulary row occurs in a corpus, and how probable the model finds it, by
    fold of its documents.
    """

    def __init__(self, part: Profile) -> None:
        self.digests = part.documents
        self.document, self.row, self.occurrences = (part.read(name) for name in ("document", "row", "occurrences"))
        self.fold, self.mass = part.read("fold"), part.read("mass").double()

    def inside(self, fold: int) -> Tensor:
        """Which entries are of a fold's documents, `[entries]`."""
        return self.fold[self.document] == fold

    def counts(self, without: int | None = None) -> Tensor:
        """Occurrences of each row, `[rows]`, float64.

        Args:
            without: a fold whose documents do not count.
        """
        occurrences = self.occurrences.double()
        if without is not None:
            occurrences = occurrences * ~self.inside(without)
        return torch.bincount(self.row, occurrences, self.mass.shape[1])

    def relevance(self, without: int | None = None) -> Tensor:
        """A token's frequency plus the mean probability that the model puts on it, `[rows]`; zero
        without any text. Of conversations, the mean is over predictions of answers.
        """
        counts = self.counts(without)
        mass = self.mass.sum(0) if without is None else self.mass.sum(0) - self.mass[without]
        return counts / counts.sum().clamp_min(1) + mass / mass.sum().clamp_min(1)


def row_scores(
    spec: Spec, corpora: Mapping[CorpusName, CorpusRows], without: int | None = None
) -> tuple[Tensor, Tensor]:
    """The relevance of every row, and who gave it.

    Values of a dimension: the largest; dimensions: by the spec's rule; general: at least its
    relevance times `compose.fusion.rows`. So under `intersection` a row goes when it is irrelevant
    to every value and below the general floor.

    Args:
        without: a fold whose documents do not count.

    Returns:
        Scores and their source (index into the dimensions, or their number for `general`), `[rows]`
        each.
    """
    relevance = {name: each.relevance(without) for name, each in corpora.items()}
    chosen = spec.dimensions.chosen
    per_dimension = torch.stack(
        [torch.stack([relevance[CorpusName(d, value)] for value in values]).amax(0) for d, values in chosen.items()]
    )
    score = rules.named(spec.compose.rule, "compose.rule")(per_dimension)
    source = givers(per_dimension, score)
    if spec.general:
        general = torch.stack([relevance[CorpusName("general", value)] for value in spec.general]).amax(0)
        general = general * spec.compose.fusion.rows
        source = torch.where(general > score, len(chosen), source)
        score = torch.maximum(score, general)
    return score, source


def choose_rows(spec: Spec, base: ResolvedBase, profiles: Mapping[CorpusName, Profile]) -> VocabularyPlan:
    """Decide which vocabulary rows are kept.

    Raises:
        PlanError: the budget keeps every row, or fewer than must be kept, or no cut can promise its
        coverage.
        SpecError: a profile lacks the pass over the vocabulary.
        CheckpointError: the base's tokenizer cannot be cut.
    """
    wanted, asked = foreseen_rows(spec, base), spec.budget.vocabulary
    ranking = RowRanking(spec, base, profiles)
    if wanted is None:
        assert isinstance(asked, Coverage)
        promised = {name: ranking.tested[name] for name in corpus_names(spec) if not name.is_general}
        wanted = rows_for(asked.coverage, promised, ranking.must.smallest, ranking.of)
    return ranking.plan(wanted)


class RowRanking:
    """The vocabulary rows of a base, ranked for a spec.

    Raises:
        SpecError: a profile lacks the pass over the vocabulary.
        CheckpointError: the base's tokenizer cannot be cut.
    """

    def __init__(self, spec: Spec, base: ResolvedBase, profiles: Mapping[CorpusName, Profile]) -> None:
        self.must, self.of = essentials(base), vocabulary_rows(base.checkpoint, base.family)
        self._spec, self._tokenizer = spec, base.tokenizer_digest
        self.corpora: dict[CorpusName, CorpusRows] = {}
        for name in corpus_names(spec):
            if (part := profiles[name].part(VOCABULARY)) is None:
                raise SpecError(f"the profile of {name} lacks the {VOCABULARY} pass: run the profile stage")
            self.corpora[name] = CorpusRows(part)
        self._score, self._source = row_scores(spec, self.corpora)
        self._order = ranked(self.must, self._score)
        _warn_of_few(self.corpora)

    def plan(self, rows: int) -> VocabularyPlan:
        """The plan that keeps a number of rows, a multiple of `ROW_MULTIPLE` that is no smaller
        than what must be kept.
        """
        kept = filled(self.must, self._order, rows)
        padding = padding_rows(self.must, self._score, kept, self.of, rows)
        return VocabularyPlan(KeptRows(self.of, tuple(sorted(kept)), padding), self._tokenizer, self._why(kept, rows))

    @functools.cached_property
    def tested(self) -> dict[CorpusName, UnseenTokens | None]:
        """By corpus, the tokens of each fold against the ranking that all other folds give.

        A document that lies in one fold of this corpus and in another of that one is seen in both, and
        not tested. `None` for a corpus that has nothing to test.
        """
        folds: defaultdict[str, set[int]] = defaultdict(set)
        for each in self.corpora.values():
            for digest, fold in zip(each.digests, each.fold.tolist(), strict=True):
                folds[digest].add(fold)
        needed = {fold: table for fold in range(FOLDS) if (table := self._rows_until_kept(fold)) is not None}
        result: dict[CorpusName, UnseenTokens | None] = {}
        for name, each in self.corpora.items():
            pairs = zip(each.digests, each.fold.tolist(), strict=True)
            unseen = torch.tensor([len(folds[digest]) == 1 and fold in needed for digest, fold in pairs])
            entries = unseen[each.document].nonzero()[:, 0]
            document, row, occurrences = (part[entries] for part in (each.document, each.row, each.occurrences))
            of_fold = each.fold[document].tolist()
            until = np.array([needed[fold][index] for fold, index in zip(of_fold, row.tolist(), strict=True)])
            tokens = UnseenTokens(document.numpy(), occurrences.numpy(), until)
            result[name] = tokens if len(entries) else None
        return result

    def _rows_until_kept(self, fold: int) -> NDArray[np.int64] | None:
        """How many rows must be kept until each row of a fold's text is, ranked by the text of other folds.

        `None` where the fold is empty, or a corpus has no other text.
        """
        inside = {name: each.inside(fold) for name, each in self.corpora.items()}
        if any(bool(mask.all()) for mask in inside.values()) or not any(bool(mask.any()) for mask in inside.values()):
            return None
        seen = set().union(*(set(self.corpora[name].row[mask].tolist()) for name, mask in inside.items()))
        order = ranked(self.must, row_scores(self._spec, self.corpora, without=fold)[0])
        return rows_until_kept(self.must, order, seen, self.of)

    def _why(self, kept: set[int], rows: int) -> RowReasons:
        score, source, vocabulary = self._score.tolist(), self._source.tolist(), self.must.vocabulary
        names = [*self._spec.dimensions.chosen, *(["general"] if self._spec.general else [])]
        dropped = [index for index in self._order if index not in kept]
        threshold = score[dropped[0]] if dropped else None
        chosen = [index for index in self._order if index in kept]
        parts = set().union(*map(vocabulary.parts, chosen))
        own = [index for index in chosen if index not in parts or threshold is None or score[index] >= threshold]
        sources = Counter(names[source[index]] for index in own)
        protected = {reason: len(ids) for reason, ids in self.must.reasons.items() if ids}
        protected |= {name: sources[name] for name in names} | {"parts of kept tokens": len(chosen) - len(own)}
        counts = {str(name): each.counts() for name, each in self.corpora.items()}
        index = torch.tensor(sorted(kept), dtype=torch.int64)
        return RowReasons(
            requested=self._spec.budget.vocabulary,
            threshold=threshold,
            protected=protected,
            coverage={name: float(each[index].sum() / each.sum()) for name, each in counts.items()},
            unseen={str(name): each.coverage(rows) for name, each in self.tested.items() if each is not None},
            tokens={name: int(each.sum()) for name, each in counts.items()},
            last_kept=[vocabulary.text(index) for index in own[-_EXAMPLES:]],
            first_dropped=[vocabulary.text(index) for index in dropped[:_EXAMPLES]],
        )


def ranked(must: Essentials, score: Tensor) -> list[int]:
    """Ids of tokens that need not stay, most relevant first; among equals the lower id."""
    free = torch.tensor(sorted(set(must.vocabulary.by_id) - must.ids), dtype=torch.int64)
    return list(free[score[free].argsort(descending=True, stable=True)].tolist())


def filled(must: Essentials, order: Sequence[int], wanted: int) -> set[int]:
    """The most relevant tokens for which there is room, each with all tokens that it needs.

    A token that does not fit any more is left out, and smaller ones behind it are still tried.
    """
    kept = must.ids
    for index in order:
        if len(kept) >= wanted:
            break
        new = must.vocabulary.needs(index, kept)
        if len(kept) + len(new) <= wanted:
            kept |= new
    return kept


def rows_until_kept(must: Essentials, order: Sequence[int], seen: set[int], of: int) -> NDArray[np.int64]:
    """For each row, how many rows must be kept before it is one of them, `[rows]`; only those that
    are `seen` are sure.
    """
    needed = np.full(of, of + 1, dtype=np.int64)
    kept = must.ids
    needed[list(kept)] = 0
    left = seen - kept
    for index in order:
        if not left:
            break
        if index not in kept:
            new = must.vocabulary.needs(index, kept)
            kept |= new
            left -= new
            for row in new:
                needed[row] = len(kept)
    return needed


def padding_rows(must: Essentials, score: Tensor, kept: set[int], of: int, wanted: int) -> tuple[int, ...]:
    """Base rows that fill up where there are too few tokens: rows without a token, then the least
    relevant kept row again.

    A row of zeros would have logit zero, and so a probability; these have what the base gives to
    rows of no use.
    """
    lacking = wanted - len(kept)
    spare = [row for row in range(of) if row not in must.vocabulary.by_id][:lacking]
    least = min(kept, key=lambda index: (float(score[index]), index))
    return tuple(spare + [least] * (lacking - len(spare)))


def _warn_of_few(corpora: Mapping[CorpusName, CorpusRows]) -> None:
    for name, rows in corpora.items():
        if (total := int(rows.occurrences.sum())) < FEW_TOKENS:
            log.warning(
                "corpus %s: rows are chosen from %s tokens, fewer than %s; give it more documents, or keep more rows",
                name, f"{total:,}", f"{FEW_TOKENS:,}",
            )  # fmt: skip
