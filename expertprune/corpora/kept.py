"""Documents kept in the store: rows of data sets, and what a base has generated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.corpora.documents import Document
from expertprune.corpora.messages import Conversation
from expertprune.files import write_file


@dataclass(frozen=True)
class Kept:
    """Documents by split, and where they come from."""

    about: Mapping[str, Any]
    splits: Mapping[str, Sequence[Document]]

    def save(self, path: Path) -> None:
        """Write them as JSON lines, whole or not at all: what they are, then a document a line."""
        lines: list[dict[str, Any]] = [{"about": dict(self.about), "splits": list(self.splits)}]
        for split, documents in self.splits.items():
            lines += [{"split": split, **_row(document)} for document in documents]
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    @classmethod
    def load(cls, path: Path) -> Kept | None:
        """What `save` wrote; `None` if it is missing or damaged, so that it is made again."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            splits: dict[str, list[Document]] = {split: [] for split in header["splits"]}
            for row in rows:
                splits[row["split"]].append(_document(row))
            return cls(header["about"], splits)
        return None


def _row(document: Document) -> dict[str, Any]:
    if document.conversation is None:
        return {"text": document.text}
    return {"conversation": json.loads(document.conversation.data)}


def _document(row: dict[str, Any]) -> Document:
    if "text" in row:
        return Document(row["text"])
    return Document.of(Conversation.of(row["conversation"]["messages"], row["conversation"]["tools"]))
