"""Gradients inside each layer alone."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.models.passes import TextRun
from expertprune.profiling.gradients import MaskGradients, mask_graph
from expertprune.progress import Progress


@torch.no_grad()
def regional_pass(text: TextRun, progress: Progress | None = None) -> dict[str, Tensor]:
    """Gradients of the mean norm of each layer's output with respect to its own units' masks.

    Each layer's graph begins at its output projections and ends at its output, so the pass takes
    the memory of the forward pass and one layer's graph.
    """
    stream = text.start()
    result: dict[str, Tensor] = {}
    for index, layer in text.layers(progress):
        gradients = MaskGradients(text.shapes[index], text.documents)
        with mask_graph(layer, text.family, leaves=True) as inputs:
            for step in stream.advance(layer, index):
                weights = step.batch.weights
                norms = torch.linalg.vector_norm(step.real(step.after).float(), dim=-1)
                total = norms @ step.real(weights).to(norms.device)
                ffn, heads = torch.autograd.grad(total, [inputs["ffn"], inputs["heads"]])
                pairs = {"ffn": (inputs["ffn"].detach(), ffn), "heads": (inputs["heads"].detach(), heads)}
                gradients.add(step.batch, (1 / weights.sum(1)).tolist(), **pairs)
        result |= gradients.tensors(index)
    return result
