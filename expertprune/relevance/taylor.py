"""The first-order change of the loss when a unit goes."""

from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion
from expertprune.units import Structure


@criterion("taylor", paper="https://arxiv.org/abs/2305.11627", needs=Pass.GRADIENT, structures=tuple(Structure))
def taylor(statistics: UnitStatistics) -> Tensor:
    """`|∂L_d/∂m_u|`, the first-order change of a document's mean loss, `[documents, units]`.

    LLM-Pruner sums `w · ∂L/∂w` over a group of weights. Over the weights that write a unit's
    output, that sum is the derivative with respect to the unit's mask.
    """
    assert statistics.gradient is not None
    return statistics.gradient.abs()
