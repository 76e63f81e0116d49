"""Activation norm times weight, for whole columns."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion


@criterion("activation", paper="https://arxiv.org/abs/2306.11695")
def activation(statistics: UnitStatistics) -> Tensor:
    """Wanda's `|W_ic| · ‖x_c‖₂`, summed over outputs `i` and channels `c`, `[documents, units]`.

    The norm is per token (a root mean square), so that documents of different lengths compare.
    """
    return statistics.per_unit(statistics.rms * statistics.output_l1)
