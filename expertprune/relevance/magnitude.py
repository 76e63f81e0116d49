"""Weights alone: no data."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion


@criterion("magnitude", paper="https://arxiv.org/abs/1608.08710", sees_data=False)
def magnitude(statistics: UnitStatistics) -> Tensor:
    """Frobenius norm of all weights that leave with the unit, the same for every document, `[documents, units]`."""
    return statistics.weight_norm.expand(statistics.documents, -1)
