"""What a routed expert writes on the tokens that are routed to it."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


def routed_tokens(statistics: UnitStatistics) -> Tensor:
    """The tokens of each document that are routed to each routed expert, `[documents, experts]`."""
    assert statistics.routed is not None
    return statistics.routed


@criterion("reap", paper="https://arxiv.org/abs/2510.13999", structures=(Structure.EXPERTS,), weight=routed_tokens)
def reap(statistics: UnitStatistics) -> Tensor:
    """`mean_{t: routed to e} g_te ‖E_e(x_t)‖₂` over a document's tokens, `[documents, experts]`.

    `g` is the router's weight as it enters the layer's output: normalized over the chosen routed
    experts where the model does so. A document without such tokens scores 0.

    The mean over a corpus weighs each document by the number of these tokens. It is therefore the
    paper's mean over all tokens of the corpus that are routed to the expert. A maximum or a
    quantile over documents takes the documents' own means, zeros included.
    """
    assert statistics.routed_norm is not None
    return statistics.routed_norm
