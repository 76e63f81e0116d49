"""The control: units chosen at random."""

import torch
from torch import Tensor

from expertprune.relevance.statistics import UnitStatistics, criterion
from expertprune.units import Structure


@criterion("random", paper="https://arxiv.org/abs/1810.05270", sees_data=False, structures=tuple(Structure))
def random(statistics: UnitStatistics) -> Tensor:
    """Uniform random numbers from the seed, for all documents and corpora, `[documents, units]`."""
    generator = torch.Generator().manual_seed(statistics.seed)
    return torch.rand(statistics.units, generator=generator).expand(statistics.documents, -1)
