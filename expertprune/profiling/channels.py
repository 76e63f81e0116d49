"""Sums over tokens of each channel of an output projection's input."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.artifacts.profile import halved


class ChannelStatistics:
    """Sums over tokens of each channel of an output projection's input, per document and in total.

    They do not depend on how documents are cut into batches. They are summed in float64, because
    the variance of a channel with a large mean is the small difference of large sums.
    """

    def __init__(self, documents: int, channels: int) -> None:
        self.square = torch.zeros(documents, channels)  # mean over the document's tokens
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.square_sum = torch.zeros(channels, dtype=torch.float64)

    def add(self, document: int, values: Tensor, weights: Tensor) -> None:
        """Add a document: `values` `[tokens, channels]`, float32, and the weight of each token."""
        scaled = values * weights.sqrt()[:, None]
        square_sum = torch.linalg.vector_norm(scaled, dim=0, dtype=torch.float64).square().cpu()
        self.square[document] = square_sum / float(weights.sum())
        self.sum += (values * weights[:, None]).sum(0, dtype=torch.float64).cpu()
        self.square_sum += square_sum

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What is stored: the RMS in half precision with its scale, and the totals in float64."""
        return {
            **halved(f"{prefix}.rms", self.square.sqrt()),
            f"{prefix}.sum": self.sum,
            f"{prefix}.square_sum": self.square_sum,
        }
