"""Least squares behind a selector, as in GRAIL: the kept neurons stand in for those that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Batch
from expertprune.models.layers import observed
from expertprune.models.passes import Stream, real_tokens

from .common import Network, Pruned, observe, without_lowest
from .fluctuation import flap_kept
from .wanda import wanda_scores

RIDGE = 1e-3  # of the mean energy of a kept neuron


def wanda_sp_least_squares(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """Wanda-sp's neurons, and GRAIL's least squares behind them.

    Layers are cut in order. With `h` the hidden state of a layer's FFN at full width, `[ffn]`, and
    `h_k` that of its kept neurons, on the outputs of the layers already cut below it, a ridge
    regression finds the matrix `B`, `[ffn, kept]`, that minimizes `Σ ‖h − B h_k‖² + λ ‖B‖²`. The
    output projection becomes `W_down B`. `λ` is `RIDGE` of the mean of `Σ h_j²` over the kept
    neurons.

    Only FFN neurons go, so no heads are repaired. The size of the ridge is our choice.

    Papers: GRAIL, https://arxiv.org/abs/2602.23795; Wanda, https://arxiv.org/abs/2306.11695
    """
    network = Network.of(model)
    before = network.parameters
    stream = network.start(batches)
    for index in range(len(network.layers)):
        gram, _ = observe_gram(network, stream, index)
        kept = without_lowest(wanda_scores(network, index, gram.products.diagonal()), network.wanted(fraction))
        cut_and_replace(network, index, gram, kept)
        _, stream.hidden = observe(network, stream, index, [])
    return model, before - network.parameters


def flap_least_squares(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """FLAP's neurons, and GRAIL's least squares behind them in place of FLAP's bias alone.

    As `wanda_sp_least_squares`, of hidden states less their means, as FLAP adds a bias: the output
    projection becomes `W_down B`, and its bias gains `W_down (mean(h) − B mean(h_k))`. With `B`
    zero for the neurons that go, that is FLAP's bias. FLAP chooses on the dense model.

    Papers: GRAIL, https://arxiv.org/abs/2602.23795; FLAP, https://arxiv.org/abs/2312.11983
    """
    network = Network.of(model)
    before = network.parameters
    kept = flap_kept(network, batches, fraction)
    stream = network.start(batches)
    for index in range(len(network.layers)):
        gram, _ = observe_gram(network, stream, index)
        cut_and_replace(network, index, gram, kept[index], intercept=True)
        _, stream.hidden = observe(network, stream, index, [])
    return model, before - network.parameters


@dataclass
class Gram:
    """Sums over the real tokens of the FFN's hidden states `h`, float64.

    `total` is `Σ h`, `[ffn]`, and `products` `Σ h hᵀ`, `[ffn, ffn]`.
    """

    tokens: int
    total: Tensor
    products: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    def about_mean(self) -> Tensor:
        """`Σ (h − mean) (h − mean)ᵀ`, `[ffn, ffn]`."""
        return self.products - torch.outer(self.total, self.mean)


@torch.inference_mode()
def observe_gram(network: Network, stream: Stream, index: int) -> tuple[Gram, list[Tensor]]:
    """Run a layer over every batch: the sums of its FFN's hidden states, and its output per batch."""
    layer, path, outputs = network.layers[index], network.family.ffn.output, []
    width, device = network.shapes[index].ffn, network.model.device
    # In float32, which is several times as fast as float64.
    gram = Gram(0, torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(width, width, device=device))
    with observed(layer, path) as calls:
        for number, batch in enumerate(stream.batches):
            outputs.append(stream.run(layer, index, number))
            hidden = real_tokens(batch, calls[path].input).float()
            gram.tokens += len(hidden)
            gram.total += hidden.sum(0, dtype=torch.float64)
            gram.products.addmm_(hidden.T, hidden)
    gram.products = gram.products.double()
    return gram, outputs


def regression(products: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """`B = G[:, k] (G[k, k] + λ)⁻¹`: each neuron from the kept ones, `[ffn, kept]`, float64.

    Args:
        products: `G`, `[ffn, ffn]`.
        kept: `k`, `[ffn]`, bool.
        ridge: `λ` over the mean of the diagonal of `G[k, k]`.
    """
    crossed = products[kept]
    system = crossed[:, kept].clone()
    system.diagonal().add_(ridge * system.diagonal().mean())
    return torch.linalg.solve(system, crossed).T


@torch.no_grad()
def cut_and_replace(
    network: Network, index: int, gram: Gram, kept: Tensor, intercept: bool = False, ridge: float = RIDGE
) -> None:
    """Cut a layer's FFN; its output projection takes the neurons that go from those that stay.

    Args:
        kept: `[ffn]`, bool; where it is whole, nothing is done.
        intercept: regress about the means; the projection's bias takes the rest.
    """
    if bool(kept.all()):
        return
    projection = network.layers[index].get_submodule(network.family.ffn.output)
    dense, dtype = projection.weight.double(), projection.weight.dtype
    replaced = regression(gram.about_mean() if intercept else gram.products, kept, ridge)
    network.cut_ffn(index, kept)
    projection.weight = nn.Parameter((dense @ replaced).to(dtype), requires_grad=False)
    if intercept:
        bias = dense @ (gram.mean - replaced @ gram.mean[kept])
        if projection.bias is not None:
            bias = bias + projection.bias.double()
        projection.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
