"""MoDeGPT: the FFN by the Nyström approximation, sparsity shared by one rule over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch

from .common import Network, Pruned, whole, without_lowest
from .layer_removal import cosine_distance
from .least_squares import Gram, cut_and_replace, observe_gram

TEMPERATURE = 0.1  # ε of the rule over the layers
MOST = 0.95  # a layer loses at most this part of its neurons
PIVOT = 1e-6  # of the mean energy: the Nyström matrix of float32 sums can be inverted


def modegpt(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """MoDeGPT's Type I: ridge leverage scores choose the neurons, Nyström's formula repairs.

    With `C = Σ h hᵀ` of the FFN's hidden states on the dense model, `[ffn, ffn]`, neuron `j` has
    the ridge leverage score `s_j = [C (C + λ)⁻¹]_jj`. Each layer keeps its highest scores, the
    columns of `S`, and the output projection becomes `W_down C S (Sᵀ C S)⁻¹`. Layer `l` of `L`
    loses the part `L φ softmax(−b / ε)_l` of its neurons, with `φ` the wanted fraction and `b_l`
    the layer's Block Influence, as in ShortGPT.

    Left out, as the budget here is of FFN neurons: query and key (CR decomposition), value and
    output (SVD). With rotary positions the first could only remove pairs of channels. With grouped
    heads each choice would have to serve all query heads of a group.

    Our choices, which the formulas leave open: `λ` is the mean of `C`'s diagonal; `ε` is
    `TEMPERATURE`; a layer loses at most `MOST`, and the others share the rest by the same rule.

    Paper: https://arxiv.org/abs/2408.09632
    """
    network = Network.of(model)
    before = network.parameters
    stream, grams, influence = network.start(batches), [], []
    for index in range(len(network.layers)):
        gram, outputs = observe_gram(network, stream, index)
        gram.products = gram.products.float()  # all layers are held at once
        grams.append(gram)
        influence.append(cosine_distance(batches, stream.hidden, outputs))
        stream.hidden = outputs
    counts = shared(torch.stack(influence), network.wanted(fraction), network.shapes[0].ffn)
    for index, (gram, count) in enumerate(zip(grams, counts, strict=True)):
        full = Gram(gram.tokens, gram.total, gram.products.double())
        cut_and_replace(network, index, full, without_lowest(leverage(full.products), count), ridge=PIVOT)
    return model, before - network.parameters


def leverage(products: Tensor) -> Tensor:
    """Ridge leverage scores `[C (C + λ)⁻¹]_jj`, `[ffn]`; `λ` is the mean of `C`'s diagonal."""
    system = products.clone()
    system.diagonal().add_(products.diagonal().mean())
    return torch.linalg.solve(system, products).diagonal()


def shared(influence: Tensor, wanted: int, width: int) -> list[int]:
    """How many neurons each layer loses, `wanted` on average.

    Args:
        influence: Block Influence of each layer, `[layers]`.
        width: the neurons of each layer.
    """
    total, limit = wanted * len(influence), int(MOST * width)
    weights = torch.softmax(-influence / TEMPERATURE, 0)
    lost = total * weights
    full = torch.zeros_like(lost, dtype=torch.bool)
    while bool((lost > limit).any()):
        full |= lost >= limit
        rest = weights * ~full
        lost = torch.where(full, float(limit), (total - limit * int(full.sum())) * rest / rest.sum())
    return whole(lost, total)
