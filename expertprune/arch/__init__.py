"""Model families as data: the tensors of each unit, the modules to observe, the config's keys for
widths.

Each family is one YAML file in `families/` or in a plugin. No module outside this package knows a
family's name.
"""

from expertprune.arch.blocks import Block, CoupledTensor, Experts, ExpertTensor
from expertprune.arch.bundled import bundled_models
from expertprune.arch.family import Family, families, family_of
from expertprune.arch.gguf import GgufForm, PreTokenizer, gguf_names
from expertprune.arch.recognition import USUAL_LAYERS, USUAL_SIZES, attention_of, recognized
from expertprune.arch.single_layers import EXPERT, MODELING, PER_LAYER, stock_architectures
from expertprune.arch.widths import grouped

__all__ = [
    "EXPERT",
    "MODELING",
    "PER_LAYER",
    "USUAL_LAYERS",
    "USUAL_SIZES",
    "Block",
    "CoupledTensor",
    "ExpertTensor",
    "Experts",
    "Family",
    "GgufForm",
    "PreTokenizer",
    "attention_of",
    "bundled_models",
    "families",
    "family_of",
    "gguf_names",
    "grouped",
    "recognized",
    "stock_architectures",
]
