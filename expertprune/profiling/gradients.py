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
from expertprune.models.spool import Spool
from expertprune.progress import Progress
from expertprune.units import LayerShape

# Scales keep gradients within half precision, from 2⁻²⁴ to 2¹⁶. Powers of two change no digit.
HEAD_SCALE = 2.0**8  # of the loss: the gradient of a logit is at most 1
LARGEST = 2.0**6  # of the gradients that enter a layer: within it, they may grow by 2¹⁰


class MaskGradients:
    """`Σ_t a_tc ∂L/∂a_tc` of the channels of one layer's output projections, per document and unit.

    This is the derivative with respect to a mask that multiplies the unit's channels, at 1. That of
    a KV group is the sum over its query heads, so only heads are stored. The mask of a routed
    expert multiplies its output, so its derivative is the sum over its neurons.
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
            weights: a factor for the gradients of each row, applied in float32.
            heads, ffn: input and gradient of an output projection, `[rows, tokens, channels]` each.
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
        """Add a batch; `gradient` is that of the routed experts' output, `[tokens, hidden]`."""
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
    """While open, gradients are on, and the tensors that masks would multiply are kept by name.

    These are the inputs of both output projections in the last call, `heads` and `ffn`. A layer
    with routed experts has their summed output, `written`, in place of `ffn`.

    Args:
        leaves: start the graph at these inputs.
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

    Backpropagation starts from the sum of a document's losses: the gradient of their mean over
    hundreds of tokens would vanish in half precision. The division comes last, in float32.

    Args:
        loss: `language_model`, against the text's own next tokens; or `kl`, against tokens drawn
            from the model's own predictions. The second moment of the latter's gradients is the
            curvature of `KL(dense ‖ masked)`, whose own gradient is zero at the dense model.
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
    """One batch in one layer: what masks would multiply (see `mask_graph`), and its gradients.

    `gradients` are those of the sum of all tokens' losses, times `scale`.
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

    The forward pass keeps each layer's input. On the way back, each layer is run again and
    differentiated, so only one layer's graph of one batch is held at a time.
    """
    stream = text.start()
    before: list[Spool] = []
    for index, layer in text.layers():
        before.append(stream.hidden.copy())
        for _ in stream.advance(layer, index):
            pass
    ends = [loss_gradient(text, *pair, loss, seed) for pair in zip(text.batches, stream.hidden, strict=True)]
    above = [rescaled(gradient, HEAD_SCALE) for gradient in ends]
    routers = [text.family.experts.module] if text.family.experts is not None else []
    for index, layer in text.layers(last_first=True):
        inputs_here = before.pop()
        for number, batch in enumerate(text.batches):
            gradient, scale = above[number]
            with observed(layer, *routers) as calls, mask_graph(layer, text.family, leaves=False) as inputs:
                leaf = inputs_here[number].detach().requires_grad_()
                output = stream.run(layer, index, number, leaf)
                below, *found = torch.autograd.grad(output, [leaf, *inputs.values()], gradient)
            routed = Routed.of(calls[routers[0]]) if routers else None
            noted = {name: value.detach() for name, value in inputs.items()}
            gradients = dict(zip(inputs, found, strict=True))
            yield Differentiated(index, layer, batch, noted, gradients, routed, scale)
            above[number] = rescaled(below, scale)


def rescaled(gradient: Tensor, scale: float) -> tuple[Tensor, float]:
    """Multiply a gradient by a power of two that brings its largest element to about `LARGEST`.

    Backpropagation is linear, so a scale can be divided out at the end.

    Args:
        scale: the factor that the gradient carries already.

    Returns:
        The scaled gradient and the factor that it carries now.
    """
    largest = float(gradient.abs().max())
    if not 0 < largest < math.inf:
        return gradient, scale
    exponent = math.log2(LARGEST) - math.ceil(math.log2(largest))
    factor = 2.0 ** min(exponent, 100)  # must be a float32 number itself
    return gradient * factor, scale * factor


def loss_gradient(text: TextRun, batch: Batch, hidden: Tensor, loss: str, seed: int) -> Tensor:
    """The gradient of the sum of all tokens' losses, times `HEAD_SCALE`.

    It is with respect to the last layer's output, `[rows, tokens, hidden]`.
    """
    ids = batch.ids.to(hidden.device)
    leaf = hidden.detach().requires_grad_()
    # One draw for each position of a document, however its positions are cut into steps.
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
    """Draw tokens by `chances`, `[positions, vocabulary]`, and uniform `draws`, `[positions]`."""
    sums = chances.cumsum(-1)
    # right=True: a token of probability 0 is never drawn. The last sum is 1 only up to rounding.
    return torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0].clamp_max(sums.shape[1] - 1)


def backward_bytes(shapes: Sequence[LayerShape], vocabulary: int, tokens: int, experts_per_token: int = 0) -> int:
    """An estimate of a backward pass' peak memory beside the weights, with float32 activations.

    It holds every layer's hidden states, one layer's graph, and logits of a few positions.

    Args:
        tokens: of the largest batch, padding included.
    """
    shape = max(shapes, key=lambda each: each.ffn)
    graph = 12 * shape.hidden + 6 * shape.ffn * max(1, experts_per_token) + 6 * shape.query_heads * shape.head_dim
    return 4 * (tokens * ((len(shapes) + 3) * shape.hidden + graph) + 4 * min(LOGITS, tokens * vocabulary))
