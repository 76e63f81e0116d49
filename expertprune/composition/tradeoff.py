"""What vocabularies of several sizes cost and save, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expertprune.artifacts.plan import UnseenCoverage


@dataclass(frozen=True)
class BaseVocabulary:
    """The base, its vocabulary rows, and its tokenizer's tokens and kind."""

    model: str
    parameters: int
    rows: int
    tokens: int
    tokenizer: str


@dataclass(frozen=True)
class CorpusTokens:
    """The text of one corpus in the base's tokens.

    Attributes:
        calibration_tokens: of the calibration documents, by which rows are chosen.
        split: what is measured, evaluation or calibration; the next three are of it.
        words: stretches without white space.
    """

    calibration_tokens: int
    split: str
    words: int
    tokens: int
    tokens_per_word: float


@dataclass(frozen=True)
class CorpusCoverage:
    """What a smaller vocabulary does to one corpus.

    Attributes:
        calibration_coverage: the share of the calibration tokens whose rows are kept.
        unseen: the estimate of that share for unseen text; `None` for a corpus of fewer than two documents.
        coverage: the share of the measured tokens whose rows are kept.
        tokens_per_word: of the smaller tokenizer.
        tokens_of_base: the smaller tokenizer's tokens over the base's.
    """

    calibration_coverage: float
    unseen: UnseenCoverage | None
    coverage: float
    tokens_per_word: float
    tokens_of_base: float


@dataclass(frozen=True)
class VocabularySize:
    """A smaller vocabulary.

    Attributes:
        parameters: of the model, with so many rows; `fraction` of the base's.
        saved: parameters that go.
        threshold: the largest relevance that is dropped.
        corpora: what it does to each.
    """

    rows: int
    parameters: int
    fraction: float
    saved: int
    threshold: float | None
    corpora: Mapping[str, CorpusCoverage]


@dataclass(frozen=True)
class TradeOff:
    """Vocabularies of several sizes.

    Attributes:
        always_kept: how many tokens must stay, by reason; a token may have several.
        smallest: the smallest number of rows.
        corpora: each corpus in the base's tokens.
        sizes: smallest first.
    """

    name: str
    base: BaseVocabulary
    always_kept: Mapping[str, int]
    smallest: int
    corpora: Mapping[str, CorpusTokens]
    sizes: Sequence[VocabularySize]

    def document(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        for size in data["sizes"]:
            for corpus in size["corpora"].values():
                corpus["unseen"] = corpus["unseen"].document() if corpus["unseen"] is not None else None
        return {"kind": "vocabulary", **data}
