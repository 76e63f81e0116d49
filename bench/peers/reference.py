"""Two yardsticks that look at no text: chance, and the size of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from expertprune.corpora.batches import Batch

from .common import Network, Pruned, without_lowest


def random(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """Neurons drawn by chance, the same number in each layer."""
    network = Network.of(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(shape.ffn, generator=generator).to(model.device) for shape in network.shapes]
    return network.cut_each([without_lowest(scores, network.wanted(fraction)) for scores in drawn])


@torch.no_grad()
def magnitude(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """Neurons whose weights have the smallest Frobenius norm, the same number in each layer.

    `s_j = sqrt(‖W_gate[j]‖² + ‖W_up[j]‖² + ‖W_down[:, j]‖²)`, biases of the neuron included where
    there are any.
    """
    network = Network.of(model)
    scores = [network.unit_sums(index, torch.square).sqrt() for index in range(len(network.layers))]
    return network.cut_each([without_lowest(score, network.wanted(fraction)) for score in scores])
