"""Corpora: from the names in a spec to documents, split into calibration and evaluation, and to token batches."""

from __future__ import annotations

import hashlib
import itertools
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from expertprune.errors import SpecError
from expertprune.files import digest_of
from expertprune.registry import nearest
from expertprune.spec import DIMENSIONS, Source, Spec

HELD_OUT = 10  # one document in so many is set aside where a corpus has no evaluation split


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str

    @property
    def digest(self) -> str:
        """What makes two documents the same for splits and leaks: the text, white space aside."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Corpus:
    """Documents of one dimension value, or of `general`.

    `set_aside` says that the evaluation documents are a tenth of the corpus rather than a split of their own.
    """

    name: str
    calibration: tuple[Document, ...]
    evaluation: tuple[Document, ...]
    questions: tuple[Question, ...] = ()
    set_aside: bool = False

    @property
    def digest(self) -> str:
        return digest_of([document.digest for document in self.calibration])


@dataclass(frozen=True)
class CorpusName:
    """A corpus that the spec names: `dimension` is one of the three, or `general`."""

    dimension: str
    value: str

    def __str__(self) -> str:
        return f"{self.dimension}/{self.value}"


def corpus_names(spec: Spec) -> list[CorpusName]:
    """Every corpus of a spec: the dimensions' in their order, then those of `general`."""
    names = [CorpusName(dimension, value) for dimension, values in spec.dimensions.chosen.items() for value in values]
    return names + [CorpusName("general", value) for value in spec.general]


def shipped(folder: str) -> Path:
    """A folder that ships with the project (`corpora`, `profiles`), installed or in a clone."""
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def catalogue_sources(folder: Path) -> dict[str, Source]:
    """The sources of a catalogue folder by `dimension/value`, their paths made absolute. Raises `SpecError`."""
    path = folder / "catalogue.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"corpora.catalogue: {path}: no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {error}") from None
    sources: dict[str, Source] = {}
    problems: list[str] = []
    valid = (*DIMENSIONS, "general")
    for dimension, values in data.items() if isinstance(data, dict) else ():
        if dimension not in valid or not isinstance(values, dict):
            problems.append(f"{path}: {dimension!r} must be one of {', '.join(valid)}, with a mapping of values")
            continue
        for value, entry in values.items():
            try:
                entry = {key: item for key, item in entry.items() if key != "about"}
                source = Source.model_validate(entry)
            except (ValidationError, AttributeError) as error:
                problems.append(f"{path}: {dimension}.{value}: {str(error).splitlines()[-1].strip()}")
                continue
            for key in ("path", "evaluation"):
                if getattr(source, key) is not None:
                    setattr(source, key, [str(folder / item) for item in getattr(source, key)])
            if source.questions is not None:
                source.questions = str(folder / source.questions)
            sources[f"{dimension}/{value}"] = source
    if problems:
        raise SpecError(problems)
    return sources


def find_sources(spec: Spec) -> dict[CorpusName, Source]:
    """The source of every corpus that the spec names; raises `SpecError` naming all that have none."""
    folder = Path(spec.corpora.catalogue) if spec.corpora.catalogue else shipped("corpora")
    catalogue = catalogue_sources(folder)
    found: dict[CorpusName, Source] = {}
    problems = []
    for name in corpus_names(spec):
        source = _find(name, spec.corpora.sources, catalogue)
        if source is None:
            known = {key.partition("/")[2] for key in catalogue if key.startswith(f"{name.dimension}/")}
            known |= {key.rpartition("/")[2] for key in spec.corpora.sources}
            key = "general" if name.dimension == "general" else f"dimensions.{name.dimension}"
            problems.append(f"{key}: no corpus for {name.value!r}{nearest(name.value, known)}")
        else:
            found[name] = source
    if problems:
        raise SpecError(problems)
    return found


def _find(name: CorpusName, inline: dict[str, Source], catalogue: dict[str, Source]) -> Source | None:
    for candidate in (str(name), name.value):
        if candidate in inline:
            return inline[candidate]
    if str(name) in catalogue:
        return catalogue[str(name)]
    if name.dimension == "general":  # any corpus can be one whose capability is to be retained
        if name.value in catalogue:
            return catalogue[name.value]
        matches = [key for key in catalogue if key.partition("/")[2] == name.value]
        if len(matches) == 1:
            return catalogue[matches[0]]
    return None


def load_corpus(name: CorpusName, source: Source, spec: Spec) -> Corpus:
    """Read a corpus and split it.

    Where the source has no evaluation split, documents whose digest is divisible by ten are set aside: a tenth, and the
    same ones however the corpus grows. Where more documents are left than `calibration.documents`, the seed chooses.

    Raises:
        SpecError: a file is missing or malformed (file and line named), or no document is left.
    """
    wanted, evaluated = spec.calibration.documents, spec.evaluate.documents
    own_split = source.evaluation is not None or source.evaluation_split is not None
    documents = _unique(_documents(source, source.path, source.split))
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
        own = _unique(_documents(source, source.evaluation, source.evaluation_split))
        evaluation = list(own if source.dataset is None else itertools.islice(own, evaluated))
    evaluation = _choose(evaluation, evaluated, seed=0)
    where = ", ".join(source.path) if source.path else f"dataset {source.dataset}"
    if not calibration:
        raise SpecError(f"corpus {name}: {where}: holds no document to calibrate on")
    questions = _questions(Path(source.questions)) if source.questions else ()
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


def _documents(source: Source, paths: list[str] | None, split: str | None) -> Iterator[Document]:
    if source.dataset is not None:
        where = f"dataset {source.dataset}"
        for number, row in enumerate(_dataset_rows(source, split or "train")):
            yield Document(_text(row, source, f"{where}, row {number}"))
        return
    for path in map(Path, paths or []):
        if not path.is_file():
            raise SpecError(f"{path}: no such file")
        if path.suffix in (".txt", ".md"):
            yield Document(_read_text(path))
            continue
        for number, row in _json_rows(path):
            yield Document(_text(row, source, f"{path}, line {number}"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, jsonlines.Reader([line.decode()]).read(type=dict)
            except UnicodeDecodeError as error:
                raise SpecError(f"{path}, line {number}: not UTF-8 text: {error.reason}") from None
            except jsonlines.InvalidLineError as error:
                raise SpecError(f"{path}, line {number}: not a JSON object: {error.line[:60]!r}") from None


def _dataset_rows(source: Source, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(source.dataset, source.config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(f"dataset {source.dataset!r}, split {split!r}: {str(error).splitlines()[0]}") from None


def _text(row: dict[str, Any], source: Source, where: str) -> str:
    if source.template is None:
        return str(_field(row, source.field or "text", where))
    parts = []
    try:
        pieces = list(string.Formatter().parse(source.template))
    except ValueError as error:
        problem = f"template {source.template!r}: {error}; write {{{{ for a brace that names no field"
        raise SpecError(problem) from None
    for literal, name, _, _ in pieces:
        parts.append(literal)
        if name is not None:
            parts.append(str(_field(row, name, where)))
    return "".join(parts)


def _field(row: Any, name: str, where: str) -> Any:
    """A field of a row; dots go into nested mappings and lists: `answers.text.0`."""
    value = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            fields = value.keys() if isinstance(value, dict) else ()
            raise SpecError(f"{where}: has no field {name!r}{nearest(part, fields)}")
    if value is None:
        raise SpecError(f"{where}: field {name!r} is null")
    return value


def _questions(path: Path) -> tuple[Question, ...]:
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    questions = []
    for number, row in _json_rows(path):
        where = f"{path}, line {number}"
        choices, answer = _field(row, "choices", where), _field(row, "answer", where)
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise SpecError(f"{where}: 'answer' must be the index of one of 'choices'")
        if not all(str(choice).strip() for choice in choices):
            raise SpecError(f"{where}: a choice is empty")
        questions.append(Question(str(_field(row, "question", where)), tuple(map(str, choices)), answer))
    return tuple(questions)


@dataclass(frozen=True)
class Batch:
    """Token ids of several documents, padded on the right.

    `documents` are positions in the corpus, `[rows]`; `ids` is `[rows, tokens]`; `lengths`, `[rows]`, counts the real
    tokens. Padding follows the text, so under causal attention no real token ever sees it and no mask is needed.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def tokenize(documents: Sequence[Document], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Token ids of each document with the special tokens that the tokenizer adds, cut at `max_tokens`."""
    if not documents:
        return []
    texts = [document.text for document in documents]
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def make_batches(tokens: Sequence[Sequence[int]], tokens_per_batch: int, pad: int = 0) -> list[Batch]:
    """Documents of similar length together, at most `tokens_per_batch` with padding (but one document at least).

    Documents shorter than two tokens predict nothing and are left out.
    """
    order = sorted((i for i in range(len(tokens)) if len(tokens[i]) >= 2), key=lambda i: (len(tokens[i]), i))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(tokens[index]) * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(index)
        else:
            groups.append([index])
    batches = []
    for group in groups:
        ids = torch.full((len(group), len(tokens[group[-1]])), pad, dtype=torch.int64)
        for row, index in enumerate(group):
            ids[row, : len(tokens[index])] = torch.tensor(tokens[index])
        batches.append(Batch(ids, tuple(len(tokens[i]) for i in group), tuple(group)))
    return batches


def calibration_batches(corpus: Corpus, tokenizer: Any, spec: Spec) -> tuple[list[Document], list[Batch]]:
    """The documents of a corpus that can be profiled and their batches. Raises `SpecError` if none has two tokens."""
    tokens = tokenize(corpus.calibration, tokenizer, spec.calibration.max_tokens)
    usable = [i for i, ids in enumerate(tokens) if len(ids) >= 2]
    if not usable:
        raise SpecError(f"corpus {corpus.name}: every document is shorter than two tokens")
    batches = make_batches([tokens[i] for i in usable], spec.calibration.tokens_per_batch)
    return [corpus.calibration[i] for i in usable], batches
