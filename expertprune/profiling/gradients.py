"""Gradients of the loss with respect to the masks of units."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Experts, Family
from expertprune.artifacts.profile import halved
from expertprune.corpora.batches import Batch
from expertprune.models import layers as layerwise
from expertprune.progress import Progress
from expertprune.units import LayerShape

POSITIONS = 512  # whose logits are held at a time


class MaskGradients:
    """`Σ_t a_tc ∂L/∂a_tc` of the channels of one layer's output projections, per document and unit.

    This is the derivative with respect to a mask that multiplies the unit's channels, at 1; a KV group's is the sum over
    its query heads, so only heads are stored. An expert's mask multiplies what it writes, which is the sum over its neurons.
    """

    def __init__(self, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        self.ffn = torch.zeros(documents, shape.neurons)
        self.heads = torch.zeros(documents, shape.query_heads)

    def add(self, batch: Batch, heads: tuple[Tensor, Tensor], ffn: tuple[Tensor, Tensor] | None = None) -> None:
        """Each pair is the input of an output projection and its gradient, `[rows, tokens, channels]`."""
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            pairs = [heads] if ffn is None else [heads, ffn]
            part = [(a[row, :length].float() * g[row, :length].float()).sum(0).cpu() for a, g in pairs]
            self.heads[document] += part[0].unflatten(0, (self.shape.query_heads, -1)).sum(1)
            if ffn is not None:
                self.ffn[document] += part[1]

    def add_routed(
        self, layer: nn.Module, experts: Experts, batch: Batch, call: layerwise.Routed, gradient: Tensor
    ) -> None:
        """`gradient` `[tokens, hidden]` is that of what the experts of `layer` wrote together."""
        gradient = gradient.flatten(0, -2).float()
        for share in layerwise.shares(layer, experts, batch, call):
            value = (gradient[share.place] @ share.read) * share.neurons * share.weight[:, None]
            first = share.expert * self.shape.ffn
            self.ffn[:, first : first + self.shape.ffn].index_add_(0, share.document, value.cpu())

    def tensors(self, layer: int) -> dict[str, Tensor]:
        found = {**halved(f"ffn.{layer}.value", self.ffn), **halved(f"heads.{layer}.value", self.heads)}
        if self.shape.experts:
            found |= halved(f"experts.{layer}.value", self.ffn.unflatten(1, (self.shape.experts, -1)).sum(2))
        return found


@contextlib.contextmanager
def mask_graph(layer: nn.Module, family: Family, inputs: dict[str, Tensor], leaves: bool) -> Iterator[None]:
    """While open, gradients are on and the inputs of both output projections are noted in `inputs`.

    With `leaves`, they become the graph's leaves: the graph begins there. Where there are experts, `written` is what they
    write together.
    """

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
            yield
    finally:
        for handle in handles:
            handle.remove()


def count_documents(batches: Sequence[Batch]) -> int:
    return 1 + max(document for batch in batches for document in batch.documents)


# --- the whole model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_pass(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    batches: Sequence[Batch],
    loss: str,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Gradients of each document's mean loss with respect to the masks of all units.

    Args:
        loss: `language_model`, against the text's own next tokens; or `kl`, against tokens drawn from the model's own
            predictions, whose gradients have the curvature of `KL(dense ‖ masked)` as their second moment (the gradient
            of that divergence itself is zero at the dense model).
        seed: of the draws; each document has its own.
        progress: called after each batch.
    """
    documents = count_documents(batches)
    gradients = [MaskGradients(shape, documents) for shape in shapes]
    layers = layerwise.decoder_layers(model, family)
    for index, inputs, gradient, batch in backward(model, family, batches, loss, seed, progress):
        pairs = {name: (inputs[name], gradient[name]) for name in ("heads", "ffn") if name in inputs}
        gradients[index].add(batch, **pairs)
        if family.experts is not None:
            call = layerwise.Routed(*(inputs[name] for name in ("hidden", "chosen", "weights")))
            gradients[index].add_routed(layers[index], family.experts, batch, call, gradient["written"])
    return {name: tensor for layer, each in enumerate(gradients) for name, tensor in each.tensors(layer).items()}


def backward(
    model: Any, family: Family, batches: Sequence[Batch], loss: str, seed: int, progress: Progress | None = None
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor], Batch]]:
    """Batch by batch, and within a batch from the last layer to the first.

    Yields:
        The layer; the inputs of its output projections (`ffn`, `heads`); the loss's gradients with respect to them; and
        the batch. Of experts, instead of `ffn`, the inputs are what they are handed (`hidden`, `chosen`, `weights`) and
        what they write (`written`), and the gradient is that of the latter.
    """
    layers = layerwise.decoder_layers(model, family)
    for batch in batches:
        stream = layerwise.start(model, family, [batch])
        before = []
        for index, layer in enumerate(layers):
            before.append(stream.hidden[0])
            stream.hidden[0] = stream.run(layer, index, 0)
        gradient = loss_gradient(model, family, stream.hidden[0], batch, loss, seed)
        for index in reversed(range(len(layers))):
            inputs: dict[str, Tensor] = {}
            calls: list[layerwise.Routed] = []
            stream.hidden[0] = before.pop().detach().requires_grad_()
            with contextlib.ExitStack() as stack:
                if family.experts is not None:
                    stack.enter_context(layerwise.observed_routing(layers[index], family.experts, calls))
                stack.enter_context(mask_graph(layers[index], family, inputs, leaves=False))
                output = stream.run(layers[index], index, 0)
                below, *found = torch.autograd.grad(output, [stream.hidden[0], *inputs.values()], gradient)
            gradients = dict(zip(inputs, found, strict=True))
            inputs |= {name: value for call in calls for name, value in vars(call).items()}
            yield index, {name: value.detach() for name, value in inputs.items()}, gradients, batch
            gradient = below
        if progress is not None:
            progress()


def loss_gradient(model: Any, family: Family, hidden: Tensor, batch: Batch, loss: str, seed: int) -> Tensor:
    """The gradient of the sum over rows of their mean loss, with respect to the last layer's output.

    A few positions at a time, so that logits over a large vocabulary need no room; `[rows, tokens, hidden]`.
    """
    ids = batch.ids.to(hidden.device)
    leaf = hidden.detach().requires_grad_()
    # Of a whole document at once, so that its draws are the same however its positions are cut into steps.
    draws = [
        torch.rand(length - 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + document))
        for document, length in zip(batch.documents, batch.lengths, strict=True)
    ]
    total = torch.zeros_like(leaf)
    step = max(1, POSITIONS // ids.shape[0])
    for first in range(0, ids.shape[1] - 1, step):
        positions = torch.arange(first, min(first + step, ids.shape[1] - 1), device=ids.device)
        with torch.enable_grad(), layerwise.head_only(model, family, leaf):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits.float()
            targets = ids[:, first + 1 : first + 1 + positions.numel()].clone()
            weights = torch.zeros(targets.shape, device=ids.device)
            for row, length in enumerate(batch.lengths):
                count = max(0, min(length - 1, int(positions[-1]) + 1) - first)
                weights[row, :count] = 1 / (length - 1)
                if loss == "kl":
                    chances = torch.softmax(logits[row, :count].detach(), -1)
                    targets[row, :count] = _drawn(chances, draws[row][first : first + count].to(ids.device))
            each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += torch.autograd.grad((each * weights.flatten()).sum(), leaf)[0]
    return total


def _drawn(chances: Tensor, draws: Tensor) -> Tensor:
    """The token at which the sum of the chances passes a uniform draw, `[positions, tokens]` and `[positions]`."""
    sums = chances.cumsum(-1)
    # right: a token without a chance is never drawn; the last sum is one only up to rounding
    return torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0].clamp_max(sums.shape[1] - 1)


def backward_bytes(shapes: Sequence[LayerShape], vocabulary: int, tokens: int, experts_per_token: int = 0) -> int:
    """About what a backward pass holds at its peak beside the weights, were its activations in float32.

    Every layer's hidden states, one layer's graph, the logits of a few positions.

    Args:
        tokens: of the largest batch, padding included.
    """
    shape = max(shapes, key=lambda each: each.ffn)
    graph = 12 * shape.hidden + 6 * shape.ffn * max(1, experts_per_token) + 6 * shape.query_heads * shape.head_dim
    return 4 * (tokens * ((len(shapes) + 3) * shape.hidden + graph) + 4 * POSITIONS * vocabulary)
