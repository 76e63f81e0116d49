"""Metrics of tasks: those that compare base and expert example by example."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from expertprune.errors import SpecError
from expertprune.evaluation.harness.scores import Leaf
from expertprune.registry import nearest

_PREFERRED = ("exact_match", "acc_norm", "acc", "f1", "bits_per_byte", "byte_perplexity", "word_perplexity")


# Metrics that are sums of log-likelihoods over bytes or words, and what they are reported as.
_RATES = {"bits_per_byte": "bits_per_byte", "byte_perplexity": "bits_per_byte", "word_perplexity": "bits_per_word"}


def reported(metric: str) -> str:
    """A metric's name in results; perplexities are reported as bits."""
    return _RATES.get(metric, metric)


def less_is_better(metric: str) -> bool:
    """Whether a metric, as it is reported, is a cost."""
    return metric in _RATES.values()


def chosen_metric(label: str, asked: str | None, leaves: Collection[Leaf]) -> str:
    """The metric of a task: the one that is asked for, else the first that can be paired.

    Args:
        label: the task.
        leaves: its members; all of them need the metric.

    Raises:
        SpecError: there is no such metric, or base and expert cannot be paired under it.
    """
    names = [[_name(each["metric"]) for each in getattr(leaf.config, "metric_list", None) or []] for leaf in leaves]
    if not names[0]:
        raise SpecError(f"task {label}: it is computed by code of its own, not by example; choose another task")
    shared = [name for name in names[0] if all(name in others for others in names)]
    if asked is not None and asked not in shared:
        raise SpecError(f"task {label}: it has no metric {asked!r}{nearest(asked, shared)}")
    problems = {name: _problem(name, leaves) for name in shared}
    paired = [name for name in shared if problems[name] is None]
    wanted = [asked] if asked is not None else [*_PREFERRED, *paired]
    if chosen := next((name for name in wanted if name in paired), None):
        return chosen
    first = asked if asked is not None else shared[0] if shared else names[0][0]
    other = f"metric, such as {', '.join(paired)}" if paired else "task"
    why = problems.get(first) or "is not a metric of all its members"
    raise SpecError(f"task {label}: {first} {why}; choose another {other}")


def _name(metric: Any) -> str:
    """The name of a metric, which may be a function of the task's own."""
    return str(getattr(metric, "__name__", metric))


def _problem(metric: str, leaves: Collection[Leaf]) -> str | None:
    """Why base and expert cannot be paired by example under a metric; `None`: they can."""
    from lm_eval.api.registry import get_aggregation

    if metric in _RATES:
        return None
    if any(leaf.aggregation().get(metric) is not get_aggregation("mean") for leaf in leaves):
        return "is not a mean over examples, so base and expert cannot be paired"
    if not all(leaf.higher_is_better().get(metric, True) for leaf in leaves):
        return "is a cost, and what a task keeps is counted in right answers"
    return None


def value_of(label: str, metric: str, value: Any) -> tuple[float, float]:
    """What an example adds to the numerator and the denominator of a metric.

    Raises:
        SpecError: the task gives the example no number.
    """
    if metric in _RATES and isinstance(value, tuple | list):
        return -float(value[0]) / math.log(2), float(value[1])
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    raise SpecError(
        f"task {label}: {metric} of an example is {type(value).__name__}, not a number, so base and expert cannot be "
        "paired; choose another metric"
    )
