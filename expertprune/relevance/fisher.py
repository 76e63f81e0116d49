"""Second moment of the mask's gradient: the curvature of the loss."""

from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion
from expertprune.units import Structure


@criterion("fisher", paper="https://arxiv.org/abs/2204.09656", needs=Pass.GRADIENT, structures=tuple(Structure))
def fisher(statistics: UnitStatistics) -> Tensor:
    """`T_d (∂L_d/∂m_u)²`, the empirical Fisher information of a unit's mask, `[documents, units]`.

    `L_d` is the mean loss over the document's `T_d` predicted tokens. The gradients of single
    tokens are nearly uncorrelated. So `T_d` times the square of their mean estimates the mean of
    their squares, whatever the length.
    """
    assert statistics.gradient is not None
    assert statistics.tokens is not None
    return statistics.gradient.square() * statistics.tokens[:, None]
