"""Optimal brain surgeon for whole units: score, remove, update, and again."""

import torch
from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion

DAMPING = 0.01  # of the mean energy of an input channel, for the inverse


@criterion("obs", paper="https://arxiv.org/abs/2302.04089", needs=Pass.REMOVAL)
def obs(statistics: UnitStatistics) -> Tensor:
    """The error of a unit's removal in ZipLM's greedy order, `[documents, units]` (the same for every document)."""
    assert statistics.removal is not None
    return statistics.removal.expand(statistics.documents, -1)


def greedy_removal(weight: Tensor, moment: Tensor, width: int) -> Tensor:
    """Remove the units of an output projection one by one, cheapest first, updating the others; `[units]`.

    With `H = E[x xᵀ]`, `G = H⁻¹` of the channels that are left, `W` the columns as updated so far and `B` a unit's
    channels, removing the unit costs `tr(W_B (G_BB)⁻¹ W_Bᵀ)`, the least squares error of the layer's output when all other
    columns are re-solved; then `W ← W − W_B (G_BB)⁻¹ G_B:` and `G ← G − G_:B (G_BB)⁻¹ G_B:`. A unit's score is the largest
    cost up to its own removal, so that cutting in the order of scores is cutting in the greedy order.

    Args:
        weight: `[outputs, channels]`, the output projection.
        moment: `[channels, channels]`, mean of `x xᵀ` over tokens.
        width: channels of a unit, consecutive.

    Source: ZipLM, arXiv:2302.04089, algorithm 1.
    """
    channels = moment.shape[0]
    units = channels // width
    columns = weight.float().clone()
    damped = moment.double() + torch.eye(channels, dtype=torch.float64, device=moment.device) * float(
        DAMPING * moment.double().diagonal().mean() + torch.finfo(torch.float32).tiny
    )
    inverse = torch.linalg.inv(damped)
    inverse = ((inverse + inverse.T) / 2).float()
    scores = torch.zeros(units, device=weight.device)
    gone = torch.zeros(units, dtype=torch.bool, device=weight.device)
    squares = columns.square().sum(0)
    largest = torch.zeros((), device=weight.device)
    for _ in range(units):
        if width == 1:
            costs = squares / inverse.diagonal().clamp_min(1e-30)
        else:
            blocks = _diagonal_blocks(inverse, width)
            parts = columns.unflatten(1, (units, width)).permute(1, 2, 0)  # [units, width, outputs]
            eye = torch.eye(width, device=weight.device)
            solved = torch.linalg.solve(torch.where(gone[:, None, None], eye, blocks), parts)
            costs = (parts * solved).sum((1, 2))
        unit = int(costs.masked_fill(gone, torch.inf).argmin())
        largest = torch.maximum(largest, costs[unit])
        scores[unit] = largest
        gone[unit] = True
        here = slice(unit * width, (unit + 1) * width)
        rows = inverse[here].clone()  # [width, channels]
        step = torch.linalg.solve(rows[:, here], rows) if width > 1 else rows / rows[:, here]
        columns.addmm_(columns[:, here].clone(), step, alpha=-1)
        inverse.addmm_(rows.T.clone(), step, alpha=-1)
        columns[:, here] = 0
        inverse[here] = 0
        inverse[:, here] = 0
        if width == 1:
            squares = columns.square().sum(0)
    return scores


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """`[units, width, width]`, the blocks on the diagonal of `[units · width, units · width]`."""
    units = matrix.shape[0] // width
    return matrix.unflatten(0, (units, width)).unflatten(2, (units, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
