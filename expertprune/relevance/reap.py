"""What an expert writes where the router sends it tokens."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("reap", paper="https://arxiv.org/abs/2510.13999", structures=(Structure.EXPERTS,))
def reap(statistics: UnitStatistics) -> Tensor:
    """`mean_{t: routed to e} g_te ‖E_e(x_t)‖₂`, `[documents, experts]`; 0 where a document has no such token.

    `g` is the weight with which the expert's output enters the sum: normalized over the chosen ones where the model does so.
    """
    assert statistics.routed_norm is not None
    return statistics.routed_norm
