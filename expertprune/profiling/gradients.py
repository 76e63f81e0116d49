"""Gradients of the loss with respect to the masks of units."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Experts, Family
from expertprune.artifacts.profile import halved
from expertprune.corpora.batches import Batch
from expertprune.models.layers import Routed, observed, routed_shares
from expertprune.models.passes import LOGITS, TextRun
from expertprune.progress import Progress
from expertprune.units import LayerShape

# Powers of two, so that they cost no digit. Of half precision, whose smallest number is 2⁻²⁴ and largest 2¹⁶:
HEAD_SCALE = 2.0**8  # times the loss; the gradient of a logit is at most 1
LARGEST = 2.0**6  # where a layer's gradients begin: they may grow by 2¹⁰ within it, and 2⁻³⁰ of the largest is kept


class MaskGradients:
    """`Σ_t a_tc ∂L/∂a_tc` of the channels of one layer's output projections, per document and unit.

    This is the derivative with respect to a mask that multiplies the unit's channels, at 1. A KV group's is the sum over
    its query heads, so only heads are stored. The mask of a routed expert multiplies what it writes: its derivative is
    the sum over its neurons.
    """

    def __init__(self, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        self.ffn = torch.zeros(documents, shape.neurons)
        self.heads = torch.zeros(documents, shape.query_heads)

    def add(
        self,
        batch: Batch,
        weights: Sequence[float],
        heads: tuple[Tensor, Tensor],
        ffn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            weights: what the gradients of each row are multiplied by, in float32.
            heads, ffn: the input of an output projection and its gradient, `[rows, tokens, channels]` each.
        """
        for row, (document, length, weight) in enumerate(zip(batch.documents, batch.lengths, weights, strict=True)):
            sums = [(a[row, :length].float() * g[row, :length].float()).sum(0).cpu() * weight
                    for a, g in ([heads] if ffn is None else [heads, ffn])]  # fmt: skip
            self.heads[document] += sums[0].unflatten(0, (self.shape.query_heads, -1)).sum(1)
            if ffn is not None:
                self.ffn[document] += sums[1]

    def add_routed(
        self,
        layer: nn.Module,
        experts: Experts,
        batch: Batch,
        weights: Sequence[float],
        call: Routed,
        gradient: Tensor,
    ) -> None:
        """`gradient` `[tokens, hidden]` is that of what the routed experts of `layer` wrote together."""
        gradient = gradient.flatten(0, -2).float()
        by_document = torch.zeros(len(self.ffn))
        by_document[list(batch.documents)] = torch.tensor(weights, dtype=torch.float32)
        for share in routed_shares(layer, experts, batch, call):
            value = (gradient[share.place] @ share.read) * share.neurons * share.weight[:, None]
            first = share.expert * self.shape.ffn
            own = value.cpu() * by_document[share.document][:, None]
            self.ffn[:, first : first + self.shape.ffn].index_add_(0, share.document, own)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        found = {**halved(f"ffn.{layer}.value", self.ffn), **halved(f"heads.{layer}.value", self.heads)}
        if self.shape.experts:
            found |= halved(f"experts.{layer}.value", self.ffn.unflatten(1, (self.shape.experts, -1)).sum(2))
        return found


@contextlib.contextmanager
def mask_graph(layer: nn.Module, family: Family, leaves: bool) -> Iterator[dict[str, Tensor]]:
    """While open, gradients are on and what the layer's masks would multiply is noted, call by call.

    Noted are the inputs of both output projections, `heads` and `ffn`. Where experts are routed, what they write together
    is noted as `written` in place of `ffn`.

    Args:
        leaves: the noted inputs become the graph's leaves, so the graph begins there.
    """
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
            value = arguments[0]
            if leaves and not value.requires_grad:
                value = value.detach().requires_grad_()
            inputs[name] = value
            return (value, *arguments[1:])

        return note

    def note_output(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        inputs["written"] = output

    blocks = [("heads", family.attention), *([("ffn", family.ffn)] if family.has_ffn else [])]
    handles = [layer.get_submodule(block.output).register_forward_pre_hook(hook(name)) for name, block in blocks]
    if family.experts is not None:
        handles.append(layer.get_submodule(family.experts.module).register_forward_hook(note_output))
    try:
        with torch.enable_grad():
            yield inputs
    finally:
        for handle in handles:
            handle.remove()


# --- the whole model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_pass(text: TextRun, loss: str, seed: int = 0, progress: Progress | None = None) -> dict[str, Tensor]:
    """Gradients of each document's mean loss with respect to the masks of all units.

    The sum of a document's losses is what goes backward: its mean over hundreds of tokens would vanish in half precision.
    The division comes last, in float32.

    Args:
        loss: `language_model`, against the text's own next tokens; or `kl`, against tokens drawn from the model's own
            predictions, whose gradients have the curvature of `KL(dense ‖ masked)` as their second moment (the gradient
            of that divergence itself is zero at the dense model).
        seed: of the draws; each document has its own.
        progress: called after each batch.
    """
    gradients = [MaskGradients(shape, text.documents) for shape in text.shapes]
    experts = text.family.experts
    for one in text.each_batch():  # all at once would hold every layer's input of every batch
        for layer in backward(one, loss, seed):
            weights = [1 / layer.scale / (length - 1) for length in layer.batch.lengths]
            pairs = {n: (layer.inputs[n], layer.gradients[n]) for n in ("heads", "ffn") if n in layer.inputs}
            gradients[layer.index].add(layer.batch, weights, **pairs)
            if experts is not None and layer.routed is not None:
                here = (layer.module, experts, layer.batch, weights, layer.routed, layer.gradients["written"])
                gradients[layer.index].add_routed(*here)
        if progress is not None:
            progress()
    return {name: tensor for layer, each in enumerate(gradients) for name, tensor in each.tensors(layer).items()}


@dataclass(frozen=True)
class Differentiated:
    """One batch in one layer: what the layer's masks would multiply (see `mask_graph`), and its gradients.

    `gradients` are those of the sum of the losses of all rows, times `scale`.
    """

    index: int
    module: nn.Module
    batch: Batch
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    routed: Routed | None
    scale: float


def backward(text: TextRun, loss: str, seed: int) -> Iterator[Differentiated]:
    """Go through the layers from the last to the first, and in each through every batch.

    The forward pass keeps each layer's input. Going back, each layer is run again and differentiated, so that one
    layer's graph is held for one batch at a time.
    """
    stream = text.start()
    before: list[list[Tensor]] = []
    for index, layer in text.layers():
        before.append(list(stream.hidden))
        for _ in stream.advance(layer, index):
            pass
    ends = [loss_gradient(text, *pair, loss, seed) for pair in zip(text.batches, stream.hidden, strict=True)]
    above = [rescaled(gradient, HEAD_SCALE) for gradient in ends]
    routers = [text.family.experts.module] if text.family.experts is not None else []
    for index, layer in text.layers(last_first=True):
        stream.hidden = [hidden.detach().requires_grad_() for hidden in before.pop()]
        for number, batch in enumerate(text.batches):
            gradient, scale = above[number]
            with observed(layer, *routers) as calls, mask_graph(layer, text.family, leaves=False) as inputs:
                output = stream.run(layer, index, number)
                below, *found = torch.autograd.grad(output, [stream.hidden[number], *inputs.values()], gradient)
            routed = Routed.of(calls[routers[0]]) if routers else None
            noted = {name: value.detach() for name, value in inputs.items()}
            gradients = dict(zip(inputs, found, strict=True))
            yield Differentiated(index, layer, batch, noted, gradients, routed, scale)
            above[number] = rescaled(below, scale)


def rescaled(gradient: Tensor, scale: float) -> tuple[Tensor, float]:
    """Multiply by the power of two that brings the largest element to `LARGEST`; the product, and its whole scale.

    Backpropagation is linear, so this changes no digit, and no layer's gradients leave the range of half precision.

    Args:
        scale: what the gradient is multiplied by so far.
    """
    largest = float(gradient.abs().max())
    if not 0 < largest < math.inf:
        return gradient, scale
    factor = 2.0 ** min(math.log2(LARGEST) - math.ceil(math.log2(largest)), 100)  # itself a number of single precision
    return gradient * factor, scale * factor


def loss_gradient(text: TextRun, batch: Batch, hidden: Tensor, loss: str, seed: int) -> Tensor:
    """The gradient of the sum over all tokens' losses, times `HEAD_SCALE`, with respect to the last layer's output.

    `[rows, tokens, hidden]`.
    """
    ids = batch.ids.to(hidden.device)
    leaf = hidden.detach().requires_grad_()
    # Of a whole document at once, so that its draws are the same however its positions are cut into steps.
    draws = [
        torch.rand(length - 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + document))
        for document, length in zip(batch.documents, batch.lengths, strict=True)
    ]
    total = torch.zeros_like(leaf)
    with torch.enable_grad():
        for first, logits in text.logits(batch, leaf, until=ids.shape[1] - 1):
            targets = ids[:, first + 1 : first + 1 + logits.shape[1]].clone()
            predicted = torch.zeros(targets.shape, device=ids.device)
            for row, length in enumerate(batch.lengths):
                count = max(0, min(length - 1 - first, logits.shape[1]))
                predicted[row, :count] = 1
                if loss == "kl":
                    chances = torch.softmax(logits[row, :count].detach(), -1)
                    targets[row, :count] = _drawn(chances, draws[row][first : first + count].to(ids.device))
            each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += torch.autograd.grad((each * predicted.flatten()).sum() * HEAD_SCALE, leaf)[0]
    return total


def _drawn(chances: Tensor, draws: Tensor) -> Tensor:
    """The token at which the sum of the chances passes a uniform draw, `[positions, tokens]` and `[positions]`."""
    sums = chances.cumsum(-1)
    # right: a token without a chance is never drawn; the last sum is one only up to rounding
    return torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0].clamp_max(sums.shape[1] - 1)


def backward_bytes(shapes: Sequence[LayerShape], vocabulary: int, tokens: int, experts_per_token: int = 0) -> int:
    """About what a backward pass holds at its peak beside the weights, were its activations in float32.

    Every layer's hidden states, one layer's graph, the logits of a few positions with their gradients.

    Args:
        tokens: of the largest batch, padding included.
    """
    shape = max(shapes, key=lambda each: each.ffn)
    graph = 12 * shape.hidden + 6 * shape.ffn * max(1, experts_per_token) + 6 * shape.query_heads * shape.head_dim
    return 4 * (tokens * ((len(shapes) + 3) * shape.hidden + graph) + 4 * min(LOGITS, tokens * vocabulary))
