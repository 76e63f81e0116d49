"""Load a corpus and split it into calibration and evaluation documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from expertprune.corpora.catalogue import find_sources
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.reading import read_documents, read_questions
from expertprune.errors import SpecError
from expertprune.files import digest_of
from expertprune.spec.schema import Source, Spec

HELD_OUT = 10  # one document in so many is set aside where a corpus has no evaluation split


def load_corpus(name: CorpusName, source: Source, spec: Spec) -> Corpus:
    """Read a corpus and split it.

    Where the source has no evaluation split, documents whose digest is divisible by ten are set aside: a tenth, and the
    same ones however the corpus grows. Where more documents are left than `calibration.documents`, the seed chooses.

    Raises:
        SpecError: a file is missing or malformed (file and line named), or no document is left.
    """
    wanted, evaluated = spec.calibration.documents, spec.evaluate.documents
    own_split = source.evaluation is not None or source.evaluation_split is not None
    documents = _unique(read_documents(source, source.path, source.split))
    if source.dataset is not None:  # streamed: stop as soon as there is enough of both
        calibration, evaluation = _take(documents, wanted, 0 if own_split else evaluated)
    else:
        everything = list(documents)
        evaluation = [] if own_split else [d for d in everything if _held_out(d)]
        if not own_split and len(everything) == 1:
            evaluation = []
        elif not own_split and not evaluation and everything:
            evaluation = [min(everything, key=lambda d: d.digest)]
        aside = {d.digest for d in evaluation}
        calibration = _choose([d for d in everything if d.digest not in aside], wanted, spec.calibration.seed)
    if own_split:
        own = _unique(read_documents(source, source.evaluation, source.evaluation_split))
        evaluation = list(own if source.dataset is None else itertools.islice(own, evaluated))
    evaluation = _choose(evaluation, evaluated, seed=0)
    where = ", ".join(source.path) if source.path else f"dataset {source.dataset}"
    if not calibration:
        raise SpecError(f"corpus {name}: {where}: holds no document to calibrate on")
    questions = read_questions(Path(source.questions)) if source.questions else ()
    return Corpus(str(name), tuple(calibration), tuple(evaluation), questions, set_aside=not own_split)


def load_corpora(spec: Spec) -> dict[CorpusName, Corpus]:
    """Every corpus of a spec; all problems are reported at once as one `SpecError`."""
    corpora: dict[CorpusName, Corpus] = {}
    problems: list[str] = []
    for name, source in find_sources(spec).items():
        try:
            corpora[name] = load_corpus(name, source, spec)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return corpora


def _held_out(document: Document) -> bool:
    return int(document.digest, 16) % HELD_OUT == 0


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        if document.text.strip() and document.digest not in seen:
            seen.add(document.digest)
            yield document


def _take(documents: Iterable[Document], calibration: int, evaluation: int) -> tuple[list[Document], list[Document]]:
    taken: tuple[list[Document], list[Document]] = ([], [])
    limits = (calibration, evaluation)
    for document in documents:
        part = 1 if evaluation and _held_out(document) else 0
        if len(taken[part]) < limits[part]:
            taken[part].append(document)
        if all(len(documents) >= limit for documents, limit in zip(taken, limits, strict=True)):
            break
    return taken


def _choose(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """At most `count` documents in the order of a digest salted with the seed: the files' order does not matter."""
    if len(documents) <= count:
        return sorted(documents, key=lambda d: d.digest)
    return sorted(documents, key=lambda d: digest_of([seed, d.digest]))[:count]
