"""Gradients inside each layer alone."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch
from expertprune.models.passes import real_tokens
from expertprune.profiling.gradients import MaskGradients
from expertprune.profiling.observation import Observation
from expertprune.units import LayerShape


class RegionalGradients:
    """Gradients of the mean norm of a layer's output with respect to its own units' masks.

    The layer's graph begins at its output projections (`leaves` of `units_observed`) and ends at
    its output, so it takes the memory of one layer's graph of one batch.
    """

    def __init__(self, shape: LayerShape, documents: int, device: torch.device) -> None:
        self._gradients = MaskGradients(shape, documents, device)

    def add(self, batch: Batch, seen: Observation, before: Tensor, after: Tensor) -> None:
        """Add one batch; `after` is the layer's output with its graph, `[rows, tokens, hidden]`."""
        placed = batch.on(after.device)
        with torch.enable_grad():
            norms = torch.linalg.vector_norm(real_tokens(batch, after).float(), dim=-1)
            total = norms @ real_tokens(batch, placed.weights)
        ffn, heads = torch.autograd.grad(total, [seen.inputs["ffn"], seen.inputs["heads"]])
        values, weights = seen.values(), 1 / placed.totals
        self._gradients.add(batch, weights, ffn=(values["ffn"], ffn), heads=(values["heads"], heads))

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place."""
        return self._gradients.sums()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        return self._gradients.tensors(index)
