"""Gradients of the loss with respect to the masks of units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertprune.artifacts.profile import halved
from expertprune.corpora.batches import Batch
from expertprune.models.passes import Stream, TextRun
from expertprune.models.routed import RoutedCall
from expertprune.profiling.observation import Observation
from expertprune.profiling.rows import RowMass
from expertprune.units import LayerShape

# Scales keep gradients within half precision, from 2⁻²⁴ to 2¹⁶. Powers of two change no digit.
HEAD_SCALE = 2.0**8  # of the loss: the gradient of a logit is at most 1
LARGEST = 2.0**6  # of the gradients that enter a layer: within it, they may grow by 2¹⁰
SEGMENT = 8  # tokens


class MaskGradients:
    """`Σ_t a_tc ∂L/∂a_tc` of the channels of one layer's output projections, per document and unit.

    This is the derivative with respect to a mask that multiplies the unit's channels, at 1. That of
    a KV group is the sum over its query heads, so only heads are stored. The mask of a routed
    expert multiplies its output `y`, bias included: `Σ_t y_t · ∂L/∂y_t`.

    With `squares` also `Σ_s (Σ_{t in s} …)²` over segments of `SEGMENT` tokens, of every unit, KV
    groups and routed experts included. Sums stay on the device until the layer ends.
    """

    def __init__(
        self, shape: LayerShape, documents: int, device: torch.device | None = None, squares: bool = False
    ) -> None:
        self.shape = shape
        self.ffn = torch.zeros(documents, shape.neurons, device=device)
        self.heads = torch.zeros(documents, shape.query_heads, device=device)
        self.experts = torch.zeros(documents, shape.experts, device=device)
        widths = {"ffn": shape.neurons, "heads": shape.query_heads, "groups": shape.kv_heads, "experts": shape.experts}
        self.squares = {
            name: torch.zeros(documents, width, device=device) for name, width in widths.items() if width and squares
        }

    def add(
        self,
        batch: Batch,
        weights: Tensor,
        heads: tuple[Tensor, Tensor] | None = None,
        ffn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add one batch. No loss depends on padding, whose gradients are zero.

        Args:
            weights: a factor for the gradients of each row, `[rows]`, float32.
            heads, ffn: input and gradient of an output projection, `[rows, tokens, channels]` each.
        """
        documents = batch.on(weights.device).documents
        if heads is not None:
            parts = by_segment(*heads, weights).unflatten(2, (self.shape.query_heads, -1)).sum(3)
            self.heads.index_add_(0, documents, parts.sum(1))
            self._add_squares("heads", documents, parts)
            self._add_squares("groups", documents, parts.unflatten(2, (self.shape.kv_heads, -1)).sum(3))
        if ffn is not None:
            parts = by_segment(*ffn, weights)
            self.ffn.index_add_(0, documents, parts.sum(1))
            self._add_squares("ffn", documents, parts)

    def _add_squares(self, name: str, documents: Tensor, parts: Tensor) -> None:
        """Add the squares of `[rows, segments, units]`."""
        if name in self.squares:
            self.squares[name].index_add_(0, documents, parts.square().sum(1))

    def add_routed(self, batch: Batch, weights: Tensor, call: RoutedCall, neurons: Tensor, written: Tensor) -> None:
        """Add a batch; `neurons`, `[pairs, ffn]`, and `written`, `[pairs, hidden]`, are the call's gradients.

        A router's weight multiplies both behind their masks, so the gradients have it.
        """
        rows, length = batch.ids.shape
        row, place = call.pairs.token // length, call.pairs.token % length
        segments = -(-length // SEGMENT)
        here = (row * segments + place // SEGMENT) * self.shape.experts + call.pairs.expert
        documents, of_pairs = batch.on(weights.device).documents, weights.index_select(0, row)[:, None]
        of_experts = (call.written.float() * written).sum(1, keepdim=True)
        for name, sums, own in (
            ("ffn", self.ffn, call.neurons.float() * neurons),
            ("experts", self.experts, of_experts),
        ):
            parts = own.new_zeros(rows * segments * self.shape.experts, own.shape[1])
            parts = parts.index_add_(0, here, own * of_pairs).view(rows, segments, -1)
            sums.index_add_(0, documents, parts.sum(1))
            self._add_squares(name, documents, parts)

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place. A document is with one member only."""
        return {
            "ffn": self.ffn,
            "heads": self.heads,
            "experts": self.experts,
            **{f"squares of {name}": each for name, each in self.squares.items()},
        }

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        ffn, heads = self.ffn.cpu(), self.heads.cpu()
        found = {**halved(f"ffn.{index}.value", ffn), **halved(f"heads.{index}.value", heads)}
        if self.shape.experts:
            found |= halved(f"experts.{index}.value", self.experts.cpu())
        for name, each in self.squares.items():
            found |= halved(f"{name}.{index}.norm", each.cpu().sqrt())
        return found


def by_segment(values: Tensor, gradients: Tensor, weights: Tensor) -> Tensor:
    """`w Σ_{t in s} a_tc g_tc`, float32: two of `[rows, tokens, channels]` to `[rows, segments, channels]`.

    Args:
        weights: of the rows, `[rows]`.
    """
    each = values.float() * gradients
    full = each.shape[1] // SEGMENT
    parts = each[:, : full * SEGMENT].unflatten(1, (full, SEGMENT)).sum(2)
    rest = each[:, full * SEGMENT :].sum(1, keepdim=True)
    return torch.cat([parts, rest], 1) * weights[:, None, None]


@dataclass(frozen=True)
class Taped:
    """One batch's run through a layer, with its graph."""

    before: Tensor
    after: Tensor
    seen: Observation

    @classmethod
    def run(cls, stream: Stream, layer: nn.Module, index: int, number: int, before: Tensor, seen: Observation) -> Taped:
        """Run one batch of a stream; `seen` observes the layer."""
        leaf = before.detach().requires_grad_()
        with torch.enable_grad():
            return cls(leaf, stream.run(layer, index, number, leaf), seen.taken())

    def backward(self, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From the gradient of the output to that of the input, and to those of what masks multiply."""
        inputs = self.seen.inputs
        below, *found = torch.autograd.grad(self.after, [self.before, *inputs.values()], gradient)
        return below, dict(zip(inputs, found, strict=True))


@dataclass(frozen=True)
class Upstream:
    """The gradient of the sum of a batch's losses, times `scale`, a power of two: a float64 scalar on the device."""

    gradient: Tensor
    scale: Tensor

    @classmethod
    def at_the_head(cls, gradient: Tensor) -> Upstream:
        """From a gradient that carries `HEAD_SCALE`."""
        return cls(gradient, torch.tensor(HEAD_SCALE, dtype=torch.float64, device=gradient.device)).rescaled()

    def rescaled(self) -> Upstream:
        """The same with its largest element at about `LARGEST`."""
        return Upstream(*rescaled(self.gradient, self.scale))

    def through(self, taped: Taped, batch: Batch, into: MaskGradients) -> Upstream:
        """Backpropagate one batch through a layer, and add the gradients of its units' masks to `into`.

        The division by the number of a document's losses comes last, in float32: the gradient of
        their mean over hundreds of tokens would vanish in half precision.
        """
        below, found = taped.backward(self.gradient)
        weights = (1 / (self.scale * batch.on(self.scale.device).predicted)).float()
        values = taped.seen.values()
        into.add(batch, weights, **{name: (values[name], found[name]) for name in ("heads", "ffn") if name in found})
        if taped.seen.routed is not None:
            into.add_routed(batch, weights, taped.seen.routed, found["neurons"], found["written"])
        return Upstream(below, self.scale).rescaled()


def rescaled(gradient: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply a gradient by a power of two that brings its largest element to about `LARGEST`.

    Backpropagation is linear, so a scale can be divided out at the end. Nothing here waits for the
    device.

    Args:
        scale: the factor that the gradient carries already, a float64 scalar.

    Returns:
        The scaled gradient and the factor that it carries now.
    """
    largest = gradient.abs().max().double()
    exponent = math.log2(LARGEST) - largest.log2().ceil()
    factor = torch.exp2(exponent.clamp(max=100))  # must be a float32 number itself
    factor = torch.where((largest > 0) & largest.isfinite(), factor, torch.ones_like(factor))
    return (gradient.float() * factor.float()).to(gradient.dtype), scale * factor


def loss_gradient(
    text: TextRun,
    batch: Batch,
    hidden: Tensor,
    loss: str,
    seed: int = 0,
    mass: RowMass | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """The gradient of the sum of the losses of all tokens that count, times `HEAD_SCALE`.

    It is with respect to the last layer's output, `[rows, tokens, hidden]`. With respect to the logits
    it is `softmax(logits) − one_hot(target)`: the one softmax serves gradient, mass and losses, since
    everything that is as large as the logits costs time.

    Args:
        loss: `language_model`, against the text's own next tokens; or `kl`, against tokens drawn
            from the model's own predictions. The second moment of the latter's gradients is the
            curvature of `KL(dense ‖ masked)`, whose own gradient is zero at the dense model.
        seed: of the draws; each document has its own.
        mass: takes the probabilities of the same predictions.
        losses: takes the documents' mean losses against their own next tokens, `[documents]`, in nats.
    """
    ids, length = batch.ids.to(hidden.device), batch.ids.shape[1]
    leaf = hidden.detach().requires_grad_()
    draws = _draws(batch, seed).to(hidden.device) if loss == "kl" else None
    counted = nn.functional.pad(batch.targets, (0, 1)).to(hidden.device)  # the last position predicts nothing
    following = ids.roll(-1, 1)
    total = torch.zeros_like(leaf)
    with torch.enable_grad():
        for first, logits in text.logits(batch, leaf, until=length if mass is not None else length - 1):
            here = slice(first, first + logits.shape[1])
            chances = torch.softmax(logits.detach(), -1)
            if mass is not None:
                mass.add(batch, first, chances)
            targets = following[:, here]
            if losses is not None:
                _add_losses(losses, batch, chances, targets, counted[:, here])
            if draws is not None:
                targets = _drawn(chances, draws[:, here])
            slopes = _less_one(chances, targets).mul_(counted[:, here, None] * HEAD_SCALE)
            total += torch.autograd.grad(logits, leaf, slopes)[0]
    return total


def _less_one(chances: Tensor, targets: Tensor) -> Tensor:
    """Take 1 from the probability of each target, in place: `[rows, positions, vocabulary]` and `[rows, positions]`."""
    return chances.scatter_add_(-1, targets[..., None], chances.new_full((*targets.shape, 1), -1.0))


def _add_losses(losses: Tensor, batch: Batch, chances: Tensor, targets: Tensor, counted: Tensor) -> None:
    """Add some positions' share in their documents' mean losses, of at most 87 nats a token."""
    chosen = chances.gather(-1, targets[..., None])[..., 0]
    each = -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()
    sums = (each * counted).sum(1)
    places = batch.on(losses.device)
    losses.index_add_(0, places.documents, (sums / places.predicted).float())


def _draws(batch: Batch, seed: int) -> Tensor:
    """A uniform draw for each position, `[rows, tokens]`, however batches and positions are cut."""
    draws = torch.zeros(batch.ids.shape)
    for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + document)
        draws[row, : length - 1] = torch.rand(length - 1, generator=generator)
    return draws


def _drawn(chances: Tensor, draws: Tensor) -> Tensor:
    """Draw tokens by `chances`, `[rows, positions, vocabulary]`, and uniform `draws`, `[rows, positions]`."""
    sums = chances.cumsum(-1)
    # right=True: a token of probability 0 is never drawn. The last sum is 1 only up to rounding.
    places = torch.searchsorted(sums, draws[..., None] * sums[..., -1:], right=True)[..., 0]
    return places.clamp_max(sums.shape[-1] - 1)
