"""`--log`, with a stand-in for the interface that trackio and wandb share."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.sweep import Sweep
from expertprune.reporting.tracking import Tracking
from tests.calling import call, call_json
from tests.experts import copied

Build = tuple[Path, Path]


class Tracker(ModuleType):
    """Notes what it is told; it fails where it is `broken`."""

    begun: dict[str, Any] | None = None
    finished, broken = 0, ""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.logged: list[dict[str, Any]] = []

    def init(self, **about: Any) -> None:
        print("the dashboard is at ...")  # as trackio does; --json must stay JSON
        if self.broken:
            raise PermissionError(self.broken)
        self.begun = about

    def log(self, figures: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError(self.broken)
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished += 1

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    made = Tracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", made)
    return made


def test_an_evaluation_is_logged_with_its_times(tiny_build: Build, tmp_path: Path, tracker: Tracker) -> None:
    folder = copied(tiny_build, tmp_path / "expert")
    found = call_json("evaluate", folder, "--store", tiny_build[1], "--log", "trackio")
    assert tracker.begun == {"project": "expertprune", "name": "tiny", "config": Expert.load(folder).plan.spec}
    assert tracker.finished == 1
    figures = {name: value for each in tracker.logged for name, value in each.items()}
    assert figures["seconds/evaluate"] > 0
    for corpus, result in found["corpora"].items():
        for metric, numbers in result["metrics"].items():
            name = f"retention/{corpus}/{metric}"
            assert figures.get(name) == numbers["retention"], name
            assert (figures.get(f"{name}/base"), figures[f"{name}/expert"]) == (numbers["base"], numbers["expert"])
    rows = {row["digest"]: row for name in found["corpora"] if not name.startswith("general/")
            for row in found["corpora"][name]["per_document"]}  # fmt: skip
    base, expert = (sum(row[f"{who}_bits"] for row in rows.values()) for who in ("base", "expert"))
    assert figures["retention/expert"] == pytest.approx(base / expert)
    assert None not in figures.values()


def test_a_sweep_is_logged_point_by_point_and_as_a_table(
    spec_data: dict[str, Any], tmp_path: Path, tracker: Tracker
) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec_data))
    words = ("sweep", tmp_path / "spec.yaml", "--budgets", "0.25,0.5", "--log", "trackio")
    found = Sweep.model_validate(call_json(*words))
    first, second = (i for i, each in enumerate(tracker.logged) if "sweep/budget" in each)
    seconds = [i for i, each in enumerate(tracker.logged) if any(name.startswith("seconds/") for name in each)]
    assert any(first < place < second for place in seconds)  # the first is told before the second is made
    assert tracker.logged[first]["sweep/fraction"] == found.points[0].fraction
    (table,) = (each["sweep"] for each in tracker.logged if "sweep" in each)
    for row, point in zip(table, found.points, strict=True):
        assert (row["budget"], row["parameters"]) == (point.budget, point.parameters["after"])
        assert row["expert retention"] == (point.expert and point.expert.retention)


def test_a_tracker_that_fails_does_not_end_the_work(
    tiny_build: Build, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    run = Tracking(tracker)
    tracker.broken = "no route to the dashboard"
    measured = Expert.load(tiny_build[0]).evaluation
    assert measured is not None
    with caplog.at_level(logging.WARNING):
        run.evaluation(measured)
        run.evaluation(measured)
        run.finish()
    said = "--log: trackio failed, and gets no more figures: no route to the dashboard"
    assert ([record.getMessage() for record in caplog.records], tracker.finished) == ([said], 0)


def test_a_tracker_that_is_missing_or_does_not_start_is_the_users_to_mend(
    tiny_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = Tracker("wandb")
    closed.broken = "log in first"
    for name, module, said in (
        ("trackio", None, "trackio is not installed; run: pip install 'expertprune[log]'"),
        ("wandb", closed, "--log: wandb does not start: log in first"),
    ):
        monkeypatch.setitem(sys.modules, name, module)
        assert said in call("evaluate", tiny_build[0], "--store", tiny_build[1], "--log", name, code=2).stderr
