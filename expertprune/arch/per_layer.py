"""A causal language model whose layers have different widths, as `per_layer_config` in its config
says.

transformers reads such widths but builds every layer from the global ones. This module is copied
into the folder of an expert with such layers, so it imports nothing from this package.
"""

from torch import nn
from transformers import PreTrainedModel


def model_with_layer_widths(base: type[PreTrainedModel], path: str = "layers") -> type[PreTrainedModel]:
    """A subclass of the decoder `base` that builds each layer from that layer's own config.

    vLLM's Transformers backend builds this class, which `auto_map` calls `AutoModel`.

    Args:
        path: the layers' place in the decoder.
    """

    class ExpertModel(base):  # type: ignore[misc, valid-type]
        def __init__(self, config):  # type: ignore[no-untyped-def]
            super().__init__(config)
            parent_path, _, name = path.rpartition(".")
            parent = self.get_submodule(parent_path)
            layers = [
                type(layer)(config.per_layer_config[index], index) for index, layer in enumerate(getattr(parent, name))
            ]
            setattr(parent, name, nn.ModuleList(layers))
            self.post_init()

    return ExpertModel


def with_layer_widths(base: type[PreTrainedModel], model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the causal language model `base` around the decoder class `model`."""

    class ExpertForCausalLM(base):  # type: ignore[misc, valid-type]
        def __init__(self, config):  # type: ignore[no-untyped-def]
            super().__init__(config)
            setattr(self, self.base_model_prefix, model(config))
            self.post_init()

    return ExpertForCausalLM
