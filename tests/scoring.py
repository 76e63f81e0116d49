"""Two models on documents, without an expert's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertprune.artifacts.evaluation import DocumentBits
from expertprune.corpora.batches import encode
from expertprune.corpora.documents import Document
from expertprune.evaluation.documents import document_rows, texts_of
from expertprune.evaluation.reading import Reading, compare, read
from expertprune.models.passes import TextRun
from expertprune.progress import Progress


def score_documents(
    base: TextRun,
    expert: TextRun,
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[DocumentBits]:
    """Bits of both models, and `KL(base ‖ expert)` in bits, summed over each document's tokens.

    Nothing predicts the first token, so neither it nor its bytes count. Of a conversation, only
    answers count: their tokens with the one that ends each, and the bytes of their text.

    Args:
        base, expert: models with the same tokens; their own batches do not matter.
        progress: called after each layer and each batch.
    """
    reading = Reading.of(encode(texts_of(documents, tokenizer), tokenizer, max_tokens))
    mine, theirs = (read(reading, model, progress) for model in (base, expert))
    return document_rows(documents, reading, compare(reading, mine, theirs, progress))
