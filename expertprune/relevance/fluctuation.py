"""How much a unit's contribution varies around its mean (a bias could replace the mean)."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion


@criterion("fluctuation", paper="https://arxiv.org/abs/2312.11983")
def fluctuation(statistics: UnitStatistics) -> Tensor:
    """FLAP's `Var_t(x_c) · ‖W_c‖₂²`, summed over a unit's channels `c`, `[documents, units]`.

    The variance is over all tokens of the corpus, so every document has the same score. It is the
    variance that the paper defines. FLAP's published code updates a running variance with the mean
    of the wrong batch.
    """
    assert statistics.variance is not None
    scores = statistics.per_unit(statistics.variance * statistics.output_l2.square())
    return scores.expand(statistics.documents, -1)
