"""Retention against arithmetic written out, and against slow resampling."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from expertprune.artifacts.evaluation import Average, CorpusResult, DocumentBits, Evaluation, Settings
from expertprune.evaluation.retention import (
    RESAMPLES,
    Counted,
    Paired,
    bootstrap,
    interval,
    pooled,
    shortfalls,
    summarize,
    tail,
)

Floats = NDArray[np.float64]


def answers(base: str, expert: str, chance: float | None = None) -> Paired:
    """Right and wrong answers as `"110"`."""
    mine, theirs = (np.array([float(c) for c in text]) for text in (base, expert))
    return Paired(mine, theirs, np.ones(len(mine)), chance)


def bits(base: list[float], expert: list[float], size: list[float]) -> Paired:
    return Paired(np.array(base), np.array(expert), np.array(size), less_is_better=True)


def resampled(metrics: list[Paired]) -> Floats:
    """The mean retention of each resample, with one generator for each metric."""
    kept = []
    for seed, metric in enumerate(metrics):
        drawn = np.random.default_rng(seed).integers(0, len(metric.base), size=(RESAMPLES, len(metric.base)))
        base, expert, weight = (each[drawn].sum(1) for each in (metric.base, metric.expert, metric.weights))
        if metric.less_is_better:
            kept.append(base / expert)
            continue
        above = base / weight - (metric.chance or 0)
        kept.append((expert / weight - (metric.chance or 0)) / np.where(above > 1e-12, above, np.nan))
    return np.mean(kept, 0)


def ends(values: Floats, outside: float) -> list[float]:
    return [float(q) for q in np.nanquantile(values, [outside, 1 - outside])]


BASE, EXPERT = "1111111110" * 3, "1111011101" * 3  # 27 and 24 of 30 right; 6 lost, 3 gained
# Student's t of 29 degrees is 2.0452 in the tables; as a normal deviate, after Hesterberg:
TAIL_30 = NormalDist().cdf(-2.0452 * math.sqrt(30 / 29))


def test_retention_above_chance_written_out() -> None:
    entry = answers(BASE, EXPERT, chance=0.25).measured()
    assert (entry.base, entry.expert, entry.examples) == (27 / 30, 24 / 30, 30)
    assert entry.retention == pytest.approx((0.8 - 0.25) / (0.9 - 0.25))
    assert (entry.gained, entry.lost, entry.chance) == (3, 6, 0.25)
    assert entry.note is None
    assert [entry.low, entry.high] == pytest.approx(ends(resampled([answers(BASE, EXPERT, chance=0.25)]), TAIL_30))
    assert entry.low < entry.retention < entry.high
    assert answers(BASE, EXPERT).measured().retention == pytest.approx(24 / 27)  # chance is not known


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    for count in (6, 12):  # the percentile interval of six examples holds it 85 times of 100
        held = 0
        for _ in range(400):
            sample = random.normal(size=count)
            low, high = bootstrap(lambda i, sample=sample: sample[i].mean(1), count)  # type: ignore[misc]
            held += low <= 0 <= high
        assert held / 400 == pytest.approx(0.95, abs=0.025)  # 2.3 standard errors


def test_metrics_of_a_mean_share_what_is_left_out() -> None:
    alone = NormalDist().cdf(-2.5706 * math.sqrt(6 / 5))  # t of 5 degrees is 2.5706
    assert tail([6], [0.3]) == tail([6]) == pytest.approx(alone, rel=1e-3)
    assert tail([6, 9], [0.3, 0.0]) == pytest.approx(alone, rel=1e-3)
    # two equal metrics of 6 have 10 degrees of freedom; t is 2.2281
    assert tail([6, 6], [1, 1]) == pytest.approx(NormalDist().cdf(-2.2281 * math.sqrt(6 / 5)), rel=1e-3)
    assert tail([100_000]) == pytest.approx(0.025, rel=1e-3)
    assert tail([6], [0.0]) == 0.025  # nothing varies


def test_a_base_no_better_than_chance_has_no_retention() -> None:
    for base, chance, reason in (("1000", 0.5, "chance (0.5000)"), ("1000", 0.25, "chance (0.2500)"),
                                 ("0000", None, "none right")):  # fmt: skip
        entry = answers(base, "1100", chance).measured()
        assert (entry.retention, entry.low, entry.high) == (None, None, None)
        assert f"is no better than {reason}, so retention is undefined" in str(entry.note)


def test_a_base_near_chance_has_a_retention_but_no_interval() -> None:
    metric = answers("1110100101", "1110000101", chance=0.5)
    entry = metric.measured()
    assert entry.retention == pytest.approx((0.5 - 0.5) / (0.6 - 0.5))
    share = np.isnan(resampled([metric])).mean()
    assert share > 0.025
    assert (entry.low, entry.high) == (None, None)
    assert f"in {share:.0%} of the resamples the base is no better than chance (0.5000)" in str(entry.note)
    several = [answers(BASE, EXPERT), metric]  # an interval needs all of them
    both, undefined = interval(several)
    assert np.isnan(both).all()
    assert undefined == np.isnan(resampled(several)).mean()


def test_a_single_example_has_no_interval() -> None:
    alone = bits([10.0], [12.0], [20.0])
    for entry in (alone.measured(), answers("1", "1").measured()):
        assert entry.retention is not None
        assert (entry.low, entry.high) == (None, None)
        assert entry.note == "there is no interval over a single example: take more"
    two = bits([1, 2], [2, 3], [1, 1])
    average = summarize([Counted("one", "expert", alone), Counted("two", "expert", two)])["expert"]["bits"]
    assert average.retention == pytest.approx((10 / 12 + 3 / 5) / 2)
    assert (average.low, average.high) == (None, None)


def test_the_summary_averages_bits_and_accuracy_apart() -> None:
    tasks = [answers(BASE, EXPERT, chance=0.25), answers(BASE, BASE)]
    text = bits([10.0, 20.0, 6.0], [12.0, 30.0, 6.0], [20.0, 40.0, 12.0])
    undefined = answers("0000", "1100", chance=0.25)
    named = {"one": tasks[0], "two": tasks[1], "text": text, "none": undefined}
    counted = [Counted(name, "expert", paired) for name, paired in named.items()]
    summary = summarize([*counted, Counted("other", "general", undefined)])
    accuracy, of_text = summary["expert"]["accuracy"], summary["expert"]["bits"]
    assert accuracy.retention == pytest.approx((0.55 / 0.65 + 1) / 2)
    assert (accuracy.metrics, accuracy.undefined) == (["one", "two"], ["none"])
    # the second task lost nothing, so that all the variance is of the first
    assert [accuracy.low, accuracy.high] == pytest.approx(ends(resampled(tasks), TAIL_30))
    assert (of_text.retention, of_text.metrics) == (36 / 48, ["text"])
    (other,) = summary["general"].values()
    assert (other.retention, other.undefined) == (None, ["other"])


def test_every_average_of_a_group_must_hold_its_floor() -> None:
    about = {"low": None, "high": None, "metrics": ["a"], "undefined": []}
    good, fair, unknown = (Average(retention=kept, **about) for kept in (0.99, 0.97, math.nan))
    expert, general = {"bits": good, "accuracy": fair}, {"accuracy": unknown}
    assert shortfalls({"expert": expert}, {"expert": 0.97}) == []
    assert shortfalls({"expert": expert, "general": general}, {"expert": 0.98, "general": 0.1}) == [
        "expert accuracy: retention 0.9700 is below 0.98",
        "general accuracy: retention is undefined, and 0.1 is asked for",
    ]
    assert shortfalls({}, {"general": 0.5}) == ["general: nothing was measured, and 0.5 is asked for"]


def test_documents_of_several_corpora_count_once_each_by_the_experts_own_bytes() -> None:
    about = {"tokens": 1, "kl_bits": None, "expert_tokens": 1}
    first = DocumentBits(digest="a", base_bits=10, expert_bits=12, bytes=20, expert_bytes=24, **about)
    second = DocumentBits(digest="b", base_bits=20, expert_bits=30, bytes=40, expert_bytes=40, **about)
    corpora = {
        name: CorpusResult(group=group, documents=len(rows), questions=0, metrics={}, per_document=rows)
        for name, group, rows in (("x", "expert", [first]), ("y", "expert", [first, second]), ("z", "general", []))
    }
    evaluation = Evaluation(settings=Settings(resamples=RESAMPLES), corpora=corpora)
    found = pooled(evaluation, "expert")
    assert found is not None
    assert (found.examples, found.base, found.expert) == (2, 30 / 60, 42 / 64)
    assert found.retention == pytest.approx((30 / 60) / (42 / 64))
    assert (found.low, found.high) == pytest.approx((20 / 40 / (30 / 40), 10 / 20 / (12 / 24)))  # of one document twice
    assert pooled(evaluation, "general") is None
    # The same conversation as answers and as plain text is two: the order of corpora makes no difference.
    for answers in (True, False):
        both = {
            name: CorpusResult(
                group="expert", documents=1, questions=0, metrics={}, answers_only=only, per_document=[row]
            )
            for name, only, row in (
                ("x", answers, first),
                ("y", not answers, second.model_copy(update={"digest": "a"})),
            )
        }
        found = pooled(Evaluation(settings=Settings(resamples=RESAMPLES), corpora=both), "expert")
        assert found is not None
        assert (found.examples, found.base, found.expert) == (2, 30 / 60, 42 / 64)
