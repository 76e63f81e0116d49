"""Sums over tokens of each channel of an output projection's input."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.artifacts.profile import halved


class ChannelStatistics:
    """Sums over tokens of each channel of an output projection's input, per document and in total.

    They do not depend on how documents are cut into batches. They are summed in float64, because
    the variance of a channel with a large mean is the small difference of large sums. They stay on
    the device until the layer ends, so that `add` waits for nothing.
    """

    def __init__(self, documents: int, channels: int, device: torch.device | None = None) -> None:
        self.square = torch.zeros(documents, channels, device=device)  # mean over the document's tokens
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, document: int, values: Tensor, weights: Tensor | None = None) -> None:
        """Add a document.

        Args:
            values: `[tokens, channels]`, float32.
            weights: of its tokens, `[tokens]`; default: 1 each.
        """
        total: Tensor | int = values.shape[0]
        scaled = values
        if weights is not None:
            total, scaled, values = weights.sum(), values * weights.sqrt()[:, None], values * weights[:, None]
        square_sum = torch.linalg.vector_norm(scaled, dim=0, dtype=torch.float64).square()
        self.square[document] = square_sum / total
        self.sum += values.sum(0, dtype=torch.float64)
        self.square_sum += square_sum

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


def second_moments(values: Tensor) -> Tensor:
    """`Σ_t x_t x_tᵀ` of several groups, float32: `[groups, tokens, n]` to `[groups, n, n]`.

    On a GPU, products of half precision are multiplied as they are and summed in float32.
    """
    if values.is_cuda and values.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(values.transpose(1, 2), values, out_dtype=torch.float32)
    values = values.float()
    return values.transpose(1, 2) @ values
