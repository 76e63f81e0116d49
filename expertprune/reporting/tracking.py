"""Figures for an experiment tracker: trackio or wandb, which share one interface (`init`, `log`, `finish`, `Table`)."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from expertprune.artifacts.evaluation import Evaluation, Group, Measured
from expertprune.artifacts.sweep import Point, Sweep
from expertprune.errors import UsageError, first_line
from expertprune.evaluation.retention import pooled
from expertprune.progress import Track

log = logging.getLogger(__name__)

Tracker = Literal["trackio", "wandb"]
PROJECT = "expertprune"
_INSTALL = {"trackio": "pip install 'expertprune[log]'", "wandb": "pip install wandb"}


class Tracking:
    """One run of a tracker. It gets figures as they come.

    The seconds of a stage are `seconds/STAGE`. Retention, with base and expert, is
    `retention/CORPUS/METRIC`. The headline is `retention/expert` and `retention/general`: bits per
    byte over all documents of the group.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._logged: set[str] = set()  # keys of points of a sweep
        self._failed = False

    def track(self, track: Track) -> Track:
        """The same track, whose stages are timed."""

        @contextlib.contextmanager
        def timed(stage: str, steps: int) -> Iterator[Callable[[], None]]:
            begin = time.monotonic()
            with track(stage, steps) as step:
                yield step
            self._log({f"seconds/{stage}": time.monotonic() - begin})

        return timed

    def evaluation(self, found: Evaluation) -> None:
        """What was measured of an expert."""
        figures: dict[str, float | None] = {}
        for group in get_args(Group):
            figures |= _retention(f"retention/{group}", pooled(found, group))
        for corpus, result in found.corpora.items():
            for metric, numbers in result.metrics.items():
                figures |= _metric(f"retention/{corpus}/{metric}", numbers)
        for name, task in found.all_tasks.items():
            figures |= _metric(f"retention/{name}/{task.metric}", task)
        self._log(figures)

    def points(self, found: Sweep) -> None:
        """The points of a sweep that are new since the last call."""
        for point in found.points:
            if point.key not in self._logged:
                self._logged.add(point.key)
                self._log({f"sweep/{name}": value for name, value in _row(point).items()})

    def table(self, found: Sweep) -> None:
        """A whole sweep as one table."""
        rows = [_row(point) for point in found.points]
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            data = [[row.get(name) for name in columns] for row in rows]
            self._log({"sweep": self._module.Table(columns=columns, data=data)})

    def finish(self) -> None:
        """End the run."""
        self._send(self._module.finish)

    def _log(self, figures: Mapping[str, Any]) -> None:
        """Log figures together, without those that are undefined."""
        if defined := {name: value for name, value in figures.items() if value is not None}:
            self._send(lambda: self._module.log(defined))

    def _send(self, call: Callable[[], object]) -> None:
        """Call the tracker. Work of hours must not be lost to it, so its failure is a warning, and the end of the run."""
        if self._failed:
            return
        try:
            with _quiet():
                call()
        except Exception as error:  # each tracker has errors of its own
            self._failed = True
            log.warning("--log: %s failed, and gets no more figures: %s", self._module.__name__, first_line(error))


@contextlib.contextmanager
def tracking(tracker: Tracker, name: str, settings: Mapping[str, Any]) -> Iterator[Tracking]:
    """A run of a tracker, which is finished after the block.

    Args:
        name: of the run.
        settings: what the run was made with, such as a spec.

    Raises:
        UsageError: the tracker is not installed, or does not start.
    """
    try:
        module = importlib.import_module(tracker)
    except ImportError:
        raise UsageError(f"--log: {tracker} is not installed; run: {_INSTALL[tracker]}") from None
    try:
        with _quiet():
            module.init(project=PROJECT, name=name, config=dict(settings))
    except Exception as error:  # a tracker asks for a login, a network or a disk, each with its own errors
        raise UsageError(f"--log: {tracker} does not start: {first_line(error)}") from error
    run = Tracking(module)
    try:
        yield run
    finally:
        run.finish()


def _quiet() -> contextlib.AbstractContextManager[object]:
    """What a tracker prints goes to standard error: standard output is for the command's result."""
    return contextlib.redirect_stdout(sys.stderr)


def _metric(name: str, numbers: Measured) -> dict[str, float | None]:
    return {**_retention(name, numbers), f"{name}/base": numbers.base, f"{name}/expert": numbers.expert}


def _retention(name: str, numbers: Measured | None) -> dict[str, float | None]:
    """A retention with its interval. Metrics that compare with the base have the interval of their own."""
    if numbers is None or numbers.retention is None:
        return {}
    return {name: numbers.retention, f"{name}/low": numbers.low, f"{name}/high": numbers.high}


def _row(point: Point) -> dict[str, float | None]:
    """A point of a sweep as a row of a table."""
    row: dict[str, float | None] = {
        "budget": point.budget,
        "parameters": point.parameters["after"],
        "fraction": point.fraction,
        "bytes": point.bytes,
    }
    for group, numbers in (("expert", point.expert), ("general", point.general)):
        row |= _retention(f"{group} retention", numbers)
    for name, result in point.corpora.items():
        for metric, numbers in result.metrics.items():
            row[f"{name} {metric}"] = numbers.expert
    return row
