"""The exact change of the layer's output when a unit is removed."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion


@criterion("impact", paper="https://arxiv.org/abs/2506.02561")
def impact(statistics: UnitStatistics) -> Tensor:
    """Mean over tokens of the squared L2 norm of what the unit adds to its layer's output, `[documents, units]`.

    FFN neuron `j`: `mean_t a_tj² · ‖W_down[:, j]‖²`. Query head `h`: `mean_t ‖W_o[:, h] o_th‖²`. KV group: the same for
    the sum over its heads, cross terms included. This is Cus-Prun's change of the output, without ablation runs.
    """
    if statistics.impact is not None:
        return statistics.impact
    return statistics.per_unit((statistics.rms * statistics.output_l2).square_())
