"""Second moment of the mask's gradient: the curvature of the loss."""

from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion
from expertprune.units import Structure


@criterion("fisher", paper="https://arxiv.org/abs/2204.09656", needs=Pass.GRADIENT, structures=tuple(Structure))
def fisher(statistics: UnitStatistics) -> Tensor:
    """`T_d Σ_s (∂L_d/∂m_us)²`, the empirical Fisher information of a unit's mask, `[documents, units]`.

    `L_d` is the mean loss over the document's `T_d` predicted tokens, and `m_us` multiplies the unit
    on segment `s` alone, 8 tokens in a row. The Fisher information is the mean over predictions of
    their squared gradients. One squared sum over a whole document estimates it too, with more noise,
    because a corpus has few documents. Squares of single tokens have the least noise, but leave out
    that the gradients of neighbours are correlated.
    """
    assert statistics.gradient_norm is not None
    assert statistics.tokens is not None
    return statistics.gradient_norm.square() * statistics.tokens[:, None]
