"""ShortGPT: whole layers go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Batch
from expertprune.models.layers import decoder_layers
from expertprune.models.passes import real_tokens

from .common import Network, Pruned, observe


class Skip(nn.Module):
    """Takes a removed layer's place and passes the hidden states on: no layer is renumbered."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def shortgpt(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """ShortGPT: remove the layers of least Block Influence, as many as come nearest to the target.

    `BI_l = 1 − E[cos(X_l, X_{l+1})]` over tokens, `X_l` being the hidden states before layer `l`,
    on the dense model. As whole layers go, the number removed differs from the wanted one by up to
    half a layer; the true one is returned.

    Deviations from the published code: it takes the last layer's output behind the final norm, and
    its sums include padding. Here neither is so, as in the paper's formula.

    Paper: https://arxiv.org/abs/2403.03853
    """
    network = Network.of(model)
    before = network.parameters
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in network.layers]
    order = torch.argsort(block_influence(network, batches), stable=True).tolist()
    target, removed = network.wanted_parameters(fraction), 0
    layers = decoder_layers(model, network.family)
    for index in order:
        if abs(removed + sizes[index] - target) >= abs(removed - target):
            break
        layers[index] = Skip()
        removed += sizes[index]
    return model, before - network.parameters


@torch.inference_mode()
def block_influence(network: Network, batches: Sequence[Batch]) -> Tensor:
    """One minus the mean cosine of each layer's input and output, `[layers]`, float64."""
    stream = network.start(batches)
    influence = []
    for index in range(len(network.layers)):
        _, outputs = observe(network, stream, index, [])
        influence.append(cosine_distance(batches, stream.hidden, outputs))
        stream.hidden = outputs
    return torch.stack(influence)


def cosine_distance(batches: Sequence[Batch], before: Iterable[Tensor], after: Iterable[Tensor]) -> Tensor:
    """One minus the mean cosine of two hidden states of each real token, a scalar, float64."""
    cosines = [
        torch.cosine_similarity(real_tokens(batch, old).float(), real_tokens(batch, new).float(), dim=1, eps=1e-12)
        for batch, old, new in zip(batches, before, after, strict=True)
    ]
    return 1 - torch.cat(cosines).double().mean()
