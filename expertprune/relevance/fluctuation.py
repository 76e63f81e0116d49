"""How much a unit's contribution varies around its mean, which a bias could replace."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion


@criterion("fluctuation", paper="https://arxiv.org/abs/2312.11983")
def fluctuation(statistics: UnitStatistics) -> Tensor:
    """FLAP's weighted input variance `Var_t(x_c) · ‖W_c‖₂²`, summed over a unit's channels, `[documents, units]`.

    The variance is over all tokens of the corpus, the same for every document. FLAP's published code updates its running
    variance with the mean of the wrong batch; this is the variance that the paper defines.
    """
    assert statistics.variance is not None
    scores = statistics.per_unit(statistics.variance * statistics.output_l2.square())
    return scores.expand(statistics.documents, -1)
