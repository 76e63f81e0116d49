"""Gradients inside each layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.models import layers as layerwise
from expertprune.profiling.gradients import MaskGradients, count_documents, mask_graph
from expertprune.progress import Progress
from expertprune.units import LayerShape

# --- each layer alone -----------------------------------------------------------------------------------------------


@torch.no_grad()
def regional_pass(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    batches: Sequence[Batch],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Gradients of the mean norm of each layer's output with respect to the masks of that layer's units.

    Forward layer by layer as a profile is; each layer's graph begins at its output projections and ends at its output, so
    memory is that of the forward pass and one layer.
    """
    documents = count_documents(batches)
    stream = layerwise.start(model, family, batches)
    result: dict[str, Tensor] = {}
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        gradients = MaskGradients(shapes[index], documents)
        for number, batch in enumerate(batches):
            inputs: dict[str, Tensor] = {}
            with mask_graph(layer, family, inputs, leaves=True):
                output = stream.run(layer, index, number)
                norms = torch.linalg.vector_norm(output.float(), dim=-1)
                means = [norms[row, :length].mean() for row, length in enumerate(batch.lengths)]
                ffn, heads = torch.autograd.grad(torch.stack(means).sum(), [inputs["ffn"], inputs["heads"]])
            stream.hidden[number] = output.detach()
            gradients.add(batch, heads=(inputs["heads"].detach(), heads), ffn=(inputs["ffn"].detach(), ffn))
        result |= gradients.tensors(index)
        if progress is not None:
            progress()
    return result
