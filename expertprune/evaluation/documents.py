"""How many bits base and expert need for held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertprune.artifacts.evaluation import DocumentBits
from expertprune.corpora.batches import Tokens, encode, make_batches, rendered
from expertprune.corpora.chat import Rendered
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

    Nothing predicts the first token, so neither it nor its bytes count. Of a conversation, only
    answers count: their tokens with the one that ends each, and the bytes of their text.

    Args:
        expert_tokenizer: the expert's, where it is not the base's. Both then read the same text,
            which ends where the base's tokenizer has `max_tokens`, each in its own tokens;
            predictions over different rows have no KL.
    """
    texts = [rendered(document, tokenizer) for document in documents]
    tokens = encode(texts, tokenizer, max_tokens)
    if expert_tokenizer is not None:
        cut = [text.cut(_end(text, tokenizer, max_tokens)) for text in texts]
        mine = score_alone(base, encode(cut, tokenizer), progress)
        theirs = score_alone(expert, encode(cut, expert_tokenizer), progress)
        return _rows(documents, mine, theirs, np.full(len(cut), math.nan))
    bits, other, kl = (np.zeros(len(documents)) for _ in range(3))
    for batch in make_batches(tokens, TOKENS_PER_BATCH):
        ids, targets = batch.ids.to(base.device), batch.targets.to(base.device)
        mine, theirs = base(input_ids=ids).logits, expert(input_ids=ids).logits
        for row, (index, counted) in enumerate(zip(batch.documents, targets, strict=True)):
            sums = _row_sums(mine[row, :-1][counted], theirs[row, :-1][counted], ids[row, 1:][counted])
            bits[index], other[index], kl[index] = sums
        if progress is not None:
            progress()
    count, size = _counts(tokens)
    return _rows(documents, (bits, count, size), (other, count, size), kl)


def _counts(tokens: Sequence[Tokens]) -> tuple[Floats, Floats]:
    """Number and bytes of the tokens of each document that the loss counts on."""
    return np.array([float(each.predicted) for each in tokens]), np.array([float(each.size) for each in tokens])


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
def score_alone(model: Any, tokens: Sequence[Tokens], progress: Progress | None = None) -> _Alone:
    """One model on documents: bits, number and bytes of the predicted tokens of each."""
    bits = np.zeros(len(tokens))
    for batch in make_batches(tokens, TOKENS_PER_BATCH):
        ids, targets = batch.ids.to(model.device), batch.targets.to(model.device)
        logits = model(input_ids=ids).logits
        for row, (document, counted) in enumerate(zip(batch.documents, targets, strict=True)):
            bits[document] = _row_bits(logits[row, :-1][counted], ids[row, 1:][counted])
        if progress is not None:
            progress()
    return bits, *_counts(tokens)


def _end(text: Rendered, tokenizer: Any, max_tokens: int) -> int:
    """Characters of a rendered text up to where it is cut."""
    plain = text.answers is None
    offsets = tokenizer(text.text, add_special_tokens=plain, return_offsets_mapping=True)["offset_mapping"]
    return len(text.text) if len(offsets) <= max_tokens else max(end for _, end in offsets[:max_tokens])


def _row_bits(logits: Tensor, targets: Tensor) -> float:
    """Bits of one document's predicted tokens; logits are `[tokens, vocabulary]`."""
    total = 0.0
    for first in range(0, logits.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        total += float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
    return total / math.log(2)


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
