"""ReplaceMe: a linear map takes the place of a range of layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Batch
from expertprune.models.layers import decoder_layers, observed
from expertprune.models.passes import real_tokens

from .common import Network, Pruned, observe
from .layer_removal import Skip, cosine_distance

RIDGE = 1e-6  # of the mean energy of a channel


def replaceme(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """ReplaceMe by least squares: neighbouring layers go, the FFN before them takes over.

    Of all ranges of `n` layers, the one goes whose input `X` and output `Z` have the least mean
    cosine distance over tokens, on the dense model. `X = Y + M`, with `M` the output of the FFN in
    the layer before. The map `T` that minimizes `Σ ‖Z − Y − T M‖²` is merged into that FFN:
    `W_down` becomes `T W_down`. `n` is the number of layers that comes nearest to the target; the
    number of parameters that it removes is returned.

    The range never holds the first layer, as no FFN stands before it. `RIDGE` keeps the system
    solvable; the published configuration sets 0. Not for families that put a norm behind each block
    (Gemma 3): the map cannot pass it.

    Paper: https://arxiv.org/abs/2505.02819

    Raises:
        ValueError: the family puts a norm behind each block.
    """
    network = Network.of(model)
    if network.family.residual != "additive":
        raise ValueError(f"ReplaceMe cannot merge its map in family {network.family.family!r}: a norm stands behind it")
    before = network.parameters
    size = sum(parameter.numel() for parameter in network.layers[0].parameters())
    number = min(round(network.wanted_parameters(fraction) / size), len(network.layers) - 2)
    if number < 1:
        return model, 0
    first = nearest_range(network, batches, number)
    merge(network, first - 1, fitted(network, batches, first, number))
    layers = decoder_layers(model, network.family)
    for index in range(first, first + number):
        layers[index] = Skip()
    return model, before - network.parameters


@torch.inference_mode()
def nearest_range(network: Network, batches: Sequence[Batch], number: int) -> int:
    """The first layer of the range of `number` layers that turns the hidden states least."""
    stream = network.start(batches)
    inputs: deque[Any] = deque(maxlen=number)
    distances = {}
    for index in range(len(network.layers)):
        inputs.append(stream.hidden)
        _, stream.hidden = observe(network, stream, index, [])
        first = index - number + 1
        if first >= 1:
            distances[first] = float(cosine_distance(batches, inputs[0], stream.hidden))
    return min(distances, key=distances.__getitem__)


@torch.inference_mode()
def fitted(network: Network, batches: Sequence[Batch], first: int, number: int) -> Tensor:
    """The map `T` in place of `number` layers from the layer at `first`, `[hidden, hidden]`, float64."""
    path, stream = network.family.ffn.output, network.start(batches)
    for index in range(first - 1):
        _, stream.hidden = observe(network, stream, index, [])
    written, rest, states = [], [], []  # M and Y of each batch's real tokens, and the layer's output
    with observed(network.layers[first - 1], path) as calls:
        for at, batch in enumerate(batches):
            states.append(stream.run(network.layers[first - 1], first - 1, at))
            written.append(real_tokens(batch, calls[path].output).double())
            rest.append(real_tokens(batch, states[-1]).double() - written[-1])
    stream.hidden = states
    for index in range(first, first + number):
        _, stream.hidden = observe(network, stream, index, [])
    targets = [real_tokens(*each).double() for each in zip(batches, stream.hidden, strict=True)]
    gram = sum(m.T @ m for m in written)
    cross = sum((z - y).T @ m for z, y, m in zip(targets, rest, written, strict=True))
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross.T).T


@torch.no_grad()
def merge(network: Network, index: int, mapping: Tensor) -> None:
    """Let the FFN of a layer write `T M` in place of `M`; `mapping` is `T`, `[hidden, hidden]`."""
    projection = network.layers[index].get_submodule(network.family.ffn.output)
    dtype = projection.weight.dtype
    projection.weight = nn.Parameter((mapping @ projection.weight.double()).to(dtype), requires_grad=False)
    if projection.bias is not None:
        projection.bias = nn.Parameter((mapping @ projection.bias.double()).to(dtype), requires_grad=False)
