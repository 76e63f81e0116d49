"""A causal language model each of whose layers has widths of its own, as its config's `per_layer_config` says.

transformers records such widths but builds every layer from the config's global ones. This module is copied into the
folder of an expert that has them, so it imports nothing of ours.
"""

from torch import nn
from transformers import PreTrainedModel


def with_layer_widths(base: type[PreTrainedModel], path: str = "") -> type[PreTrainedModel]:
    """The class `base` with its decoder layers built again, each from its own layer's config.

    Args:
        path: where the layers stand in the model; default: the decoder's `layers`.
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
