"""What a criterion sees, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from expertprune.registry import Registry
from expertprune.units import DENSE, Structure


@dataclass(frozen=True)
class UnitStatistics:
    """The statistics of one structure in one layer on one corpus.

    A unit owns consecutive channels of its block's output projection: 1 for an FFN neuron,
    `head_dim` for a query head, `heads_per_group * head_dim` for a KV group. A routed expert counts
    as one channel.

    Attributes:
        rms: `[documents, channels]`, root mean square of each input channel over a document's
            tokens.
        impact: `[documents, units]`, mean squared norm of what the unit adds to the layer's output;
            `None` for FFN neurons, where it follows from `rms` and `output_l2`.
        output_l1: `[channels]`, L1 norm of each column of the output projection.
        output_l2: `[channels]`, L2 norm of the same.
        weight_norm: `[units]`, Frobenius norm of all weights that the unit owns.
        variance: `[channels]`, variance of each input channel over all tokens of the corpus, by their weight.
        tokens: `[documents]`, predicted tokens of each document.
        gradient: `[documents, units]`, derivative of the document's mean loss with respect to the
            unit's mask, at 1; `None` without the gradient pass.
        gradient_norm: `[documents, units]`, norm of the derivatives of the same loss with respect to a
            mask of its own on each segment of 8 tokens; `None` without the gradient pass.
        regional: `[documents, units]`, derivative of the mean norm of the layer's output with
            respect to the unit's mask; `None` without the regional pass.
        routed: of routed experts only, `[documents, experts]`: how many of a document's tokens are
            routed to each.
        frequency: of routed experts only, `[documents, experts]`: their share of all its tokens.
        routed_norm: of routed experts only, `[documents, experts]`: mean over these tokens of the
            router's weight times the norm of the routed expert's output; 0 where there are none.
        layer: position of the layer.
        seed: for criteria that draw random numbers; differs between structures and layers.
    """

    rms: Tensor
    impact: Tensor | None
    output_l1: Tensor
    output_l2: Tensor
    weight_norm: Tensor
    layer: int
    seed: int
    variance: Tensor | None = None
    tokens: Tensor | None = None
    gradient: Tensor | None = None
    gradient_norm: Tensor | None = None
    regional: Tensor | None = None
    frequency: Tensor | None = None
    routed: Tensor | None = None
    routed_norm: Tensor | None = None

    @property
    def units(self) -> int:
        return self.weight_norm.shape[0]

    @property
    def documents(self) -> int:
        return self.rms.shape[0]

    def per_unit(self, channels: Tensor) -> Tensor:
        """Sum over each unit's channels: `[..., channels]` to `[..., units]`."""
        if channels.shape[-1] == self.units:
            return channels
        return channels.unflatten(-1, (self.units, -1)).sum(-1)


UnitScores = Callable[[UnitStatistics], Tensor]


class Pass(StrEnum):
    """The passes over a corpus that measure something."""

    FORWARD = "forward"  # every profile has it
    GRADIENT = "gradient"  # one backward pass through the whole model
    REGIONAL = "regional"  # one backward pass through each layer alone
    VOCABULARY = "vocabulary"  # how often tokens occur, and how probable the model finds them


@dataclass(frozen=True)
class Criterion:
    """A named way to score units.

    Attributes:
        name: what a spec calls it.
        paper: the address of its source.
        score: gives `[documents, units]`; larger is more relevant.
        needs: the pass that it needs beyond the forward pass.
        sees_data: off where the scores are the same whatever the corpus.
        structures: those that it scores.
        weight: gives `[documents, units]`, at least 0: the weight of each document in the mean over
            a corpus; default: equal weights.
    """

    name: str
    paper: str
    score: UnitScores
    needs: Pass | None = None
    sees_data: bool = True
    structures: tuple[Structure, ...] = DENSE
    weight: UnitScores | None = None


criteria: Registry[Criterion] = Registry("criterion", group="expertprune.criteria")


def criterion(
    name: str,
    paper: str,
    needs: Pass | None = None,
    sees_data: bool = True,
    structures: tuple[Structure, ...] = DENSE,
    weight: UnitScores | None = None,
) -> Callable[[UnitScores], UnitScores]:
    """Register a function as the criterion `name` (see `Criterion`)."""

    def add(function: UnitScores) -> UnitScores:
        entry = Criterion(name, paper, function, needs, sees_data, structures, weight)
        criteria.register(name, module=function.__module__)(entry)
        return function

    return add
