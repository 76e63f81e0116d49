"""The exact change of the layer's output when a unit is removed."""

from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("impact", paper="https://arxiv.org/abs/2506.02561", structures=tuple(Structure))
def impact(statistics: UnitStatistics) -> Tensor:
    """`mean_t ‖y_tu‖²`, with `y_tu` what unit `u` adds to the layer's output, `[documents, units]`.

    FFN neuron `j`: `mean_t a_tj² · ‖W_down[:, j]‖²`. Query head `h`: `mean_t ‖W_o[:, h] o_th‖²`. KV
    group: the same for the sum over its heads, cross terms included. Routed expert `e`:
    `mean_t g_te² ‖E_e(x_t)‖²`, where the router's weight `g` is 0 on tokens that go elsewhere.
    This is Cus-Prun's change of the output, without ablation runs.
    """
    if statistics.impact is not None:
        return statistics.impact
    return statistics.per_unit((statistics.rms * statistics.output_l2).square_())
