"""Load a corpus and split it into calibration and evaluation documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from expertprune.corpora.catalogue import find_sources, other_sources, source_key
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.kept import Facts, KeptDocuments
from expertprune.corpora.reading import on_hub, pinned, read_dataset, read_files, read_questions
from expertprune.errors import SpecError, gathered, under
from expertprune.files import digest_of
from expertprune.spec.schema import Spec
from expertprune.spec.sources import Source

HELD_OUT = 10  # one document in ten is set aside where a corpus has no evaluation split


# Replaces a corpus' calibration by what the base writes; it asks nothing that evaluates in one of the corpora.
Generator = Callable[[CorpusName, Source, Corpus, Sequence[Corpus]], Corpus]


def load_corpus(
    name: CorpusName, source: Source, spec: Spec, store: Path | None = None, generator: Generator | None = None
) -> Corpus:
    """Read a corpus and split it.

    Where the source has no evaluation split, documents whose digest is divisible by ten are set
    aside: a tenth, and the same ones however the corpus grows. Where there are more documents than
    `calibration.documents`, `calibration.seed` chooses. The evaluation documents do not depend on
    the seed.

    Args:
        store: where rows of data sets on the hub are kept, so that the next run needs no network.
        generator: makes the calibration documents of sources with `generate`; `None` leaves their
            own documents in place.

    Raises:
        SpecError: a file is missing or malformed (key, file and line named), or no document is left.
    """
    corpus = _read_corpus(name, source, spec, store)
    return _completed(name, source, corpus, generator, [corpus])


def _read_corpus(name: CorpusName, source: Source, spec: Spec, store: Path | None) -> Corpus:
    own_split = source.evaluation is not None or source.evaluation_split is not None
    key = source_key(name, spec)
    if source.dataset is None:
        calibration, evaluation = _from_files(source, spec, own_split, key)
    else:
        with under(f"{key}.dataset"):
            calibration, evaluation = _from_dataset(source, spec, own_split, store)
    if not calibration:
        where = f"{key}.path: {', '.join(source.path)}" if source.path else f"{key}.dataset: {source.dataset}"
        raise SpecError(f"{where}: holds no document to calibrate on")
    with under(f"{key}.questions"):
        questions = read_questions(Path(source.questions)) if source.questions else ()
    return Corpus(name, tuple(calibration), tuple(evaluation), questions, set_aside=not own_split)


def _completed(
    name: CorpusName, source: Source, corpus: Corpus, generator: Generator | None, every: Sequence[Corpus]
) -> Corpus:
    """A corpus with what the base writes for it, and without evaluation documents that nobody answers."""
    if source.generate is not None and generator is not None:
        corpus = generator(name, source, corpus, every)
    answered = [each for each in corpus.evaluation if each.conversation is None or each.conversation.answered]
    return replace(corpus, evaluation=tuple(answered))  # a prompt alone evaluates nothing


_Split = tuple[list[Document], list[Document]]  # calibration and evaluation


def _from_files(source: Source, spec: Spec, own_split: bool, key: str) -> _Split:
    with under(f"{key}.path"):
        documents = list(_unique(read_files(source, source.path or [])))
    if own_split:
        with under(f"{key}.evaluation"):
            evaluation = list(_unique(read_files(source, source.evaluation or [])))
    else:
        evaluation = [document for document in documents if _held_out(document)]
        if len(documents) == 1:
            evaluation = []
        elif documents and len(evaluation) in (0, len(documents)):  # of few, chance may take none or all
            evaluation = [min(documents, key=lambda document: document.digest)]
        aside = {document.digest for document in evaluation}
        documents = [document for document in documents if document.digest not in aside]
    calibration = _choose(documents, spec.calibration.documents, spec.calibration.seed)
    return calibration, _choose(evaluation, spec.evaluate.documents, seed=0)


def _from_dataset(source: Source, spec: Spec, own_split: bool, store: Path | None) -> _Split:
    """What the store keeps of a data set on the hub, or else what `_streamed` reads of it."""
    if store is None or not on_hub(source):
        return _streamed(source, spec, own_split)
    path = kept_file(source, spec, store)
    if (kept := KeptDocuments.load(path)) is None:
        exact = pinned(source)
        calibration, evaluation = _streamed(exact, spec, own_split)
        about: Facts = {"dataset": source.dataset, "revision": exact.revision}
        kept = KeptDocuments(about, {"calibration": calibration, "evaluation": evaluation})
        if calibration:
            kept.save(path)
    return list(kept.splits["calibration"]), list(kept.splits["evaluation"])


def kept_file(source: Source, spec: Spec, store: Path) -> Path:
    """Where the store keeps the documents of a data set on the hub."""
    wanted = [spec.calibration.documents, spec.calibration.seed, spec.evaluate.documents]
    read_from = source.model_dump(mode="json", exclude={"questions", "generate"})
    return store / "datasets" / f"{digest_of([read_from, wanted, source.generate is not None])}.jsonl"


def _streamed(source: Source, spec: Spec, own_split: bool) -> _Split:
    """Two shuffled streams, each read no further than needed."""

    def stream(split: str | None, seed: int, evaluation: bool) -> Iterator[Document]:
        documents = _unique(read_dataset(source, split or "train", seed))
        return (document for document in documents if own_split or _held_out(document) == evaluation)

    calibration = stream(source.split, spec.calibration.seed, evaluation=False)
    evaluation = stream(source.evaluation_split if own_split else source.split, seed=0, evaluation=True)
    return (
        list(itertools.islice(calibration, spec.calibration.documents)),
        list(itertools.islice(evaluation, spec.evaluate.documents)),
    )


def load_corpora(spec: Spec, store: Path | None = None, generator: Generator | None = None) -> dict[CorpusName, Corpus]:
    """Every corpus of a spec (see `load_corpus`). Raises one `SpecError` with all problems."""
    return _loaded(find_sources(spec), spec, store, generator)


def load_others(spec: Spec, store: Path | None = None) -> list[Corpus]:
    """The corpora of `evaluate.others`, without calibration documents. Raises one `SpecError` with all problems."""
    loaded = _loaded(other_sources(spec), spec, store, None) if spec.evaluate.others else {}
    return [replace(corpus, calibration=()) for corpus in loaded.values()]


def _loaded(
    sources: Mapping[CorpusName, Source], spec: Spec, store: Path | None, generator: Generator | None
) -> dict[CorpusName, Corpus]:
    read: dict[CorpusName, Corpus] = {}
    corpora: dict[CorpusName, Corpus] = {}
    problems: list[str] = []
    for name, source in sources.items():
        with gathered(problems):
            read[name] = _read_corpus(name, source, spec, store)
    if problems:  # the base writes nothing then
        raise SpecError(problems)
    for name, corpus in read.items():
        with gathered(problems):
            corpora[name] = _completed(name, sources[name], corpus, generator, list(read.values()))
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


def _choose(documents: Sequence[Document], count: int, seed: int) -> list[Document]:
    """At most `count` documents, chosen by digest and seed whatever the files' order."""
    if len(documents) <= count:
        return sorted(documents, key=lambda document: document.digest)
    return sorted(documents, key=lambda document: digest_of([seed, document.digest]))[:count]
