"""The leak guard: nothing that calibrated an expert or one of its ancestors measures it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertprune.corpora.documents import Corpus, Document
from expertprune.errors import SpecError

log = logging.getLogger(__name__)

NEAR_DUPLICATE = 0.8  # cosine of character 5-gram tf-idf from which two texts count as the same


_QUOTED = 60  # characters from which a text leaks that stands inside a calibration document


@dataclass(frozen=True)
class Examples:
    """A set of examples, such as the `examples` of `task boolq`; each is given as its texts."""

    name: str
    kind: str
    texts: Sequence[Sequence[Document]]


class LeakGuard:
    """Tells which examples calibrated an expert: documents, questions and examples of tasks alike.

    An example leaks if one of its texts

    - has the digest of a document that calibrated the expert or one of its ancestors (experts that
      it is cut from); or
    - is a near duplicate of a calibration document at hand: the cosine between tf-idf vectors of
      character 5-grams (scikit-learn) is at least 0.8; or
    - stands in such a document word for word, and has at least 60 characters.

    Near duplicates and quotations are of what a conversation says without its system messages.

    Args:
        calibration: documents whose text is at hand: those of the spec's corpora.
        digests: of all documents that calibrated the expert and its ancestors, whose text may be
            gone.
    """

    def __init__(self, calibration: Iterable[Document], digests: Iterable[str] = ()) -> None:
        self._calibration = {document.digest: document for document in calibration}
        self._digests = frozenset(digests) | set(self._calibration)
        self._quoted = "\n".join(_plain(document.text) for document in self._calibration.values())

    def leaks(self, *sets: Examples) -> list[dict[int, Document]]:
        """By set, the positions of the examples that leak, with the text that does."""
        texts = {text.digest: text for examples in sets for each in examples.texts for text in each}
        bad = self._near_duplicates(list(texts.values())) | (self._digests & set(texts))
        bad |= {
            digest
            for digest, text in texts.items()
            if len(plain := _plain(_compared(text))) >= _QUOTED and plain in self._quoted
        }
        found = []
        for examples in sets:
            of_each = [next((text for text in each if text.digest in bad), None) for each in examples.texts]
            found.append({i: text for i, text in enumerate(of_each) if text is not None})
        return found

    def _near_duplicates(self, texts: Sequence[Document]) -> set[str]:
        """Digests of the texts that are near duplicates of a calibration document."""
        if not texts or not self._calibration:
            return set()
        from sklearn.feature_extraction.text import TfidfVectorizer

        known = [_compared(document) for document in self._calibration.values()]
        new = [_compared(text) for text in texts]
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(5, 5), sublinear_tf=True).fit([*known, *new])
        similarity = (vectorizer.transform(new) @ vectorizer.transform(known).T).max(axis=1).toarray().ravel()
        return {texts[i].digest for i in np.flatnonzero(similarity >= NEAR_DUPLICATE)}

    def problems(self, *sets: Examples) -> list[str]:
        """A line for each set that leaks, naming its first leak."""
        return [_problem(examples, found) for examples, found in zip(sets, self.leaks(*sets), strict=True) if found]

    def clean(self, corpora: Sequence[Corpus]) -> list[Corpus]:
        """The corpora without evaluation documents that leak.

        Documents that were set aside automatically are dropped. In an evaluation split or a
        question set of the user's own, a leak is the user's mistake.

        Raises:
            SpecError: an evaluation split or a question set leaks, or nothing is left to evaluate
            on.
        """
        documents = [
            Examples(f"corpus {corpus.name}", "evaluation documents", [(each,) for each in corpus.evaluation])
            for corpus in corpora
        ]
        questions = [
            Examples(f"corpus {corpus.name}", "questions", [each.texts for each in corpus.questions])
            for corpus in corpora
        ]
        found = self.leaks(*documents, *questions)
        problems = [
            _problem(each, leaks) for each, leaks in zip(questions, found[len(documents) :], strict=True) if leaks
        ]
        clean = []
        for corpus, examples, leaks in zip(corpora, documents, found, strict=False):
            kept = corpus.evaluation
            if leaks and not corpus.set_aside:
                problems.append(_problem(examples, leaks))
            else:
                kept = tuple(document for i, document in enumerate(corpus.evaluation) if i not in leaks)
                if leaks:
                    log.warning(
                        "corpus %s: %d of %d documents that were set aside are or resemble calibration documents; they "
                        "are not measured",
                        corpus.name, len(leaks), len(corpus.evaluation),
                    )  # fmt: skip
            if not kept and not corpus.questions:
                why = f": all {len(leaks)} that were set aside are or resemble calibration documents" if leaks else ""
                problems.append(
                    f"corpus {corpus.name}: no document is left to evaluate on{why}; give it more, or an evaluation split"
                )
            clean.append(replace(corpus, evaluation=kept))
        if problems:
            raise SpecError(problems)
        return clean


def _compared(document: Document) -> str:
    """What tells a document from others."""
    said = document.conversation.exchanged if document.conversation is not None else ""
    return said or document.text


def _plain(text: str) -> str:
    """A text without differences in white space and case."""
    return " ".join(text.split()).casefold()


def _problem(examples: Examples, found: Mapping[int, Document]) -> str:
    first = " ".join(found[min(found)].text.split())[:60]
    return (
        f"{examples.name}: {len(found)} of {len(examples.texts)} {examples.kind} also calibrate the expert, or one that it "
        f"is cut from (the first: {first!r}...): take them out of one of the two"
    )
