"""Turn documents into batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.documents import Corpus, Document
from expertprune.errors import CheckpointError, SpecError
from expertprune.spec.schema import Spec


@dataclass(frozen=True)
class Batch:
    """Token ids of several documents, padded on the right.

    `documents` are positions in the corpus, `[rows]`; `ids` is `[rows, tokens]`; `lengths`,
    `[rows]`, counts the real tokens. Padding follows the text, so under causal attention no real
    token ever sees it and no mask is needed.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def tokenize(documents: Sequence[Document], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Token ids of each document, special tokens included, cut at `max_tokens`."""
    if not documents:
        return []
    texts = [document.text for document in documents]
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def make_batches(tokens: Sequence[Sequence[int]], tokens_per_batch: int, pad: int = 0) -> list[Batch]:
    """Batches of documents of similar length.

    A batch has at most `tokens_per_batch` tokens, padding included, or one longer document.
    Documents of fewer than two tokens predict nothing and are left out.
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


def check_ids(batches: Sequence[Batch], rows: int) -> None:
    """Raises `CheckpointError` for a token id that has no row in the model's vocabulary."""
    largest = max((int(batch.ids.max()) for batch in batches), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer gives the token id {largest}, and the model's vocabulary has {rows} rows: this tokenizer is "
            "of another model"
        )


def calibration_batches(corpus: Corpus, tokenizer: Any, spec: Spec) -> tuple[list[Document], list[Batch]]:
    """Documents of two tokens or more, and their batches; raises `SpecError` for none."""
    tokens = tokenize(corpus.calibration, tokenizer, spec.calibration.max_tokens)
    usable = [i for i, ids in enumerate(tokens) if len(ids) >= 2]
    if not usable:
        raise SpecError(f"corpus {corpus.name}: every document is shorter than two tokens")
    batches = make_batches([tokens[i] for i in usable], spec.calibration.tokens_per_batch)
    return [corpus.calibration[i] for i in usable], batches
