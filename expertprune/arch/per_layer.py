"""A causal language model whose layers have different widths, as `per_layer_config` in its config
says.

transformers reads such widths but builds every layer from the global ones. This module is copied
into the folder of an expert with such layers, so it imports nothing from this package.
"""

from torch import nn
from transformers import PreTrainedModel


def with_layer_widths(base: type[PreTrainedModel], path: str = "") -> type[PreTrainedModel]:
    """A subclass of `base` that builds each decoder layer from that layer's own config.

    Args:
        path: the layers' place in the model; default: `layers` of the decoder.
    """

    class ExpertForCausalLM(base):  # type: ignore[misc, valid-type]
        def __init__(self, config):  # type: ignore[no-untyped-def]
            super().__init__(config)
            parent_path, _, name = path.rpartition(".")
            parent = self.get_submodule(parent_path) if path else self.get_decoder()
            layers = [
                type(layer)(config.per_layer_config[index], index)
                for index, layer in enumerate(getattr(parent, name or "layers"))
            ]
            setattr(parent, name or "layers", nn.ModuleList(layers))
            self.post_init()

    return ExpertForCausalLM
