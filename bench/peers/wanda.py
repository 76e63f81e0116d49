"""Wanda, made structured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch

from .common import Network, Pruned, observe, without_lowest


def wanda_sp(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """Wanda-sp, FLAP's baseline: Wanda's metric summed over each FFN neuron's output weights.

    `s_j = Σ_i |W_down[i, j]| · ‖X_j‖₂`, with `‖X_j‖₂` over every calibration token. Each layer
    loses the same number. As in the published code, layers are cut in order, and each is scored on
    the outputs of the layers already cut below it. (That code takes the mean over `i` and divides
    `‖X_j‖₂²` by the number of sequences, which gives the same order of neurons.)

    Papers: Wanda, https://arxiv.org/abs/2306.11695; as a structured baseline,
    https://arxiv.org/abs/2312.11983
    """
    network = Network.of(model)
    before, output = network.parameters, network.family.ffn.output
    stream = network.start(batches)
    for index in range(len(network.layers)):
        (moments,), _ = observe(network, stream, index, [output])
        kept = without_lowest(wanda_scores(network, index, moments.square), network.wanted(fraction))
        network.cut_ffn(index, kept)
        _, stream.hidden = observe(network, stream, index, [])
    return model, before - network.parameters


@torch.no_grad()
def wanda_scores(network: Network, index: int, square: Tensor) -> Tensor:
    """`Σ_i |W_down[i, j]| · ‖X_j‖₂`, `[ffn]`, from `square`, `‖X_j‖₂²`, `[ffn]`."""
    weight = network.layers[index].get_parameter(network.family.ffn.output_weight)
    return weight.double().abs().sum(0) * square.sqrt()
