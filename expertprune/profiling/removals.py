"""Greedy removal errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.models import layers as layerwise
from expertprune.progress import Progress
from expertprune.relevance.obs import greedy_removal
from expertprune.units import LayerShape

# --- removals -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def removal_pass(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    batches: Sequence[Batch],
    token_weights: list[list[Tensor]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The greedy removal errors of every unit (see `relevance.obs`), from second moments of the dense layers' inputs.

    Args:
        token_weights: per layer and batch, `[rows, tokens]`, such as `gradient_energies`, with which the errors are
            estimates of the loss and compare between layers; default: all the same.
    """
    stream = layerwise.start(model, family, batches)
    tokens = sum(batch.tokens for batch in batches)
    # Weights only matter relative to each other over the model; their mean is put to 1 so that no number is tiny.
    every = [each.mean() for layer in token_weights for each in layer] if token_weights else [torch.ones(())]
    mean = float(torch.stack(every).mean())
    result: dict[str, Tensor] = {}
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        shape = shapes[index]
        weights = [layer.get_parameter(block.output_weight) for block in (family.ffn, family.attention)]
        moments = [torch.zeros(weight.shape[1], weight.shape[1], device=weight.device) for weight in weights]
        for number in range(len(batches)):
            ffn: list[Tensor] = []
            heads: list[Tensor] = []
            with (
                layerwise.observed(layer, family.ffn.output, ffn),
                layerwise.observed(layer, family.attention.output, heads),
            ):
                stream.hidden[number] = stream.run(layer, index, number)
            for moment, values in zip(moments, (ffn[0], heads[0]), strict=True):
                real = stream.real(number, values).float()
                share = stream.real(number, token_weights[index][number][..., None]) / mean if token_weights else 1.0
                moment.addmm_((real * share).T, real, alpha=1 / tokens)
        result[f"ffn.{index}.value"] = greedy_removal(weights[0], moments[0], 1).cpu()
        result[f"heads.{index}.value"] = greedy_removal(weights[1], moments[1], shape.head_dim).cpu()
        group = shape.head_dim * shape.heads_per_group
        result[f"groups.{index}.value"] = greedy_removal(weights[1], moments[1], group).cpu()
        if progress is not None:
            progress()
    return result
