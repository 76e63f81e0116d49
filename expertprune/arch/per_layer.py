"""A causal language model each of whose layers has widths of its own, as its config's `per_layer_config` says.

transformers records such widths but builds every layer from the config's global ones. This module is copied into the
folder of an expert that has them, so it imports nothing of ours.
"""

from torch import nn
from transformers import PreTrainedModel


def with_layer_widths(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class `base` with its decoder layers built again, each from its own layer's config."""

    class ExpertForCausalLM(base):  # type: ignore[misc, valid-type]
        def __init__(self, config):  # type: ignore[no-untyped-def]
            super().__init__(config)
            decoder = self.get_decoder()
            decoder.layers = nn.ModuleList(
                type(layer)(config.per_layer_config[index], index) for index, layer in enumerate(decoder.layers)
            )
            self.post_init()

    return ExpertForCausalLM
