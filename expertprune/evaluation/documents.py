"""How many bits base and expert need for held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expertprune.artifacts.evaluation import DocumentBits
from expertprune.corpora.batches import tokenize
from expertprune.corpora.documents import Document
from expertprune.evaluation.reading import Asked, Compared, Floats, Reading, bits, compare, read
from expertprune.models.passes import TextRun
from expertprune.progress import Progress


def asked_of(documents: Sequence[Document], tokenizer: Any, max_tokens: int | None) -> list[Asked]:
    """Each document up to `max_tokens`, of which all but the first token is asked for.

    Nothing predicts the first token, so neither it nor its bytes count.
    """
    if max_tokens is None:
        encoded = tokenizer([document.text for document in documents])["input_ids"] if documents else []
        tokens = [list(ids) for ids in encoded]
    else:
        tokens = tokenize(documents, tokenizer, max_tokens)
    return [
        Asked(ids, 1, _predicted_bytes(tokenizer, document, ids) if len(ids) > 1 else 0)
        for document, ids in zip(documents, tokens, strict=True)
    ]


def cut_at(documents: Sequence[Document], tokenizer: Any, max_tokens: int) -> list[Document]:
    """The text of each document up to where a tokenizer has `max_tokens`, for another to read."""
    return [Document(document.text[: _end(tokenizer, document, max_tokens)]) for document in documents]


def document_rows(documents: Sequence[Document], reading: Reading, found: Compared) -> list[DocumentBits]:
    """What both models need for each document, where they have the same tokens."""
    return _rows(documents, reading, found.base, reading, found.expert, found)


def document_rows_apart(
    documents: Sequence[Document], base: Reading, base_bits: Floats, expert: Reading, expert_bits: Floats
) -> list[DocumentBits]:
    """The same where base and expert read other tokens; predictions over different rows have no KL."""
    return _rows(documents, base, base_bits, expert, expert_bits, None)


def _rows(
    documents: Sequence[Document],
    base: Reading,
    base_bits: Floats,
    expert: Reading,
    expert_bits: Floats,
    found: Compared | None,
) -> list[DocumentBits]:
    return [
        DocumentBits(
            digest=document.digest,
            tokens=mine.tokens,
            bytes=mine.size,
            base_bits=float(base_bits[i]),
            expert_bits=float(expert_bits[i]),
            kl_bits=float(found.kl[i]) if found is not None else math.nan,
            agreed=int(found.agreed[i]) if found is not None else None,
            expert_tokens=theirs.tokens,
            expert_bytes=theirs.size,
        )
        for i, (document, mine, theirs) in enumerate(zip(documents, base.sequences, expert.sequences, strict=True))
    ]


def score_documents(
    base: TextRun,
    expert: TextRun,
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[DocumentBits]:
    """Bits of both models, and `KL(base ‖ expert)` in bits, summed over each document's tokens.

    Args:
        base, expert: models with the same tokens; their own batches do not matter.
        progress: called after each layer and each batch.
    """
    reading = Reading.of(asked_of(documents, tokenizer, max_tokens))
    mine, theirs = (read(reading, model, progress) for model in (base, expert))
    return document_rows(documents, reading, compare(reading, mine, theirs, progress))


def score_alone(model: TextRun, tokenizer: Any, documents: Sequence[Document]) -> tuple[Floats, Floats, Floats]:
    """One model on whole documents: bits, number and bytes of the predicted tokens of each."""
    reading = Reading.of(asked_of(documents, tokenizer, None))
    return bits(reading, read(reading, model)), reading.tokens, reading.sizes


def _end(tokenizer: Any, document: Document, max_tokens: int) -> int:
    """Characters of a document up to where it is cut."""
    offsets = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    return len(document.text) if len(offsets) <= max_tokens else max(end for _, end in offsets[:max_tokens])


def _predicted_bytes(tokenizer: Any, document: Document, ids: list[int]) -> int:
    """UTF-8 bytes of the document's text after its first token, up to the last one of `ids`."""
    if not tokenizer.is_fast:  # only fast tokenizers know where a token's text stands
        return len(tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
    offsets = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    first, last = offsets[0][1], len(document.text)
    if len(offsets) > len(ids):
        last = max(end for _, end in offsets[: len(ids)])
    return len(document.text[first:last].encode())
