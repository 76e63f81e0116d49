"""How many bits base and expert need for held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertprune.artifacts.evaluation import DocumentBits
from expertprune.corpora.batches import make_batches, tokenize
from expertprune.corpora.documents import Document
from expertprune.evaluation.retention import Floats
from expertprune.progress import Progress

TOKENS_PER_BATCH = 1024
_Alone = tuple[Floats, Floats, Floats]  # bits, tokens and bytes of one model, `[documents]` each
_CHUNK = 256  # positions whose distributions are held in float32 at a time


@torch.inference_mode()
def score_documents(
    base: Any,
    expert: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    progress: Progress | None = None,
    expert_tokenizer: Any = None,
) -> list[DocumentBits]:
    """Bits of both models and `KL(base ‖ expert)` in bits, summed over each document's tokens.

    Nothing predicts the first token, so neither it nor its bytes count.

    Args:
        expert_tokenizer: the expert's, where it is not the base's. Both then read the same text,
            which ends where the base's tokenizer has `max_tokens`, each in its own tokens;
            predictions over different rows have no KL.
    """
    if expert_tokenizer is not None:
        cut = [Document(document.text[: _end(tokenizer, document, max_tokens)]) for document in documents]
        mine = score_alone(base, tokenizer, cut, progress)
        theirs = score_alone(expert, expert_tokenizer, cut, progress)
        return _rows(documents, mine, theirs, np.full(len(cut), math.nan))
    tokens = tokenize(documents, tokenizer, max_tokens)
    bits, other, kl, count, size = (np.zeros(len(documents)) for _ in range(5))
    for batch in make_batches(tokens, TOKENS_PER_BATCH):
        ids = batch.ids.to(base.device)
        mine, theirs = base(input_ids=ids).logits, expert(input_ids=ids).logits
        for row, (index, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            sums = _row_sums(mine[row, : length - 1], theirs[row, : length - 1], ids[row, 1:length])
            bits[index], other[index], kl[index] = sums
            count[index] = length - 1
            size[index] = _predicted_bytes(tokenizer, documents[index], max_tokens)
        if progress is not None:
            progress()
    return _rows(documents, (bits, count, size), (other, count, size), kl)


def _rows(documents: Sequence[Document], base: _Alone, expert: _Alone, kl: Floats) -> list[DocumentBits]:
    return [
        DocumentBits(
            digest=document.digest,
            tokens=int(base[1][i]),
            bytes=int(base[2][i]),
            base_bits=base[0][i],
            expert_bits=expert[0][i],
            kl_bits=kl[i],
            expert_tokens=int(expert[1][i]),
            expert_bytes=int(expert[2][i]),
        )
        for i, document in enumerate(documents)
    ]


@torch.inference_mode()
def score_alone(model: Any, tokenizer: Any, documents: Sequence[Document], progress: Progress | None = None) -> _Alone:
    """One model on whole documents: bits, number and bytes of the predicted tokens of each."""
    bits, tokens, size = (np.zeros(len(documents)) for _ in range(3))
    encoded = [list(ids) for ids in tokenizer([document.text for document in documents])["input_ids"]]
    for batch in make_batches(encoded, TOKENS_PER_BATCH):
        ids = batch.ids.to(model.device)
        logits = model(input_ids=ids).logits
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            bits[document] = _row_bits(logits[row, : length - 1], ids[row, 1:length])
            tokens[document] = length - 1
            size[document] = _predicted_bytes(tokenizer, documents[document], len(encoded[document]))
        if progress is not None:
            progress()
    return bits, tokens, size


def _end(tokenizer: Any, document: Document, max_tokens: int) -> int:
    """Characters of a document up to where it is cut."""
    offsets = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    return len(document.text) if len(offsets) <= max_tokens else max(end for _, end in offsets[:max_tokens])


def _row_bits(logits: Tensor, targets: Tensor) -> float:
    """Bits of one document's predicted tokens; logits are `[tokens, vocabulary]`."""
    total = 0.0
    for first in range(0, logits.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        total += float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
    return total / math.log(2)


def _predicted_bytes(tokenizer: Any, document: Document, max_tokens: int) -> int:
    """UTF-8 bytes of the document's text after its first token, up to where it was cut."""
    if not tokenizer.is_fast:  # only fast tokenizers know where a token's text stands
        ids = tokenize([document], tokenizer, max_tokens)[0]
        return len(tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
    encoded = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    first, last = encoded[0][1], len(document.text)
    if len(encoded) > max_tokens:
        last = max(end for _, end in encoded[:max_tokens])
    return len(document.text[first:last].encode())


def _row_sums(base: Tensor, expert: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """One document's bits under base and expert, and KL; logits are `[tokens, vocabulary]`."""
    totals = [0.0, 0.0, 0.0]
    for first in range(0, base.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        p = torch.log_softmax(base[part].float(), -1)
        q = torch.log_softmax(expert[part].float(), -1)
        index = targets[part, None]
        totals[0] -= float(p.gather(1, index).double().sum())
        totals[1] -= float(q.gather(1, index).double().sum())
        totals[2] += float((p.exp() * (p - q)).sum(-1).double().sum())
    bits = 1 / math.log(2)
    return totals[0] * bits, totals[1] * bits, totals[2] * bits
