"""Read files and data sets into documents and questions."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonlines

from expertprune.corpora.documents import Document, Question
from expertprune.errors import SpecError
from expertprune.registry import nearest
from expertprune.spec.schema import Source


def read_documents(source: Source, paths: list[str] | None, split: str | None) -> Iterator[Document]:
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


def read_questions(path: Path) -> tuple[Question, ...]:
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
