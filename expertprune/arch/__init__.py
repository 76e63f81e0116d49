"""Model families as data: which tensors a unit couples, where to listen, which config keys say the widths.

One YAML file a family, in `families/`. No other module knows a family's name.
"""

from expertprune.arch.family import (
    EXPERT,
    MODELING,
    PER_LAYER,
    Block,
    CoupledTensor,
    Family,
    bundled_models,
    families,
    family_of,
    stock_architectures,
)

__all__ = [
    "EXPERT",
    "MODELING",
    "PER_LAYER",
    "Block",
    "CoupledTensor",
    "Family",
    "bundled_models",
    "families",
    "family_of",
    "stock_architectures",
]
