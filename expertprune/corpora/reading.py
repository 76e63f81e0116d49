"""Read files and data sets into documents and questions."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from expertprune.corpora.documents import Document, Question
from expertprune.corpora.messages import read_conversation, read_exchange
from expertprune.corpora.tables import LONGEST, csv_rows, json_rows, parquet_rows
from expertprune.errors import SpecError, first_line, under
from expertprune.files import check_values, not_a_file, read_text
from expertprune.registry import nearest
from expertprune.spec.sources import Source

SHUFFLED = 2048  # rows of a data set that are shuffled at a time; their texts must fit into memory
_NO_NETWORK = "; with a network, its rows are kept in the store for later runs without; or give files as 'path'"
_KINDS = {list: "a list", dict: "a mapping", bool: "a boolean", int: "a number", float: "a number", NoneType: "null"}


def read_files(source: Source, paths: Sequence[str]) -> Iterator[Document]:
    """The documents of JSONL, parquet, CSV and text files, in order.

    Raises:
        SpecError: naming file and line (row, in a parquet file).
    """
    for path in map(Path, paths):
        if problem := not_a_file(path):
            raise SpecError(f"{path}: {problem}")
        ending = path.suffix.lower()
        if ending in _UNREAD:
            raise SpecError(f"{path}: {ending} files are not read; give JSONL, parquet, CSV, .txt or .md")
        if ending in _TEXT:
            if source.chat:
                raise SpecError(f"{path}: a text file has no fields, and so no conversations")
            if source.template is not None and all(Path(each).suffix.lower() in _TEXT for each in paths):
                raise SpecError(f"{path}: a text file has no fields, and so nothing for a template; leave template out")
            yield Document(read_text(path, LONGEST, SpecError).removeprefix("\ufeff"))
            continue
        place = "row" if ending == ".parquet" else "line"
        for number, row in _ROWS.get(ending, json_rows)(path):
            yield read_document(row, source, f"{path}, {place} {number}")


def read_document(row: dict[str, Any], source: Source, where: str) -> Document:
    """The text or the conversation of a row. Raises `SpecError` with `where` the row stands."""
    document = _document(row, source, where)
    if len(document.text) > LONGEST:
        raise SpecError(f"{where}: longer than {LONGEST / 2**20:g} MiB; split the document")
    return document


def _document(row: dict[str, Any], source: Source, where: str) -> Document:
    if not source.chat:
        return Document(_text(row, source, where))
    if source.messages is not None:
        tools = _field(row, source.tools, where) if source.tools is not None else None
        conversation = read_conversation(_field(row, source.messages, where), tools, where, _unanswered(source))
    else:
        completion = [] if _lacks_answer(row, source) else _side(row, str(source.completion), where)
        conversation = read_exchange(_side(row, str(source.prompt), where), completion, where, _unanswered(source))
    return Document(conversation.text) if source.documents == "raw" else Document.of(conversation)


def _side(row: dict[str, Any], name: str, where: str) -> Any:
    """A prompt or a completion: text, or a list of messages."""
    value = _field(row, name, where)
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        return value
    raise _no_text(value, name, where)


def _lacks_answer(row: dict[str, Any], source: Source) -> bool:
    """Whether a row has no completion, and need not have one."""
    name = source.completion
    return name is None or (_unanswered(source) and not row.get(name if name in row else name.partition(".")[0]))


def _unanswered(source: Source) -> bool:
    """Whether conversations need no answer, because the base is to give one."""
    return source.generate is not None and source.generate.from_ == "prompts"


def check_builder(dataset: Any) -> None:
    """Raises `SpecError` for the data set builder that unpickles files, as some versions of `datasets` do."""
    if dataset == "pandas":
        raise SpecError("'pandas' reads pickles, which can run any code: convert them to parquet, and take 'parquet'")


def read_dataset(source: Source, split: str, seed: int) -> Iterator[Document]:
    """The documents of a Hugging Face data set, streamed. Raises `SpecError` naming data set and
    split.

    Args:
        source: its `revision` is a commit where the data set is on the hub (see `pinned`).
        seed: shuffles the rows as `IterableDataset.shuffle` does: the order of the shards, and
            `SHUFFLED` rows at a time.
    """
    import datasets

    where = f"dataset {source.dataset!r}, split {split!r}"
    with under(where):
        check_builder(source.dataset)
    try:
        files = {} if source.data_files is None else {"data_files": source.data_files}
        rows = datasets.load_dataset(
            source.dataset, source.config, split=split, revision=source.revision, streaming=True, **files
        )
        for row in rows.shuffle(seed=seed, buffer_size=SHUFFLED):
            yield read_document(row, source, where)
    except SpecError:
        raise
    except Exception as error:  # of the libraries for HTTP and for the files' formats
        raise SpecError(f"{where}: {first_line(error)}{_NO_NETWORK if on_hub(source) else ''}") from None


def on_hub(source: Source) -> bool:
    """Whether a source's data set is on the hub, and no folder or files of this machine."""
    if source.dataset is None or source.is_local or Path(source.dataset).exists():
        return False
    return "/" in source.dataset or any("://" in path for paths in (source.data_files or {}).values() for path in paths)


def pinned(source: Source) -> Source:
    """The source with the commit of its data set, where the hub says it."""
    from huggingface_hub import HfApi

    if not on_hub(source) or source.revision is not None:
        return source
    try:
        commit = HfApi().dataset_info(str(source.dataset), timeout=20).sha
    except Exception:  # of the HTTP library, which changes; reading says what is wrong
        return source
    return source.model_copy(update={"revision": commit})


def _text(row: dict[str, Any], source: Source, where: str) -> str:
    """The text of a row: its `field`, or `template` with the fields that stand in braces."""
    if source.field is None and source.template is None and "text" not in row:
        raise SpecError(f"{where}: has no field 'text'{nearest('text', row)} (name it as 'field')")
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
    raise _no_text(value, name, where)


def _no_text(value: Any, name: str, where: str) -> SpecError:
    """What is wrong with a field that is no text, and which field inside it is."""
    inside = max(_strings(value, name), default=("", ""), key=lambda found: len(found[1]))[0]
    fix = f"name a field inside it, such as {inside}" if inside else "name a field that holds text"
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    return SpecError(f"{where}: field {name!r} is {kind}, not text; {fix}")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The strings inside nested lists and mappings, each behind its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(each, f"{path}.{key}")


def _field(row: Any, name: str, where: str) -> Any:
    """A field of a row; dots lead into nested mappings and lists: `answers.text.0`, unless a field has that name.

    Raises:
        SpecError: there is none, or nothing can compute with its value. What other fields hold does not matter.
    """
    value = _found(row, name, where)
    check_values({name: value}, where, SpecError, any_integer=True)
    return value


def _found(row: Any, name: str, where: str) -> Any:
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            fields = value.keys() if isinstance(value, dict) else ()
            raise SpecError(f"{where}: has no field {name!r}{nearest(part, fields)}")
    return value


_ROWS = {".csv": csv_rows, ".parquet": parquet_rows}
_TEXT = (".txt", ".md")
_UNREAD = (".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".xlsx", ".arrow")


def read_questions(path: Path) -> tuple[Question, ...]:
    """The multiple-choice questions of a JSONL file. Raises `SpecError` naming file and line."""
    if problem := not_a_file(path):
        raise SpecError(f"{path}: {problem}")
    questions = []
    for number, row in json_rows(path):
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
        if len({choice.strip() for choice in written}) < len(written):
            raise SpecError(f"{where}: two choices are the same, of which a model can prefer neither; take one out")
        asked = _written(_field(row, "question", where), "question", where)
        if not asked.strip():
            raise SpecError(f"{where}: the question is empty")
        questions.append(Question(asked, written, answer))
    return tuple(questions)
