"""Choose the ridge of a least squares on text that its solution has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.pruning.solve import WHOLE, Moments, Rows
from expertprune.spec.values import Damping

DAMPINGS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
MIXTURES = 64

FIXED = 0.3  # for what nothing is held out from

Sums = TypeVar("Sums", Moments, Rows)


def fixed_damping(damping: Damping) -> float:
    """The damping where it is not chosen: of the spec, or `FIXED`."""
    return FIXED if damping == "auto" else damping


@dataclass
class Halves(Generic[Sums]):
    """The moments of two halves of the documents, on one device, and their number of outputs."""

    first: Sums
    second: Sums
    outputs: int
    device: torch.device

    def sums(self) -> Mapping[str, Tensor]:
        """What is added over the members of a team."""
        parts = {"first": self.first.sums(), "second": self.second.sums()}
        return {f"{name} of the {half} half": each for half, sums in parts.items() for name, each in sums.items()}

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor, batch: Batch) -> None:
        """Add the real tokens of a batch: those of every second document, or window of one, to each half.

        The other arguments are as of `Moments.add`.
        """
        rows = zip(batch.documents, batch.lengths, strict=True)
        place = torch.tensor([document % 2 for document, length in rows for _ in range(length)])
        for number, half in enumerate((self.first, self.second)):
            here = (place == number).nonzero()[:, 0].to(self.device)  # found on the host: no device waits
            half.add(inputs[here], residual[here], weight[here])

    def solved(self, damping: float, rows: slice = WHOLE) -> Tensor:
        """As `Moments.solved`, on the tokens of both halves, which are used up."""
        return self.first.with_all(self.second).solved(damping, rows)

    def best_damping(self) -> float:
        """The one of `DAMPINGS` with which the solution of each half leaves least of the other's residual.

        Of equal ones it is the largest. The solutions of a few random mixtures of the outputs are
        compared: the solution of a mixture is the mixture of the solutions, and the mean of its loss
        is the loss of all outputs.

        Raises:
            CheckpointError: none of them is enough for these inputs.
        """
        draws = torch.Generator().manual_seed(0)
        mixtures = torch.randn(MIXTURES, self.outputs, generator=draws).to(self.device)
        first, second = self.first.mixed(mixtures), self.second.mixed(mixtures)
        losses: dict[float, float] = {}
        for damping in reversed(DAMPINGS):
            try:
                losses[damping] = _held_out(first, second, damping) + _held_out(second, first, damping)
            except CheckpointError:
                break  # what is smaller fails too
        if not losses:
            raise CheckpointError(
                f"the least squares cannot be solved with damping {DAMPINGS[-1]:g}; set compensation.damping to more"
            )
        return min(losses, key=losses.__getitem__)


def _held_out(fitted: Sums, other: Sums, damping: float) -> float:
    """What the solution of one half leaves of the other's residual, less the residual itself."""
    return float(other.loss(replace(fitted).solved(damping)))
