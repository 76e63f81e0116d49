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

    A unit owns `channels_per_unit` consecutive channels of its block's output projection: 1 for an FFN neuron,
    `head_dim` for a query head, `heads_per_group * head_dim` for a KV group.

    Attributes:
        rms: `[documents, channels]`, root mean square of each input channel over a document's tokens.
        impact: `[documents, units]`, mean squared norm of what the unit adds to the layer's output, or `None` for units
            of one channel, where it follows from `rms` and `output_l2`.
        output_l1: `[channels]`, L1 norm of each column of the output projection.
        output_l2: `[channels]`, L2 norm of the same.
        weight_norm: `[units]`, Frobenius norm of all weights that leave with the unit.
        variance: `[channels]`, variance of each input channel over all tokens of the corpus.
        tokens: `[documents]`, predicted tokens of each document.
        gradient: `[documents, units]`, derivative of the document's mean loss with respect to the unit's mask at 1, from
            the backward pass; `None` where that pass was not made.
        regional: `[documents, units]`, derivative of the mean norm of the layer's output with respect to the unit's mask,
            from one backward pass per layer; `None` where it was not made.
        frequency: `[documents, experts]`, part of a document's tokens that are routed to an expert; `None` for other units.
        routed_norm: `[documents, experts]`, mean over the tokens routed to an expert of the router's weight times the norm
            of the expert's output, 0 where there are none; `None` for other units.
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
    regional: Tensor | None = None
    frequency: Tensor | None = None
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


Scores = Callable[[UnitStatistics], Tensor]


class Pass(StrEnum):
    """What a criterion needs beyond the forward pass that every profile has."""

    GRADIENT = "gradient"  # one backward pass through the whole model
    REGIONAL = "regional"  # one backward pass through each layer alone


@dataclass(frozen=True)
class Criterion:
    """A named way to score units: `score` gives `[documents, units]`, larger is more relevant.

    `sees_data` is off where the scores are the same whatever the corpus; `structures` are those that it scores.
    """

    name: str
    paper: str
    score: Scores
    needs: Pass | None = None
    sees_data: bool = True
    structures: tuple[Structure, ...] = DENSE


criteria: Registry[Criterion] = Registry("criterion", group="expertprune.criteria")


def criterion(
    name: str,
    paper: str,
    needs: Pass | None = None,
    sees_data: bool = True,
    structures: tuple[Structure, ...] = DENSE,
) -> Callable[[Scores], Scores]:
    """Register a function as the criterion `name`; `paper` is its source's address, `needs` the pass beyond forward."""

    def add(function: Scores) -> Scores:
        entry = Criterion(name, paper, function, needs, sees_data, structures)
        criteria.register(name, module=function.__module__)(entry)
        return function

    return add
