"""The leak guard: nothing that calibrated an expert measures it."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np

from expertprune.corpora.documents import Corpus, Document
from expertprune.errors import SpecError

NEAR_DUPLICATE = 0.8  # cosine of character 5-gram tf-idf above which two documents count as the same


# --- leak guard -----------------------------------------------------------------------------------------------------


def leaked(evaluation: Sequence[Document], calibration: Sequence[Document]) -> list[int]:
    """Positions of evaluation documents that calibrated the expert: the same digest, or a near duplicate of one.

    Near duplicates: cosine similarity of at least 0.8 between tf-idf vectors of character 5-grams (scikit-learn).
    """
    digests = {document.digest for document in calibration}
    found = {i for i, document in enumerate(evaluation) if document.digest in digests}
    if evaluation and calibration:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(5, 5), sublinear_tf=True)
        vectorizer.fit([document.text for document in (*calibration, *evaluation)])
        known = vectorizer.transform([document.text for document in calibration])
        new = vectorizer.transform([document.text for document in evaluation])
        similarity = (new @ known.T).max(axis=1).toarray().ravel()
        found |= set(np.flatnonzero(similarity >= NEAR_DUPLICATE).tolist())
    return sorted(found)


def guarded(corpora: Sequence[Corpus]) -> list[Corpus]:
    """The corpora with clean evaluation documents.

    From documents that were set aside automatically, near duplicates of calibration documents are left out. In an
    evaluation split of its own they are the user's mistake.

    Raises:
        SpecError: an evaluation split holds documents that calibrate the expert, or nothing is left to evaluate on.
    """
    calibration = [document for corpus in corpora for document in corpus.calibration]
    clean, problems = [], []
    for corpus in corpora:
        bad = set(leaked(corpus.evaluation, calibration))
        kept = tuple(document for i, document in enumerate(corpus.evaluation) if i not in bad)
        if bad and not corpus.set_aside:
            example = " ".join(corpus.evaluation[min(bad)].text.split())[:60]
            problems.append(
                f"corpus {corpus.name}: {len(bad)} of {len(corpus.evaluation)} evaluation documents also calibrate the "
                f"expert (the first: {example!r}...): take them out of one of the two"
            )
        elif not kept and not corpus.questions:
            problems.append(
                f"corpus {corpus.name}: no document is left to evaluate on; give it more, or an evaluation split"
            )
        clean.append(Corpus(corpus.name, corpus.calibration, kept, corpus.questions, corpus.set_aside))
    if problems:
        raise SpecError(problems)
    return clean


def not_profiled(corpora: list[Corpus], profiled: Set[str]) -> list[Corpus]:
    """Raises `SpecError` if a document's digest is among those that calibrated the expert, or the expert it is cut from."""
    problems = [
        f"corpus {corpus.name}: {bad} evaluation documents calibrated this expert; evaluate on others"
        for corpus in corpora
        if (bad := sum(document.digest in profiled for document in corpus.evaluation))
    ]
    if problems:
        raise SpecError(problems)
    return corpora
