"""Weigh the text of several corpora, whatever their number of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from expertprune.corpora.batches import Batch, CalibrationText, Tokens


def shared_out(
    texts: Sequence[CalibrationText], repaired: Sequence[Sequence[Batch | None]], shares: Sequence[float]
) -> list[Batch]:
    """The batches of several corpora, so scaled that each corpus has its share of the weight.

    A token of corpus `c`, whose weights sum to `T_c`, is scaled by `shares_c · T / T_c`, with `T` the
    sum over all corpora. A window of several corpora runs once, and has the sum of their scales.

    Args:
        texts: of each corpus.
        repaired: the batches of each corpus that run here, each window once (see `each_once`).
        shares: of each corpus; they sum to 1.
    """
    own = [float(sum(batch.weights.sum() for batch in text.batches)) for text in texts]
    scales: defaultdict[Tokens, float] = defaultdict(float)
    for text, share, tokens in zip(texts, shares, own, strict=True):
        for window in text.tokens:
            scales[window] += share * sum(own) / tokens
    return [
        replace(batch, scales=tuple(scales[text.tokens[document]] for document in batch.documents))
        for text, each in zip(texts, repaired, strict=True)
        for batch in each
        if batch is not None
    ]
