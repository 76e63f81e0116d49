"""Documents kept in the store: rows of data sets, and what a base has generated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from expertprune.corpora.documents import Document
from expertprune.corpora.messages import read_conversation
from expertprune.corpora.tables import json_rows
from expertprune.errors import SpecError
from expertprune.files import as_model, write_file

# Facts of where documents come from, by name, such as `dataset` and `revision`; for people who read the file.
Facts = dict[str, str | int | float | None]


@dataclass(frozen=True)
class KeptDocuments:
    """Documents by split, and where they come from."""

    about: Facts
    splits: Mapping[str, Sequence[Document]]

    def save(self, path: Path) -> None:
        """Write them as JSON lines, whole or not at all: what they are, then a document a line."""
        lines: list[dict[str, Any]] = [{"about": self.about, "splits": list(self.splits)}]
        for split, documents in self.splits.items():
            lines += [{"split": split, **_row(document)} for document in documents]
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    @classmethod
    def load(cls, path: Path) -> KeptDocuments | None:
        """What `save` wrote; `None` if it is missing or damaged, so that it is made again."""
        with contextlib.suppress(SpecError):
            rows = json_rows(path)
            _, header = next(rows, (0, {}))
            about = as_model(header, _Header, str(path), SpecError)
            splits: dict[str, list[Document]] = {split: [] for split in about.splits}
            for number, row in rows:
                line = as_model(row, _Line, f"{path}, line {number}", SpecError)
                if line.split not in splits:
                    return None
                splits[line.split].append(_document(line))
            return cls(about.about, splits)
        return None


class _Header(BaseModel):
    """The first line."""

    about: Facts
    splits: list[str]


class _Messages(BaseModel):
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    verbatim: bool = False


class _Line(BaseModel):
    """Every other line: a text or a conversation."""

    split: str
    text: str | None = None
    conversation: _Messages | None = None


def _document(line: _Line) -> Document:
    if line.conversation is None:
        return Document(line.text or "")
    told = line.conversation
    read = read_conversation(told.messages, told.tools, line.split, unanswered=True)
    return Document.of(replace(read, verbatim=told.verbatim))


def _row(document: Document) -> dict[str, Any]:
    told = document.conversation
    if told is None:
        return {"text": document.text}
    return {"conversation": {"messages": told.messages, "tools": told.tools, "verbatim": told.verbatim}}
