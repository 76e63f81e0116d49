"""The only definition of retention: what an expert keeps of its base, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy.special import ndtr, stdtrit

from expertprune.artifacts.evaluation import (
    Average,
    CorpusGroup,
    CorpusResult,
    DocumentBits,
    Evaluation,
    Group,
    Measure,
    Measured,
)
from expertprune.errors import SpecError
from expertprune.evaluation.arrays import Floats, Indices

RESAMPLES = 2000


_TAIL = 0.025  # what a 95% interval leaves out on each side


_EPSILON = 1e-12


# --- intervals ------------------------------------------------------------------------------------------------------


def tail(counts: Sequence[int], variances: Sequence[float] = (1.0,)) -> float:
    """The part of the resamples that a 95% interval leaves out on each side; 0.025 over many examples.

    Resamples of `n` examples vary `(n − 1) / n` as much as new samples do, and the variance is itself
    estimated: the interval reaches as far as Student's t does, `Φ(t · √(n / (n − 1)))` in place of
    `Φ(1.96)`. For a sum over several metrics, the variances add and Welch and Satterthwaite's
    formula gives the degrees of freedom.

    Source: Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789, the expanded percentile interval.

    Args:
        counts: examples of each metric, at least two.
        variances: of each metric over its resamples.
    """
    corrected = [variance * count / (count - 1) for count, variance in zip(counts, variances, strict=True)]
    total = sum(corrected)
    if not total > 0:
        return _TAIL
    freedom = total**2 / sum(each**2 / (count - 1) for count, each in zip(counts, corrected, strict=True))
    return float(ndtr(stdtrit(freedom, _TAIL) * math.sqrt(total / sum(variances))))


# --- one metric -----------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[Indices], Floats], count: int, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a statistic of `count` examples by its resamples (see `tail`); not numbers for fewer than two.

    Args:
        statistic: from indices `[resamples, count]` to values `[resamples]`.
    """
    if count < 2:
        return math.nan, math.nan
    indices = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    values = statistic(indices)
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan, math.nan
    outside = tail([count])
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Base and expert on the same examples under one metric.

    `base`, `expert` and `weights` are `[examples]`: a model's metric is its sum over the sum of
    weights.

    Args:
        chance: what guessing gets, where that is known.
        less_is_better: the metric is a cost, such as bits over bytes.
        expert_weights: the expert's own, where its tokenizer leaves another part of the text to
            predict.
        exponential: the metric is 2 to the power of that ratio, as perplexity is of bits over
            tokens.
    """

    base: Floats
    expert: Floats
    weights: Floats
    chance: float | None = None
    less_is_better: bool = False
    expert_weights: Floats | None = None
    exponential: bool = False

    def metrics(self, indices: Indices) -> tuple[Floats, Floats]:
        """The metric of base and expert: `[resamples, examples]` to `[resamples]` each."""
        own = self.weights if self.expert_weights is None else self.expert_weights
        with np.errstate(divide="ignore", invalid="ignore"):
            base = self.base[indices].sum(1) / self.weights[indices].sum(1)
            expert = self.expert[indices].sum(1) / own[indices].sum(1)
        return (np.exp2(base), np.exp2(expert)) if self.exponential else (base, expert)

    def retention(self, indices: Indices) -> Floats:
        """Retention: `[resamples, examples]` to `[resamples]`; not a number where undefined.

        `(expert - chance) / (base - chance)`, with chance 0 where it is not known; base over expert
        where less is better. It is 1 where nothing was lost, and undefined where the base is no
        better than chance.
        """
        base, expert = self.metrics(indices)
        above, below = (base, expert) if self.less_is_better else (expert, base)
        chance = 0.0 if self.less_is_better else self.chance or 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below - chance > _EPSILON, (above - chance) / (below - chance), np.nan)

    @property
    def counted(self) -> Indices:
        """The examples of which something counts: all but documents in which neither model predicts anything."""
        own = self.weights if self.expert_weights is None else self.expert_weights
        return np.flatnonzero(np.any([self.base, self.expert, self.weights, own], axis=0))

    @property
    def everything(self) -> Indices:
        """All examples, as one resample."""
        return np.arange(len(self.base))[None]

    @property
    def point(self) -> float:
        """Retention over all examples."""
        return float(self.retention(self.everything)[0])

    def measured(self) -> Measured:
        """The metric of both, retention with its interval, and flips each way."""
        base, expert = (float(metric[0]) for metric in self.metrics(self.everything))
        (low, high), undefined = interval([self])
        guessing = f"chance ({self.chance:.4f})" if self.chance else "none right"
        note = None
        if not self.less_is_better and math.isnan(self.point):
            note = f"the base ({base:.4f}) is no better than {guessing}, so retention is undefined"
        elif not self.less_is_better and undefined and math.isnan(low):
            note = (
                f"in {undefined:.0%} of the resamples the base is no better than {guessing}, so there is no interval: "
                "take more examples"
            )
        elif len(self.counted) < 2:
            note = "there is no interval over a single example: take more"
        return Measured(
            examples=len(self.counted),
            base=base,
            expert=expert,
            retention=self.point,
            low=low,
            high=high,
            chance=self.chance,
            gained=None if self.less_is_better else int((self.expert > self.base).sum()),
            lost=None if self.less_is_better else int((self.expert < self.base).sum()),
            note=note,
        )


def interval(metrics: Sequence[Paired]) -> tuple[tuple[float, float], float]:
    """The 95% interval of the mean retention, and the share of resamples in which a metric has none.

    Examples of which something counts are resampled within each metric, base and expert together.
    Where more resamples have no retention than the interval leaves out on a side (see `tail`), it has
    no end there, and both ends are not numbers. Nor are they where a metric has a single such example.
    """
    values, counts = [], []
    for seed, metric in enumerate(metrics):
        counted = metric.counted
        drawn = np.random.default_rng(seed).integers(0, max(1, len(counted)), size=(RESAMPLES, len(counted)))
        values.append(metric.retention(counted[drawn]))
        counts.append(len(counted))
    means = np.mean(values, axis=0)
    defined = means[~np.isnan(means)]
    undefined = float(np.isnan(means).mean())
    if not defined.size or min(counts) < 2:
        return (math.nan, math.nan), undefined
    outside = tail(counts, [float(np.nanvar(each)) for each in values])
    if undefined > outside:
        return (math.nan, math.nan), undefined
    low, high = np.quantile(defined, [outside, 1 - outside])
    return (float(low), float(high)), undefined


# --- bits of documents ----------------------------------------------------------------------------------------------


def _column(rows: Sequence[DocumentBits], key: str) -> Floats:
    values = [getattr(row, key) for row in rows]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def bits_per_byte(rows: Sequence[DocumentBits]) -> Paired:
    """Bits over bytes of documents, each model over the bytes that it predicts itself."""
    base, expert, size, own = (_column(rows, key) for key in ("base_bits", "expert_bits", "bytes", "expert_bytes"))
    return Paired(base, expert, size, less_is_better=True, expert_weights=own)


def document_metrics(rows: Sequence[DocumentBits], metrics: Iterable[str]) -> dict[str, Measured]:
    """Those of `bits_per_byte`, `perplexity`, `kl` (bits per token) and `agreement` that are asked for.

    Agreement is the share of tokens before which base and expert think the same token likeliest.
    """
    base, expert, kl, tokens = (_column(rows, key) for key in ("base_bits", "expert_bits", "kl_bits", "tokens"))
    result = {}
    for metric in metrics:
        if metric == "bits_per_byte":
            result[metric] = bits_per_byte(rows).measured()
        elif metric == "perplexity":
            result[metric] = Paired(base, expert, tokens, less_is_better=True, exponential=True).measured()
        elif metric == "kl":
            result[metric] = _to_base(kl, tokens)
        elif metric == "agreement":
            result[metric] = _to_base(_column(rows, "agreed"), tokens)
    return result


def _to_base(sums: Floats, weights: Floats) -> Measured:
    seen = np.flatnonzero(weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = bootstrap(lambda i: np.asarray(sums[seen[i]].sum(1) / weights[seen[i]].sum(1)), len(seen))
        return Measured(examples=len(seen), expert=float(sums.sum() / weights.sum()), low=low, high=high)


def pooled(evaluation: Evaluation, group: Group) -> Measured | None:
    """Bits per byte over all documents of a group, each once; `None` without documents."""
    corpora = [result for result in evaluation.corpora.values() if result.group == group]
    rows = {(row.digest, result.answers_only): row for result in corpora for row in result.per_document}
    return bits_per_byte(list(rows.values())).measured() if rows else None


# --- several metrics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A metric of the summary: its name, its group, and what base and expert have of it."""

    name: str
    group: CorpusGroup
    paired: Paired

    @property
    def measure(self) -> Measure:
        return "bits" if self.paired.less_is_better else "accuracy"


def bits_of_corpora(corpora: Mapping[str, CorpusResult]) -> list[Counted]:
    """What an average counts of corpora: the bits per byte of each that has documents."""
    return [
        Counted(f"{name} bits_per_byte", result.group, bits_per_byte(result.per_document))
        for name, result in corpora.items()
        if result.per_document
    ]


def summarize(metrics: Sequence[Counted]) -> dict[Group, dict[Measure, Average]]:
    """What is kept in bits of text and in accuracy of tasks, of the purpose and in general.

    Each number is the plain mean of the retentions of a group's metrics of one measure: every
    metric counts the same, however many examples it has. Metrics without a retention are left out
    and named. For the 95% interval of the mean, the examples of each metric are resampled
    (`interval`).
    """
    summary: dict[Group, dict[Measure, Average]] = {}
    for group in get_args(Group):
        for measure in get_args(Measure):
            if mine := [each for each in metrics if (each.group, each.measure) == (group, measure)]:
                summary.setdefault(group, {})[measure] = _average(mine)
    return summary


def _average(metrics: Sequence[Counted]) -> Average:
    defined = [each for each in metrics if not math.isnan(each.paired.point)]
    retention = low = high = math.nan
    if defined:
        retention = float(np.mean([each.paired.point for each in defined]))
        (low, high), _ = interval([each.paired for each in defined])
    return Average(
        retention=retention,
        low=low,
        high=high,
        metrics=[each.name for each in defined],
        undefined=[each.name for each in metrics if each not in defined],
    )


def check_floors(floors: Mapping[str, float], groups: Collection[str]) -> None:
    """Raises `SpecError` where a group has a floor, and nothing of it is going to be measured."""
    if missing := sorted(set(floors) - set(groups)):
        raise SpecError(
            f"--fail-under: nothing that is measured counts as {' or as '.join(missing)}: add a corpus or a suite that does"
        )


def held(summary: dict[Group, dict[Measure, Average]], floors: dict[str, float]) -> list[str]:
    """The averages that are no lower than their group's floor, a line each."""
    return [
        f"{group} {measure}: retention {average.retention:.4f}, the mean of {len(average.metrics)}, is at least {floor:g}"
        for group, averages in summary.items()
        for measure, average in averages.items()
        if (floor := floors.get(group)) is not None and average.retention is not None and average.retention >= floor
    ]


def shortfalls(summary: dict[Group, dict[Measure, Average]], floors: dict[str, float]) -> list[str]:
    """The averages below their group's floor, a line each; an undefined one is below any."""
    found = []
    for group in get_args(Group):
        if (floor := floors.get(group)) is None:
            continue
        averages = summary.get(group, {})
        if not averages:
            found.append(f"{group}: nothing was measured, and {floor:g} is asked for")
        for measure, average in averages.items():
            if average.retention is None:
                found.append(f"{group} {measure}: retention is undefined, and {floor:g} is asked for")
            elif average.retention < floor:
                found.append(f"{group} {measure}: retention {average.retention:.4f} is below {floor:g}")
    return found
