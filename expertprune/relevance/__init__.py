"""Criteria: from the statistics of one structure in one layer to a score per document and unit.

A criterion is one decorated function in one file of this package: pure tensors in, one tensor out. It is found by the
name that it registers, and carries the address of its paper and the pass over the model that it needs, if any.
"""

from expertprune.relevance.statistics import Criterion, Pass, UnitStatistics, criteria, criterion

# Importing a file registers its criterion; the list is explicit so that nothing is scanned and no error is swallowed.
from expertprune.relevance import (  # isort: skip
    activation, fisher, fluctuation, frequency, impact, magnitude, random, reap, regional, taylor,
)  # fmt: skip

__all__ = [
    "Criterion", "Pass", "UnitStatistics", "activation", "criteria", "criterion", "fisher", "fluctuation", "frequency",
    "impact", "magnitude", "random", "reap", "regional", "taylor",
]  # fmt: skip
