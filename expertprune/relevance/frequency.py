"""How often the router chooses a routed expert."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("frequency", paper="https://arxiv.org/abs/2206.00277", structures=(Structure.EXPERTS,))
def frequency(statistics: UnitStatistics) -> Tensor:
    """The share of a document's tokens that come to a routed expert, `[documents, experts]`."""
    assert statistics.frequency is not None
    return statistics.frequency
