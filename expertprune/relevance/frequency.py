"""How often the router chooses an expert."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("frequency", paper="https://arxiv.org/abs/2206.00277", structures=(Structure.EXPERTS,))
def frequency(statistics: UnitStatistics) -> Tensor:
    """The part of a document's tokens that are routed to an expert, `[documents, experts]`."""
    assert statistics.frequency is not None
    return statistics.frequency
