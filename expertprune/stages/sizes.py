"""Budgets of several sizes from one spec."""

from __future__ import annotations

from collections.abc import Iterable

from expertprune.errors import SpecError
from expertprune.spec.schema import Budget
from expertprune.units import Structure


def sized_keys(budget: Budget) -> list[str]:
    """The keys of a budget that a size stands for: all parameters if it counts those, else each structure in it.

    `budget.retention` counts parameters too.

    Raises:
        SpecError: the budget removes nothing.
    """
    if budget.overall or budget.retention is not None:
        return ["parameters"]
    structures = [key for key in ("layers", *Structure) if getattr(budget, key)]
    if not structures and budget.vocabulary is not None:
        structures = ["vocabulary"]
    if not structures:
        raise SpecError("budget: it removes nothing: say which structures the budgets are of, or budget.parameters")
    return structures


def of_size(budget: Budget, keys: Iterable[str], size: float) -> Budget:
    """The budget that removes such a fraction of what its keys count."""
    changed: dict[str, float | None] = dict.fromkeys(keys, size)
    if "parameters" in changed:
        changed |= {"max_parameters": None, "retention": None}
    return Budget.model_validate({**budget.model_dump(), **changed})


def problem_of(size: object) -> str | None:
    """What is wrong with a size, if anything."""
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 1:
        return f"{size!r} is not a fraction to remove, above 0 and below 1"
    return None
