"""Optimal brain surgeon for whole units: score, remove, update, and again."""

import torch
from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion

DAMPING = 0.01  # of the mean energy of an input channel, for the inverse
PENDING = 32  # removals of single channels between two updates of the matrices


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
    damped = moment.double()
    damping = float(DAMPING * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
    # float64: a massive channel and a quiet one differ by more than float32 can hold in one inverse
    inverse = torch.linalg.inv(damped + damping * torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device))
    inverse = (inverse + inverse.T) / 2
    columns = weight.double()
    order, costs = _remove_channels(columns, inverse) if width == 1 else _remove_blocks(columns, inverse, width)
    scores = torch.zeros(len(order), dtype=torch.float64, device=weight.device)
    scores[order] = torch.stack(costs).cummax(0).values
    return scores.float()


def _remove_channels(columns: Tensor, inverse: Tensor) -> tuple[list[int], list[Tensor]]:
    """The order and costs of removing single channels; `columns` is `[outputs, channels]`.

    A removal changes `G` by `−g gᵀ` and `W` by `−v gᵀ`, with `g = G_:c / √G_cc` and `v = W_c / √G_cc`. Costs need no more
    than the diagonal of `G` and the columns' squares, which are brought up to date at once; the matrices themselves, whose
    size makes the time, only after `PENDING` removals, when they shrink too.
    """
    names = list(range(inverse.shape[0]))
    order: list[int] = []
    costs: list[Tensor] = []
    while names:
        count = min(PENDING, len(names))
        g = inverse.new_zeros(count, len(names))  # now G is `inverse - g.T @ g`
        v = columns.new_zeros(count, columns.shape[0])  # and W is `columns - v.T @ g`
        diagonal, squares = inverse.diagonal().clone(), columns.square().sum(0)
        gone = torch.zeros(len(names), dtype=torch.bool, device=inverse.device)
        for k in range(count):
            cost = (squares / diagonal).masked_fill_(gone, torch.inf)
            channel = int(cost.argmin())
            order.append(names[channel])
            costs.append(cost[channel])
            gone[channel] = True
            root, before = diagonal[channel].sqrt(), g[:k, channel]
            g[k] = (inverse[channel] - before @ g[:k]) / root
            v[k] = (columns[:, channel] - before @ v[:k]) / root
            products = v[k] @ columns - (v[:k] @ v[k]) @ g[:k]  # of v and each column as it is now
            diagonal -= g[k].square()
            squares += g[k] * (g[k] * v[k].square().sum() - 2 * products)
        left = (~gone).nonzero()[:, 0]
        names = [names[channel] for channel in left.tolist()]
        inverse = inverse[left][:, left] - g[:, left].T @ g[:, left]
        columns = columns[:, left] - v.T @ g[:, left]
    return order, costs


def _remove_blocks(columns: Tensor, inverse: Tensor, width: int) -> tuple[list[int], list[Tensor]]:
    """The order and costs of removing units of `width` channels, of which there are few."""
    names = list(range(inverse.shape[0] // width))
    order: list[int] = []
    costs: list[Tensor] = []
    while names:
        parts = columns.unflatten(1, (len(names), width)).permute(1, 2, 0)  # [units, width, outputs]
        cost = (parts * torch.linalg.solve(_diagonal_blocks(inverse, width), parts)).sum((1, 2))
        unit = int(cost.argmin())
        order.append(names.pop(unit))
        costs.append(cost[unit])
        here = torch.arange(unit * width, (unit + 1) * width, device=inverse.device)
        left = torch.cat([torch.arange(int(here[0])), torch.arange(int(here[-1]) + 1, inverse.shape[0])]).to(
            here.device
        )
        step = torch.linalg.solve(inverse[here][:, here], inverse[here][:, left])  # [width, channels left]
        columns = columns[:, left] - columns[:, here] @ step
        inverse = inverse[left][:, left] - inverse[left][:, here] @ step
    return order, costs


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """`[units, width, width]`, the blocks on the diagonal of `[units · width, units · width]`."""
    units = matrix.shape[0] // width
    return matrix.unflatten(0, (units, width)).unflatten(2, (units, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
