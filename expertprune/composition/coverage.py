"""How much of unseen text the kept vocabulary rows cover, tested on documents that did not choose them.

The rows that are kept cover the text that chose them better than any other, so that text says
nothing about the coverage of other text. Documents that are alike lie in one fold
(`profiling.rows.folds_of_similar`). The documents of a fold are unseen for the ranking that all
other documents give. How many of their tokens that ranking leaves out estimates what the ranking of
all documents leaves out of unseen text. The estimate is a little low, because it comes from less text.

Tokens cluster: a rare word that occurs once in a document occurs there again. The interval
therefore counts the documents that lack a row, each with the number of tokens that lack it, as
independent events of different weight (Fay and Feuer, 1997,
https://doi.org/10.1002/(SICI)1097-0258(19970415)16:7<791::AID-SIM500>3.0.CO;2-#). Where no token is
left out, its upper end is the rule of three: 3 tokens in as many as were tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from expertprune.artifacts.plan import UnseenCoverage
from expertprune.composition.parameters import aligned
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.profiling.rows import FOLDS

CONFIDENCE = 0.95  # of each end of the interval by itself
_RULE_OF_THREE = -math.log(1 - CONFIDENCE)  # 2.996: the largest mean at which no event is no surprise
_REFUSED = "budget.vocabulary: coverage: {:g} cannot be promised of unseen text: "


@dataclass(frozen=True)
class UnseenTokens:
    """Tokens of a corpus that were tested as unseen text.

    Attributes:
        document: the document of each entry, `[entries]`.
        occurrences: how many tokens an entry stands for, `[entries]`.
        needed: the number of kept rows from which on the entry's token is kept, `[entries]`.
    """

    document: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    needed: NDArray[np.int64]

    def coverage(self, rows: int) -> UnseenCoverage:
        """Estimate and interval where so many rows are kept."""
        missing = np.bincount(self.document, self.occurrences * (self.needed > rows)).astype(np.float64)
        tokens = int(self.occurrences.sum())
        low, high = missing_interval(missing)
        return UnseenCoverage(
            estimate=1 - float(missing.sum()) / tokens,
            low=max(0.0, 1 - high / tokens),
            high=1 - low / tokens,
            documents=len(np.unique(self.document)),
            tokens=tokens,
        )


def missing_interval(missing: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the interval for the expected number of missing tokens, from those of each
    document, `[documents]`.
    """
    total, squares, largest = float(missing.sum()), float(np.square(missing).sum()), max(1.0, float(missing.max()))
    low = 0.0
    if total:
        low = squares / (2 * total) * float(chi2.ppf(1 - CONFIDENCE, 2 * total**2 / squares))
    total, squares = total + largest, squares + largest**2
    return low, squares / (2 * total) * float(chi2.ppf(CONFIDENCE, 2 * total**2 / squares))


def rows_for(coverage: float, tested: Mapping[CorpusName, UnseenTokens | None], smallest: int, of: int) -> int:
    """The fewest rows whose coverage of unseen text is at least so much in every corpus, with 95%
    confidence.

    Args:
        tested: the corpora that the promise is about; `None` for one whose documents leave nothing
        to test on.
        smallest: the fewest rows that may be kept, a multiple of `ROW_MULTIPLE`.
        of: rows of the base.

    Raises:
        PlanError: no cut can promise it; the message says what can be promised, and how much text
        would be enough.
    """
    step = aligned(1)
    most = aligned(of) - step  # one step less than all
    problems = [
        problem for name, each in tested.items() if (problem := _too_little(coverage, name, each, max(smallest, most)))
    ]
    if problems or most < smallest:
        reason = "; ".join(problems) or f"{smallest:,} of {of:,} rows must be kept whatever the corpora say"
        raise PlanError(_REFUSED.format(coverage) + reason)

    def holds(rows: int) -> bool:
        return all(each is not None and each.coverage(rows).low >= coverage for each in tested.values())

    return smallest + step * _first(lambda index: holds(smallest + step * index), (most - smallest) // step)


def check_enough(coverage: float, tokens: Mapping[CorpusName, int]) -> None:
    """Raises `PlanError` where a corpus has too little text for a promise, even if no token of it
    were left out.
    """
    wanted = math.ceil(_RULE_OF_THREE / (1 - coverage))
    problems = [
        _enough_text(name, count, 1 - _RULE_OF_THREE / count, wanted)
        for name, count in tokens.items()
        if count < wanted
    ]
    if problems:
        raise PlanError(_REFUSED.format(coverage) + "; ".join(problems))


def _first(holds: Callable[[int], bool], last: int) -> int:
    """The smallest index that holds, where `last` does and all beyond one that does do too."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _too_little(coverage: float, name: CorpusName, tested: UnseenTokens | None, most: int) -> str | None:
    """Why a corpus cannot promise a coverage however many rows are kept, if so."""
    if tested is None:
        return (
            f"{name} has too few documents to test on; give it more than {FOLDS}, or write keep: and a number of rows"
        )
    found = tested.coverage(most)
    if found.low >= coverage:
        return None
    return _enough_text(name, found.tokens, found.low, math.ceil(found.tokens * (1 - found.low) / (1 - coverage)))


def _enough_text(name: CorpusName, tokens: int, possible: float, enough: int) -> str:
    most = f"at most coverage: {math.floor(possible * 1e5) / 1e5:g}" if possible > 1e-5 else "nothing"
    return (
        f"the {tokens:,} calibration tokens of {name} promise {most}; give it about {_rounded_up(enough):,} tokens "
        "(calibration.documents and max_tokens limit them), ask for less, or write keep: and a number of rows"
    )


def _rounded_up(number: int) -> int:
    """To two digits that count."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit
