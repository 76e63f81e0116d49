"""Retention of one metric and of several together, paired by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertprune.artifacts.evaluation import Evaluation
from expertprune.corpora.documents import CorpusName

RESAMPLES = 2000


Floats = NDArray[np.float64]


# --- retention ------------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[NDArray[np.int64]], Floats], count: int, seed: int = 0) -> tuple[float, float]:
    """The central 95% of a statistic over resamples of `count` examples.

    Args:
        statistic: from indices `[resamples, count]` to values `[resamples]`.
    """
    indices = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    values = statistic(indices)
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


Indices = NDArray[np.int64]


_TAIL = 0.025  # more resamples than this without a retention: the interval has no end on that side


_EPSILON = 1e-12


@dataclass(frozen=True)
class Paired:
    """Base and expert on the same examples under one metric.

    `base`, `expert` and `weights` are `[examples]`: a model's metric is its sum over the sum of weights. `less_is_better`
    says that it is a cost, such as bits over bytes. `chance` is what guessing gets, where that is known. `expert_weights`
    are the expert's own, where its tokenizer leaves another part of the text to predict.
    """

    name: str
    group: str
    base: Floats
    expert: Floats
    weights: Floats
    chance: float | None = None
    less_is_better: bool = False
    expert_weights: Floats | None = None

    def retention(self, indices: Indices) -> Floats:
        """Retention over resamples, `[resamples, examples]` to `[resamples]`; not a number where it is undefined.

        `(expert - chance) / (base - chance)`, with chance 0 where it is not known, or base over expert where less is
        better: 1 where nothing was lost. Undefined where the base is no better than chance.
        """
        own = self.weights if self.expert_weights is None else self.expert_weights
        base = self.base[indices].sum(1) / self.weights[indices].sum(1)
        expert = self.expert[indices].sum(1) / own[indices].sum(1)
        if self.less_is_better:
            above, below = base, expert
        else:
            above, below = expert - (self.chance or 0.0), base - (self.chance or 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below > _EPSILON, above / below, np.nan)

    @property
    def point(self) -> float:
        """Retention over all examples."""
        return float(self.retention(np.arange(len(self.base))[None])[0])

    def entry(self) -> dict[str, Any]:
        """The metric of both, retention with its interval, and how many answers flipped each way.

        `gained` counts examples that the expert does better than the base, `lost` those that it does worse. `note` is there
        where retention or its interval is undefined, and says why.
        """
        own = self.weights if self.expert_weights is None else self.expert_weights
        base, expert = float(self.base.sum() / self.weights.sum()), float(self.expert.sum() / own.sum())
        (low, high), undefined = interval([self])
        result: dict[str, Any] = {
            "examples": len(self.base),
            "chance": self.chance,
            "base": base,
            "expert": expert,
            "retention": self.point,
            "low": low,
            "high": high,
            "gained": None if self.less_is_better else int((self.expert > self.base).sum()),
            "lost": None if self.less_is_better else int((self.expert < self.base).sum()),
        }
        guessing = f"chance ({self.chance:.4f})" if self.chance else "none right"
        if math.isnan(self.point):
            result["note"] = f"the base ({base:.4f}) is no better than {guessing}, so retention is undefined"
        elif undefined > _TAIL:
            result["note"] = (
                f"in {undefined:.0%} of the resamples the base is no better than {guessing}, so there is no interval: "
                "take more examples"
            )
        return result


def interval(metrics: Sequence[Paired]) -> tuple[tuple[float, float], float]:
    """The central 95% of the metrics' mean retention, and the share of resamples in which one of them has none.

    Examples are resampled within each metric, base and expert together. Where more than 2.5% of the resamples have no
    retention, that side of the interval has no end, and both ends are not numbers.
    """
    values = []
    for number, metric in enumerate(metrics):

        def keep(indices: Indices, metric: Paired = metric) -> Floats:
            values.append(metric.retention(indices))
            return values[-1]

        ends = bootstrap(keep, len(metric.base), seed=number)
    means = np.mean(values, axis=0)
    undefined = float(np.isnan(means).mean())
    if undefined > _TAIL:
        return (math.nan, math.nan), undefined
    if len(metrics) > 1:
        low, high = np.quantile(means[~np.isnan(means)], [0.025, 0.975])
        ends = float(low), float(high)
    return ends, undefined


def summarize(metrics: Sequence[Paired]) -> dict[str, dict[str, Any]]:
    """What is kept of the expert's purpose and in general: for each group the plain mean of its metrics' retention.

    Every metric counts the same, however many examples it has: bits per byte of each corpus, and the one metric of each
    task, above chance where chance is known. KL, which has no retention, and agreement do not count. A metric whose
    retention is undefined is left out and named. The 95% interval is that of the mean when the examples of each metric are
    resampled (`interval`).

    Returns:
        Of `expert` and `general`, where anything was measured: `retention`, `low`, `high`, the names of `metrics` that
        count and of those that are `undefined`.
    """
    summary = {}
    for group in ("expert", "general"):
        mine = [metric for metric in metrics if metric.group == group]
        defined = [metric for metric in mine if not math.isnan(metric.point)]
        if not mine:
            continue
        low = high = math.nan
        if defined:
            (low, high), _ = interval(defined)
        summary[group] = {
            "retention": float(np.mean([metric.point for metric in defined])) if defined else math.nan,
            "low": low,
            "high": high,
            "metrics": [metric.name for metric in defined],
            "undefined": [metric.name for metric in mine if metric not in defined],
        }
    return summary


def shortfalls(summary: dict[str, dict[str, Any]], floors: dict[str, float]) -> list[str]:
    """What keeps less than its floor, one line each; a retention that is undefined holds no floor."""
    found = []
    for group, floor in floors.items():
        value = summary.get(group, {}).get("retention", math.nan)
        if value is None or math.isnan(value):
            found.append(f"{group}: retention is undefined, and {floor:g} is asked for")
        elif value < floor:
            found.append(f"{group}: retention {value:.4f} is below {floor:g}")
    return found


def pooled(evaluation: Evaluation, general: bool) -> dict[str, Any] | None:
    """Retention over the documents of several corpora together, each document once; `None` where there are none.

    Bits of the base over bits of the expert, summed over documents, with a paired bootstrap interval over documents.

    Args:
        general: of the general corpora, rather than of the dimensions'.
    """
    documents = {
        document["digest"]: document
        for name, result in evaluation.corpora.items()
        if CorpusName.parse(name).is_general == general
        for document in result.get("per_document", [])
    }
    if not documents:
        return None
    size = sum(document["bytes"] for document in documents.values())
    base, expert = (
        np.array([document[key] for document in documents.values()], dtype=np.float64)
        for key in ("base_bits", "expert_bits")
    )
    low, high = bootstrap(lambda i: np.asarray(base[i].sum(1) / expert[i].sum(1), dtype=np.float64), len(base))
    return {
        "documents": len(documents),
        "base": float(base.sum() / size),
        "expert": float(expert.sum() / size),
        "retention": float(base.sum() / expert.sum()),
        "low": low,
        "high": high,
    }
