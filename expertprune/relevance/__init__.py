"""Criteria: from the statistics of one structure in one layer to a score per document and unit.

A criterion is one decorated function in one file of this package: tensors in, one tensor out. Its
decorator gives its name, its paper, and the pass over the model that it needs.
"""

from expertprune.relevance.statistics import Criterion, Pass, UnitStatistics, criteria, criterion

# Importing a file registers its criterion. The list is explicit, so no import error is lost.
from expertprune.relevance import (  # isort: skip
    activation, fisher, fluctuation, frequency, impact, magnitude, random, reap, regional, taylor,
)  # fmt: skip

__all__ = [
    "Criterion", "Pass", "UnitStatistics", "activation", "criteria", "criterion", "fisher", "fluctuation", "frequency",
    "impact", "magnitude", "random", "reap", "regional", "taylor",
]  # fmt: skip
