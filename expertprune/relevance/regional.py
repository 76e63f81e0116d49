"""Gradients inside one layer, without a backward pass through the whole model."""

from torch import Tensor

from expertprune.relevance.statistics import Pass, UnitStatistics, criterion


@criterion("regional", paper="https://arxiv.org/abs/2503.04992", needs=Pass.REGIONAL)
def regional(statistics: UnitStatistics) -> Tensor:
    """`|∂N_d/∂m_u| + (Σ_c ‖W_c‖₂² mean_t x_tc²)^½`, after Wanda++, `[documents, units]`.

    `N_d` is the mean norm of the layer's output over the document's tokens. The first term is, to
    first order, what that norm loses without the unit. The second is the norm of what the unit
    writes, which is Wanda's score for a whole unit. Both are norms of outputs, so they add without
    a constant.
    """
    assert statistics.regional is not None
    written = statistics.per_unit((statistics.rms * statistics.output_l2).square()).sqrt()
    return statistics.regional.abs() + written
