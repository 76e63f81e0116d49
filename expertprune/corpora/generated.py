"""Calibration documents that the base writes itself: what it is asked, and what of it is kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

from expertprune.corpora.batches import open_ids
from expertprune.corpora.chat import ChatTemplate
from expertprune.corpora.documents import Corpus, Document
from expertprune.corpora.messages import ANSWER, Conversation
from expertprune.spec.sources import Generate

_OPENING = 120  # characters of a document that the base goes on from
# What is cut at its end. More than 40 characters without a space are no word, but a script that parts none.
_CUT_WORD = re.compile(r"\s+\S{0,40}$")
_COMMON = 50  # most frequent words of a corpus, by which its language is known
_LEAST_WORDS = 20  # of a text whose language is looked at
_FOREIGN = 0.2  # a text is in another language if it has less than this part of the usual share of common words
_DISTINCT = 0.5  # a text repeats itself if fewer of its runs of three words are different
# Where words are not separated, each character counts as one.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Opening:
    """What the base is given: messages that it answers, or a text that it continues."""

    document: Document

    @classmethod
    def of(cls, document: Document, settings: Generate) -> Self:
        """The opening of a document: its prompt, or its first words."""
        conversation = document.conversation
        if settings.from_ == "prompts" and conversation is not None:
            return cls(Document.of(Conversation.of(conversation.prompt, conversation.tools)))
        text = document.text.strip()
        if len(text) > _OPENING:
            text = _CUT_WORD.sub("", text[:_OPENING])
        return cls(Document(text))

    def ids(self, tokenizer: Any) -> list[int]:
        """The tokens that the base reads."""
        if self.document.conversation is None:
            return open_ids(self.document.text, tokenizer)
        text = ChatTemplate(tokenizer).prompt(self.document.conversation)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def completed(self, text: str) -> Document:
        """The document with what the base wrote."""
        conversation = self.document.conversation
        if conversation is None:
            return Document(self.document.text + text)
        answer = {"role": ANSWER, "content": text}
        return Document.of(Conversation.of([*conversation.messages, answer], conversation.tools, verbatim=True))


def openings(corpus: Corpus, settings: Generate, every: Iterable[Corpus] = ()) -> list[Opening]:
    """Different openings of a corpus' calibration documents.

    Left out are those that an evaluation document has, or a question, of this corpus or of one in `every`.
    """
    evaluated = {digest for each in (corpus, *every) for digest in _evaluated(each, settings)}
    found = {
        opening.document.digest: opening for opening in (Opening.of(each, settings) for each in corpus.calibration)
    }
    return [opening for digest, opening in found.items() if digest not in evaluated and opening.document.text.strip()]


def _evaluated(corpus: Corpus, settings: Generate) -> Iterator[str]:
    """Digests of the texts that evaluate on a corpus, and of their openings."""
    asked = (text for question in corpus.questions for text in (Document(question.prompt), *question.texts))
    for document in (*corpus.evaluation, *asked):
        yield document.digest
        yield Opening.of(document, settings).document.digest


class Sieve:
    """Tells which generated texts are of no use, and counts why."""

    def __init__(self, like: Iterable[Document]) -> None:
        """`like` is the corpus' own text; it tells the language."""
        texts = [words(document.text) for document in like]
        counts = Counter(word for text in texts for word in text)
        self._common = {word for word, _ in counts.most_common(_COMMON)}
        shares = [self._share(text) for text in texts if len(text) >= _LEAST_WORDS]
        self._usual = median(shares) if shares else 0.0
        self._seen: set[str] = set()
        self.refused: Counter[str] = Counter()

    def keeps(self, text: str, whole: Document | None = None) -> bool:
        """Whether a text is of use. One that was seen before is not.

        Args:
            whole: the document that the text completes; default: the text alone. The same answer to another prompt is
                another document.
        """
        problem = self._problem(text, whole if whole is not None else Document(text))
        if problem is not None:
            self.refused[problem] += 1
        return problem is None

    def _problem(self, text: str, whole: Document) -> str | None:
        found = words(text)
        said = found or _NUMBER.findall(text)  # an answer may be a number
        if not said:
            return "empty"
        if whole.digest in self._seen:
            return "generated before"
        self._seen.add(whole.digest)
        if repeats(said):
            return "repeating itself"
        if len(found) >= _LEAST_WORDS and self._share(found) < _FOREIGN * self._usual:
            return "in another language"
        return None

    def _share(self, text: Sequence[str]) -> float:
        return sum(word in self._common for word in text) / len(text)


def words(text: str) -> list[str]:
    """The words of a text in lower case; single characters in scripts that do not separate words."""
    return _WORD.findall(text.lower())


def repeats(text: Sequence[str]) -> bool:
    """Whether less than half of the runs of three words in a text are different."""
    runs = [(first, *second) for first, second in zip(text, pairwise(text[1:]), strict=False)]
    return len(runs) >= 8 and len(set(runs)) < _DISTINCT * len(runs)
