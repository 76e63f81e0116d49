"""FLAP: fluctuation-based adaptive structured pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Block
from expertprune.corpora.batches import Batch
from expertprune.units import Segment

from .common import Moments, Network, Pruned, observe, without_lowest


def flap(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0, heads: bool = False) -> Pruned:
    """FLAP: weighted input fluctuation (WIFV), adaptive over layers, with bias compensation.

    `s_j = Var(X_j) · Σ_i W_down[i, j]²`, on the dense model's activations; per layer standardized,
    `z_j = (s_j − mean(s)) / std(s)`; one ranking of all layers' `z`. The dropped neurons' mean
    contribution `W_down[:, dropped] · mean(X_dropped)` becomes a bias of the output projection.

    The ranking is cut so that exactly the wanted number of FFN neurons goes. With `heads`, query
    heads stand in the same ranking (the paper's AL-AM), and it is cut where the parameters come
    nearest to those of the wanted neurons. A head's score is the mean over its channels of the
    standardized squares of `s` (the square is in the published code, not in the paper). Dropped
    heads are masked; what counts as removed is their rows of the query and columns of the output
    projection, and a KV head once all its query heads are gone.

    Deviations from the published code, which computes another fluctuation than the paper's: it
    leaves out the first sequence, takes squares about the running mean so far (the "old" mean is an
    alias of the new one), and divides sums over tokens by the number of sequences. Here it is the
    variance over all tokens. Its compression weight of a head, 512/3 neurons, is true of LLaMA-7B
    only; here it is counted. The added biases count against what was removed.

    Paper: https://arxiv.org/abs/2312.11983
    """
    network = Network.of(model)
    family, before = network.family, network.parameters
    blocks = [family.ffn, family.attention] if heads else [family.ffn]
    stream = network.start(batches)
    seen: list[list[Moments]] = []
    for index in range(len(network.layers)):
        moments, stream.hidden = observe(network, stream, index, [block.output for block in blocks])
        seen.append(moments)
    neurons = torch.stack([standardized(fluctuation(network, i, family.ffn, m[0])) for i, m in enumerate(seen)])
    if not heads:
        kept, kept_heads, gone = without_lowest(neurons, network.wanted(fraction) * len(seen)), None, 0
    else:
        squares = [fluctuation(network, i, family.attention, m[1]).square() for i, m in enumerate(seen)]
        count = network.shapes[0].query_heads
        ranked = torch.stack([standardized(s).unflatten(0, (count, -1)).mean(1) for s in squares])
        kept, kept_heads, gone = cut_by_parameters(network, neurons, ranked, network.wanted_parameters(fraction))
    for index, moments in enumerate(seen):
        compensate(network, index, family.ffn, moments[0].mean, kept[index])
        network.cut_ffn(index, kept[index])
        if kept_heads is not None:
            channels = kept_heads[index].repeat_interleave(network.shapes[index].head_dim)
            compensate(network, index, family.attention, moments[1].mean, channels)
            with torch.no_grad():
                network.layers[index].get_parameter(family.attention.output_weight)[:, ~channels] = 0
    return model, before - network.parameters + gone


def flap_kept(network: Network, batches: Sequence[Batch], fraction: float) -> Tensor:
    """The neurons that `flap` keeps where no heads go, `[layers, ffn]`, bool."""
    stream, ffn, scores = network.start(batches), network.family.ffn, []
    for index in range(len(network.layers)):
        (moments,), stream.hidden = observe(network, stream, index, [ffn.output])
        scores.append(standardized(fluctuation(network, index, ffn, moments)))
    return without_lowest(torch.stack(scores), network.wanted(fraction) * len(scores))


@torch.no_grad()
def fluctuation(network: Network, index: int, block: Block, moments: Moments) -> Tensor:
    """`Var(X_j) · Σ_i W[i, j]²` of an output projection's inputs, `[channels]`, float64."""
    weight = network.layers[index].get_parameter(block.output_weight).double()
    return moments.variance * weight.square().sum(0)


def standardized(scores: Tensor) -> Tensor:
    """Scores of one layer less their mean, over their standard deviation."""
    return (scores - scores.mean()) / scores.std()


@torch.no_grad()
def compensate(network: Network, index: int, block: Block, mean: Tensor, kept: Tensor) -> None:
    """Add the mean contribution of the channels that go to an output projection's bias."""
    if bool(kept.all()):
        return
    projection = network.layers[index].get_submodule(block.output)
    bias = (projection.weight[:, ~kept].double() @ mean[~kept]).to(projection.weight.dtype)
    if projection.bias is not None:
        bias = bias + projection.bias
    projection.bias = nn.Parameter(bias, requires_grad=False)


def cut_by_parameters(network: Network, neurons: Tensor, heads: Tensor, target: int) -> tuple[Tensor, Tensor, int]:
    """Rank neurons `[layers, ffn]` and query heads `[layers, heads]`; cut nearest to `target`.

    Returns:
        The neurons and the heads that stay, and the parameters of the heads that go.
    """
    kept, kept_heads = torch.ones_like(neurons, dtype=torch.bool), torch.ones_like(heads, dtype=torch.bool)
    costs = [
        [network.unit_parameters(i, segment) for segment in (Segment.FFN, Segment.QUERY, Segment.KEY_VALUE)]
        for i in range(len(network.layers))
    ]
    removed = gone = 0
    for place in torch.argsort(torch.cat([neurons.flatten(), heads.flatten()]), stable=True).tolist():
        if place < neurons.numel():
            layer, unit = divmod(place, neurons.shape[1])
            cost, mask = costs[layer][0], kept
        else:
            layer, unit = divmod(place - neurons.numel(), heads.shape[1])
            group = unit // network.shapes[layer].heads_per_group
            stays = kept_heads[layer].unflatten(0, (network.shapes[layer].kv_heads, -1))[group].sum()
            cost, mask = costs[layer][1] + (costs[layer][2] if stays == 1 else 0), kept_heads
        if abs(removed + cost - target) >= abs(removed - target):
            break
        mask[layer, unit] = False
        removed += cost
        gone += cost if mask is kept_heads else 0
    return kept, kept_heads, gone
