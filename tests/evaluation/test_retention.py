"""Retention against arithmetic written out, and against slow resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expertprune.evaluation.retention import RESAMPLES, Paired, interval, shortfalls, summarize


def answers(name: str, base: str, expert: str, chance: float | None = None, group: str = "expert") -> Paired:
    """Right and wrong answers as `"110"`."""
    mine, theirs = (np.array([float(c) for c in text]) for text in (base, expert))
    return Paired(name, group, mine, theirs, np.ones(len(mine)), chance)


def bits(name: str, base: list[float], expert: list[float], size: list[float], group: str = "expert") -> Paired:
    return Paired(name, group, np.array(base), np.array(expert), np.array(size), less_is_better=True)


def slow(metrics: list[Paired]) -> list[float]:
    """The mean retention of each resample, one example at a time, with one generator for each metric."""
    drawn = [
        np.random.default_rng(seed).integers(0, len(m.base), size=(RESAMPLES, len(m.base))).tolist()
        for seed, m in enumerate(metrics)
    ]
    means = []
    for resample in range(RESAMPLES):
        kept = []
        for metric, indices in zip(metrics, drawn, strict=True):
            base = sum(metric.base[i] for i in indices[resample])
            expert = sum(metric.expert[i] for i in indices[resample])
            weight = sum(metric.weights[i] for i in indices[resample])
            if metric.less_is_better:
                kept.append(base / expert)
                continue
            above = base / weight - (metric.chance or 0)
            kept.append((expert / weight - (metric.chance or 0)) / above if above > 1e-12 else math.nan)
        means.append(sum(kept) / len(kept))
    return means


def quantiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.quantile([v for v in values if not math.isnan(v)], [0.025, 0.975])]


BASE, EXPERT = "1111111110" * 3, "1111011101" * 3  # 27 and 24 of 30 right; 6 lost, 3 gained


def test_retention_above_chance_written_out() -> None:
    entry = answers("a", BASE, EXPERT, chance=0.25).entry()
    assert (entry["base"], entry["expert"], entry["examples"]) == (27 / 30, 24 / 30, 30)
    assert entry["retention"] == pytest.approx((0.8 - 0.25) / (0.9 - 0.25))
    assert (entry["gained"], entry["lost"], entry["chance"]) == (3, 6, 0.25)
    assert "note" not in entry
    expected = quantiles(slow([answers("a", BASE, EXPERT, chance=0.25)]))
    assert [entry["low"], entry["high"]] == pytest.approx(expected)
    assert entry["low"] < entry["retention"] < entry["high"]


def test_retention_where_chance_is_not_known() -> None:
    entry = answers("a", BASE, EXPERT).entry()
    assert entry["retention"] == pytest.approx(24 / 27)
    assert [entry["low"], entry["high"]] == pytest.approx(quantiles(slow([answers("a", BASE, EXPERT)])))


def test_retention_of_a_cost_is_base_over_expert() -> None:
    metric = bits("a", [10.0, 20.0, 6.0], [12.0, 30.0, 6.0], [20.0, 40.0, 12.0])
    entry = metric.entry()
    assert (entry["base"], entry["expert"], entry["retention"]) == (36 / 72, 48 / 72, 36 / 48)
    assert (entry["gained"], entry["lost"], entry["chance"]) == (None, None, None)
    assert [entry["low"], entry["high"]] == pytest.approx(quantiles(slow([metric])))


def test_an_expert_with_bytes_of_its_own_is_compared_by_its_own() -> None:
    base, expert, size, own = ([10.0, 20.0], [12.0, 30.0], [20.0, 40.0], [24.0, 40.0])
    metric = Paired(
        "a", "expert", *map(np.array, (base, expert, size)), less_is_better=True, expert_weights=np.array(own)
    )
    entry = metric.entry()
    assert (entry["base"], entry["expert"]) == (30 / 60, 42 / 64)
    assert entry["retention"] == pytest.approx((30 / 60) / (42 / 64))
    assert (entry["low"], entry["high"]) == pytest.approx((  # only the same document twice is further out
        (20 / 40) / (30 / 40), (10 / 20) / (12 / 24)
    ))  # fmt: skip


def test_the_same_answers_lose_nothing() -> None:
    entry = answers("a", BASE, BASE, chance=0.5).entry()
    assert (entry["retention"], entry["low"], entry["high"], entry["gained"], entry["lost"]) == (1, 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("base", "chance", "reason"),
    [("1000", 0.25, "chance (0.2500)"), ("1000", 0.5, "chance (0.5000)"), ("0000", None, "none right")],
)
def test_a_base_no_better_than_chance_has_no_retention(base: str, chance: float | None, reason: str) -> None:
    entry = answers("a", base, "1100", chance).entry()
    assert all(math.isnan(entry[key]) for key in ("retention", "low", "high"))
    assert (
        entry["note"] == f"the base ({base.count('1') / 4:.4f}) is no better than {reason}, so retention is undefined"
    )


def test_a_base_near_chance_has_a_retention_but_no_interval() -> None:
    metric = answers("a", "1110100101", "1110000101", chance=0.5)
    entry = metric.entry()
    assert entry["retention"] == pytest.approx((0.5 - 0.5) / (0.6 - 0.5))
    share = sum(map(math.isnan, slow([metric]))) / RESAMPLES
    assert share > 0.025
    assert math.isnan(entry["low"])
    assert math.isnan(entry["high"])
    assert entry["note"].startswith(f"in {share:.0%} of the resamples the base is no better than chance (0.5000)")


def test_the_summary_is_the_mean_over_metrics_with_each_metrics_examples_resampled() -> None:
    one = answers("one", BASE, EXPERT, chance=0.25)
    two = bits("two", [10.0, 20.0, 6.0], [12.0, 30.0, 6.0], [20.0, 40.0, 12.0])
    undefined = answers("none", "0000", "1100", chance=0.25)
    other = answers("other", BASE, EXPERT, group="general")
    summary = summarize([one, undefined, two, other])
    expert = summary["expert"]
    assert expert["retention"] == pytest.approx((0.55 / 0.65 + 36 / 48) / 2)
    assert (expert["metrics"], expert["undefined"]) == (["one", "two"], ["none"])
    assert [expert["low"], expert["high"]] == pytest.approx(quantiles(slow([one, two])))
    assert summary["general"]["retention"] == pytest.approx(24 / 27)
    assert [summary["general"][key] for key in ("low", "high")] == pytest.approx(quantiles(slow([other])))


def test_a_group_of_which_nothing_is_measured_has_no_summary_and_one_without_retention_no_number() -> None:
    summary = summarize([answers("none", "0000", "1100")])
    assert list(summary) == ["expert"]
    assert math.isnan(summary["expert"]["retention"])
    assert (summary["expert"]["metrics"], summary["expert"]["undefined"]) == ([], ["none"])


def test_an_interval_of_several_needs_all_of_them() -> None:
    near = answers("a", "1110100101", "1110000101", chance=0.5)
    (low, high), undefined = interval([answers("b", BASE, EXPERT), near])
    assert math.isnan(low)
    assert math.isnan(high)
    assert undefined == sum(map(math.isnan, slow([answers("b", BASE, EXPERT), near]))) / RESAMPLES


def test_shortfalls() -> None:
    summary = {"expert": {"retention": 0.97}, "general": {"retention": math.nan}}
    assert shortfalls(summary, {"expert": 0.97}) == []
    assert shortfalls(summary, {"expert": 0.98, "general": 0.1}) == [
        "expert: retention 0.9700 is below 0.98",
        "general: retention is undefined, and 0.1 is asked for",
    ]
    assert shortfalls({}, {"general": 0.5}) == ["general: retention is undefined, and 0.5 is asked for"]
