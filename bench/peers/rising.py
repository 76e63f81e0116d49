"""SlimGPT: Optimal Brain Surgeon on each layer's FFN, at ratios that rise with depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch

from .common import Network, Pruned, observe, whole
from .least_squares import RIDGE, cut_and_replace, observe_gram

FIRST = 0.0625  # the ratio of the first layer


def slimgpt(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """SlimGPT's Incremental Pruning Ratio, and greedy OBS in each layer.

    Layer `l` of `n`, from 0, loses the part `r_l = r_0 + (r_n − r_0) log(l + 1) / log(n)` of its
    neurons. `r_0` is `FIRST`, and `r_n` is such that the wanted number goes in all. Layers are cut
    in order. With `H = Σ h hᵀ` of the FFN's hidden states on the outputs of the layers already cut
    below, the neuron of the least `‖W_down[:, j]‖² / [H⁻¹]_jj` goes, the other columns take its
    part, and so on (`greedy`). All these updates together are least squares on the kept neurons.

    From the paper: that ratios rise by the logarithm of depth, the error, and the update. From the
    published code: the formula, and `FIRST`, which is what its example for 20% of LLaMA-7B says
    (`--min_sparsity 0.0625 --max_sparsity 0.25`); with 32 layers the `r_n` here is 0.2495.

    Ours: neurons go one by one, where the paper takes groups that shrink, to save time; `H` has the
    ridge of the other peers that repair, and so has the fit. Left out, as the budget here is of FFN
    neurons: heads (grouped Cholesky decomposition), and fine-tuning.

    Paper: https://arxiv.org/abs/2412.18110
    """
    network = Network.of(model)
    before = network.parameters
    stream = network.start(batches)
    for index, count in enumerate(rising(network.wanted(fraction), network.shapes[0].ffn, len(network.layers))):
        gram, _ = observe_gram(network, stream, index)
        weight = network.layers[index].get_parameter(network.family.ffn.output_weight)
        cut_and_replace(network, index, gram, greedy(gram.products, weight, count))
        _, stream.hidden = observe(network, stream, index, [])
    return model, before - network.parameters


def rising(wanted: int, width: int, layers: int) -> list[int]:
    """How many neurons each layer loses, `wanted` on average, by the formula of `slimgpt`.

    Args:
        width: the neurons of each layer.

    Raises:
        ValueError: the last layer would lose all.
    """
    curve = torch.tensor([math.log(layer + 1) / math.log(layers) for layer in range(layers)], dtype=torch.float64)
    first = min(FIRST * width, wanted)
    last = first + (wanted - first) / float(curve.mean())
    if last >= width:
        raise ValueError(f"ratios from {FIRST} that are {wanted / width:.3g} on average leave the last layer nothing")
    return whole(first + (last - first) * curve, wanted * layers)


@torch.no_grad()
def greedy(products: Tensor, weight: Tensor, count: int) -> Tensor:
    """What stays when OBS takes `count` neurons, one after the other, `[ffn]`, bool.

    Of the least `‖w_j‖² / [H⁻¹]_jj` first. Then `W ← W − w_j [H⁻¹]_j / [H⁻¹]_jj`, and `H⁻¹` likewise.

    Args:
        products: `Σ h hᵀ`, `[ffn, ffn]`, float64; `H` is it with a ridge.
        weight: the output projection, `[hidden, ffn]`.
    """
    inverse = products.clone()
    inverse.diagonal().add_(RIDGE * inverse.diagonal().mean())
    inverse, weight = torch.linalg.inv(inverse), weight.double()
    kept = torch.ones(len(inverse), dtype=torch.bool, device=weight.device)
    for _ in range(count):
        errors = (weight.square().sum(0) / inverse.diagonal()).masked_fill(~kept, math.inf)
        chosen = int(errors.argmin())
        share = inverse[chosen] / inverse[chosen, chosen]
        weight = weight - torch.outer(weight[:, chosen], share)
        inverse = inverse - torch.outer(inverse[:, chosen], share)
        kept[chosen] = False
    return kept
