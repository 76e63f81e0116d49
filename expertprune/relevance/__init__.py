"""Criteria: from the statistics of one structure in one layer to a score per document and unit.

A criterion is one decorated function in one file of this package: pure tensors in, one tensor out. It is found by the
name that it registers, and carries the address of its paper.
"""

from expertprune.relevance.statistics import Criterion, UnitStatistics, criteria, criterion

# Importing a file registers its criterion; the list is explicit so that nothing is scanned and no error is swallowed.
from expertprune.relevance import activation, impact, magnitude, random  # isort: skip

__all__ = ["Criterion", "UnitStatistics", "activation", "criteria", "criterion", "impact", "magnitude", "random"]
