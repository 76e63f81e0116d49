"""What a routed expert writes where the router sends it tokens."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


def routed_tokens(statistics: UnitStatistics) -> Tensor:
    """The tokens of each document that are routed to each routed expert, `[documents, experts]`."""
    assert statistics.routed is not None
    return statistics.routed


@criterion("reap", paper="https://arxiv.org/abs/2510.13999", structures=(Structure.EXPERTS,), weight=routed_tokens)
def reap(statistics: UnitStatistics) -> Tensor:
    """`mean_{t: routed to e} g_te ‖E_e(x_t)‖₂`, over a document's tokens, `[documents, experts]`.

    `g` is the weight with which the routed expert's output enters the sum: normalized over the chosen ones where the
    model does so. A document without such a token scores 0. Documents count in the mean over a corpus by the number of
    these tokens, so that it is the paper's mean over all tokens of the corpus that are routed to the expert. A maximum or
    a quantile over documents is one of the documents' own means, those of 0 included.
    """
    assert statistics.routed_norm is not None
    return statistics.routed_norm
