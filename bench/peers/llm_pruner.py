"""LLM-Pruner: first-order Taylor importance of coupled weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch

from ..measure import token_losses
from .common import Network, Pruned, without_lowest

KEPT_FIRST, KEPT_LAST = 4, 2  # layers that the published commands leave whole


def llm_pruner_taylor(model: Any, batches: Sequence[Batch], fraction: float, seed: int = 0) -> Pruned:
    """LLM-Pruner with element-wise first-order Taylor importance, block-wise on the FFN.

    `s_j = Σ |w · ∂L/∂w|` over all weights `w` that leave with neuron `j` (gate row, up row, down
    column; group reduction "sum"), `L` being the language-model loss summed over all calibration
    text. That is the published code's `--taylor param_first`: `(weight * weight.grad).abs()`,
    summed along the row or column, with the gradient of one backward pass over all examples. Their
    script `scripts/llama_prune.sh` passes it, and it is the default of their `llama3.py`. The
    default of the older `hf_prune.py` is `param_mix`, which subtracts half a diagonal second-order
    term.

    Two ways of sharing the cut are tried, and the one of lower loss on the calibration text stays:
    the same number of neurons from each layer (their default, no global ranking), or, as their
    commands' `--block_mlp_layer_start 4 --block_mlp_layer_end 30` of 32 layers, nothing from the
    first four and the last two layers and more from the others.

    Deviations: it calibrates on the same text as every method here instead of 10 sequences of 64
    tokens. The loss is a sum over tokens, not a mean (a constant factor). Only FFN neurons go, no
    heads, and no fine-tuning follows.

    Paper: https://arxiv.org/abs/2305.11627
    """
    network = Network.of(model)
    scores = taylor_scores(network, batches)
    widths, wanted = [shape.ffn for shape in network.shapes], network.wanted(fraction)
    counts = [[wanted] * len(widths)]
    if (inner := inner_counts(wanted, widths)) is not None:
        counts.append(inner)
    cuts = [[without_lowest(*pair) for pair in zip(scores, each, strict=True)] for each in counts]
    return network.cut_each(min(cuts, key=lambda kept: loss_without(network, kept, batches)))


def inner_counts(wanted: int, widths: Sequence[int]) -> list[int] | None:
    """Neurons that each layer loses where outer layers stay whole; None where that cannot be.

    Their number is that of `wanted` in every layer; what does not divide goes from the first of
    them.
    """
    inner = len(widths) - KEPT_FIRST - KEPT_LAST
    if inner < 1:
        return None
    count, rest = divmod(wanted * len(widths), inner)
    if count + (rest > 0) >= min(widths):
        return None
    return [0] * KEPT_FIRST + [count + (i < rest) for i in range(inner)] + [0] * KEPT_LAST


def taylor_scores(network: Network, batches: Sequence[Batch]) -> list[Tensor]:
    """`Σ |w · ∂L/∂w|` of each FFN neuron, `[ffn]` per layer; no gradient stays."""
    ffn = {coupled.name for coupled in network.family.ffn.tensors}
    weights = [weight for layer in network.layers for name, weight in layer.named_parameters() if name in ffn]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for ids in documents(batches):
            document_loss(network.model, ids, backward=True)
        with torch.no_grad():
            return [network.unit_sums(i, lambda w: (w * w.grad).abs()) for i in range(len(network.layers))]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def documents(batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The ids of each document, `[tokens]`: the gradient holds one document's activations."""
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            yield batch.ids[row, :length]


def document_loss(model: Any, ids: Tensor, backward: bool = False) -> float:
    """Loss in nats, summed over a document's tokens behind the first; accumulates its gradient."""
    ids = ids.to(model.device)
    states = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    leaf, total = states.detach().requires_grad_(backward), 0.0
    for losses in token_losses(model, leaf, ids[1:]):
        loss = losses.sum()
        total += float(loss.detach())
        if backward:
            loss.backward()
    if backward:
        states.backward(leaf.grad)
    return total


@torch.no_grad()
def loss_without(network: Network, kept: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """Loss in nats on all text while the FFN neurons that are not marked put out nothing."""
    with masked(network, kept):
        return sum(document_loss(network.model, ids) for ids in documents(batches))


@contextlib.contextmanager
def masked(network: Network, kept: Sequence[Tensor]) -> Iterator[None]:
    """While open, the FFN neurons that are not marked put out nothing."""
    handles = []
    for layer, mask in zip(network.layers, kept, strict=True):
        output = layer.get_submodule(network.family.ffn.output)
        handles.append(output.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
