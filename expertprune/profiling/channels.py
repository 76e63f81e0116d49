"""Sums over tokens of each channel of an output projection's input."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.artifacts.profile import halved
from expertprune.corpora.batches import Placed


class ChannelStatistics:
    """Sums over tokens of each channel of an output projection's input, per document and in total.

    They do not depend on how documents are cut into batches. The variance of a channel with a large
    mean is the small difference of large sums. So each document gives its mean and its squares
    around that mean, in float32, and these are added in float64. Sums stay on the device until the
    layer ends, so `add` waits for nothing, and it takes as many kernels for one document as for
    many.
    """

    def __init__(self, documents: int, channels: int, device: torch.device | None = None) -> None:
        self.square = torch.zeros(documents, channels, device=device)  # mean over the document's tokens
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, placed: Placed, values: Tensor) -> None:
        """Add the documents of a batch; `values` is `[rows, tokens, channels]`."""
        values, totals = values.float(), placed.totals[:, None]
        means = over_tokens(placed.weights, values) / totals
        around = over_tokens(placed.weights, (values - means[:, None]).square_())
        self.square.index_copy_(0, placed.documents, around / totals + means.square())
        means, totals = means.double(), totals.double()
        self.sum += (totals * means).sum(0)
        self.square_sum += (around.double() + totals * means.square()).sum(0)

    def sums(self, prefix: str) -> dict[str, Tensor]:
        """What is added over the members of a team, in place."""
        return {f"{prefix}.square": self.square, f"{prefix}.sum": self.sum, f"{prefix}.square_sum": self.square_sum}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What is stored: the RMS in half precision with its scale, and the totals in float64."""
        return {
            **halved(f"{prefix}.rms", self.square.sqrt().cpu()),
            f"{prefix}.sum": self.sum.cpu(),
            f"{prefix}.square_sum": self.square_sum.cpu(),
        }


def over_tokens(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sums over the tokens of each row: `[rows, tokens]` and `[rows, tokens, n]` to `[rows, n]`, float32."""
    return torch.bmm(weights[:, None], values)[:, 0]
