"""Read files and data sets into documents and questions."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from expertprune.corpora.documents import Document, Question
from expertprune.errors import SpecError, first_line
from expertprune.files import not_a_file, opened, parse_json, read_text
from expertprune.registry import nearest
from expertprune.spec.schema import Source

LONGEST = 64 * 2**20  # bytes of one document
SHUFFLED = 2048  # rows of a data set that are shuffled at a time; their texts must fit into memory
_KINDS = {list: "a list", dict: "a mapping", bool: "a boolean", int: "a number", float: "a number", NoneType: "null"}


def read_files(source: Source, paths: Sequence[str]) -> Iterator[Document]:
    """The documents of JSONL and text files, in order. Raises `SpecError` naming file and line."""
    for path in map(Path, paths):
        if problem := not_a_file(path):
            raise SpecError(f"{path}: {problem}")
        if path.suffix in (".txt", ".md"):
            yield Document(read_text(path, LONGEST, SpecError))
            continue
        for number, row in _json_rows(path):
            yield Document(_text(row, source, f"{path}, line {number}"))


def read_dataset(source: Source, split: str, seed: int) -> Iterator[Document]:
    """The documents of a Hugging Face data set, streamed. Raises `SpecError` naming data set and
    split.

    Args:
        seed: shuffles the rows as `IterableDataset.shuffle` does: the order of the shards, and
            `SHUFFLED` rows at a time.
    """
    import datasets

    where = f"dataset {source.dataset!r}, split {split!r}"
    try:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=split, revision=source.revision, streaming=True
        )
        for row in rows.shuffle(seed=seed, buffer_size=SHUFFLED):
            yield Document(_text(row, source, where))
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(f"{where}: {first_line(error)}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
                if len(line) > LONGEST:
                    raise SpecError(f"{path}, line {number}: longer than {LONGEST / 2**20:g} MiB; split the document")
                if line.strip():
                    yield number, _row(line, f"{path}, line {number}")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None


def _row(line: bytes, where: str) -> dict[str, Any]:
    """A line of a JSONL file."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 text: {error.reason}") from None
    row = parse_json(text.removeprefix("\ufeff"), where, SpecError, any_integer=True)  # some editors begin files so
    if not isinstance(row, dict):
        raise SpecError(f"{where}: not a JSON object: {text[:60]!r}")
    return row


def _text(row: dict[str, Any], source: Source, where: str) -> str:
    """The text of a row: its `field`, or `template` with the fields that stand in braces."""
    if source.template is None:
        return _string(row, source.field or "text", where)
    parts = []
    try:
        pieces = list(string.Formatter().parse(source.template))
    except ValueError as error:
        problem = f"template {source.template!r}: {error}; write {{{{ for a brace that names no field"
        raise SpecError(problem) from None
    for literal, name, form, conversion in pieces:
        parts.append(literal)
        if form or conversion:
            raise SpecError(
                f"template {source.template!r}: {name}: formats, such as {form or conversion!r} here, are not "
                "supported; name the field alone"
            )
        if name is not None:
            parts.append(_written(_field(row, name, where), name, where))
    return "".join(parts)


def _string(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a string."""
    value = _field(row, name, where)
    if isinstance(value, int | float):
        template = f"template: '{{{name}}}' would write it as text"
        raise SpecError(f"{where}: field {name!r} is {_KINDS[type(value)]}, not text; {template}")
    return _written(value, name, where)


def _written(value: Any, name: str, where: str) -> str:
    """A string, or a number or boolean as JSON writes it; raises `SpecError` for others."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return json.dumps(value)
    inside = max(_strings(value, name), default=("", ""), key=lambda found: len(found[1]))[0]
    fix = f"name a field inside it, such as {inside}" if inside else "name a field that holds text"
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    raise SpecError(f"{where}: field {name!r} is {kind}, not text; {fix}")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The strings inside nested lists and mappings, each behind its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(each, f"{path}.{key}")


def _field(row: Any, name: str, where: str) -> Any:
    """A field of a row; dots lead into nested mappings and lists: `answers.text.0`."""
    value = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            fields = value.keys() if isinstance(value, dict) else ()
            raise SpecError(f"{where}: has no field {name!r}{nearest(part, fields)}")
    return value


def read_questions(path: Path) -> tuple[Question, ...]:
    """The multiple-choice questions of a JSONL file. Raises `SpecError` naming file and line."""
    if problem := not_a_file(path):
        raise SpecError(f"{path}: {problem}")
    questions = []
    for number, row in _json_rows(path):
        where = f"{path}, line {number}"
        choices, answer = _field(row, "choices", where), _field(row, "answer", where)
        whole = isinstance(answer, int) and not isinstance(answer, bool)
        if not isinstance(choices, list) or not whole or not 0 <= answer < len(choices):
            raise SpecError(f"{where}: 'answer' must be the index of one of 'choices'")
        written = tuple(_written(choice, f"choices.{i}", where) for i, choice in enumerate(choices))
        if len(written) < 2:
            raise SpecError(f"{where}: a question needs two choices or more")
        if not all(choice.strip() for choice in written):
            raise SpecError(f"{where}: a choice is empty")
        questions.append(Question(_written(_field(row, "question", where), "question", where), written, answer))
    return tuple(questions)
