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
    """Notes what it is told; it fails at the figures of `broken`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.broken = ""

    def init(self, **about: Any) -> None:
        print("the dashboard is at ...")  # as trackio does; --json must stay JSON
        self.begun.append(about)

    def log(self, figures: dict[str, Any]) -> None:
        if self.broken and any(name.startswith(self.broken) for name in figures):
            raise ConnectionError("no route to the dashboard")
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished += 1

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]

    @property
    def figures(self) -> dict[str, Any]:
        return {name: value for each in self.logged for name, value in each.items()}


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    made = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def test_an_evaluation_is_logged_with_its_times(tiny_build: Build, tmp_path: Path, tracker: Tracker) -> None:
    folder = copied(tiny_build, tmp_path / "expert")
    found = call_json("evaluate", folder, "--store", tiny_build[1], "--log", tracker.__name__)
    assert [(run["project"], run["name"]) for run in tracker.begun] == [("expertprune", "tiny")]
    assert tracker.begun[0]["config"] == Expert.load(folder).plan.spec
    assert tracker.finished == 1
    figures = tracker.figures
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
    assert not [value for value in figures.values() if value is None]


def test_a_sweep_is_logged_point_by_point_and_as_a_table(
    spec_data: dict[str, Any], tmp_path: Path, tracker: Tracker
) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec_data))
    found = Sweep.model_validate(
        call_json("sweep", tmp_path / "spec.yaml", "--budgets", "0.25,0.5", "--log", tracker.__name__)
    )
    names = [set(each) for each in tracker.logged]
    (first, second) = (i for i, each in enumerate(names) if "sweep/budget" in each)
    seconds = [i for i, each in enumerate(names) if any(name.startswith("seconds/") for name in each)]
    assert any(first < place < second for place in seconds)  # the first is told before the second is made
    assert tracker.logged[first]["sweep/fraction"] == found.points[0].fraction
    (table,) = (each["sweep"] for each in tracker.logged if "sweep" in each)
    assert [(row["budget"], row["parameters"]) for row in table] == [
        (point.budget, point.parameters["after"]) for point in found.points
    ]
    kept = [point.expert.retention for point in found.points if point.expert is not None]
    assert [row["expert retention"] for row in table] == kept


def test_a_tracker_that_fails_does_not_end_the_work(
    tiny_build: Build, tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    run = Tracking(tracker)
    tracker.broken = "retention/"
    measured = Expert.load(tiny_build[0]).evaluation
    assert measured is not None
    with caplog.at_level(logging.WARNING):
        run.evaluation(measured)
        run.evaluation(measured)
        run.finish()
    assert [record.getMessage() for record in caplog.records] == [
        f"--log: {tracker.__name__} failed, and gets no more figures: no route to the dashboard"
    ]
    assert (tracker.logged, tracker.finished) == ([], 0)


def test_a_tracker_that_is_missing_or_does_not_start_is_the_users_to_mend(
    tiny_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    said = call("evaluate", tiny_build[0], "--store", tiny_build[1], "--log", "trackio", code=2).stderr
    assert "trackio is not installed; run: pip install 'expertprune[log]'" in said
    closed = Tracker("wandb")
    monkeypatch.setattr(closed, "init", lambda **_: (_ for _ in ()).throw(PermissionError("log in first")))
    monkeypatch.setitem(sys.modules, "wandb", closed)
    said = call("evaluate", tiny_build[0], "--store", tiny_build[1], "--log", "wandb", code=2).stderr
    assert "--log: wandb does not start: log in first" in said
