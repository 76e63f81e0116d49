"""Model families as data: which tensors a unit couples, where to listen, which config keys say the widths.

One YAML file a family, in `families/`. No other module knows a family's name.
"""

from expertprune.arch.family import (
    MODELING,
    PER_LAYER,
    Block,
    CoupledTensor,
    Family,
    bundled_models,
    families,
    family_of,
)

# The GGUF format's name for SentencePiece tokenizers, which begin text with BOS unless the file says otherwise.
GGUF_SENTENCEPIECE = "llama"

__all__ = [
    "GGUF_SENTENCEPIECE",
    "MODELING",
    "PER_LAYER",
    "Block",
    "CoupledTensor",
    "Family",
    "bundled_models",
    "families",
    "family_of",
]
