"""The norm of a unit's weights, without data."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("magnitude", paper="https://arxiv.org/abs/1608.08710", sees_data=False, structures=tuple(Structure))
def magnitude(statistics: UnitStatistics) -> Tensor:
    """Frobenius norm of all weights that a unit owns, for all documents, `[documents, units]`."""
    return statistics.weight_norm.expand(statistics.documents, -1)
