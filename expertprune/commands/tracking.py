"""`--log`: send figures to trackio or wandb."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from expertprune.reporting.tracking import Tracking

F = TypeVar("F", bound=Callable[..., Any])


def log_option(command: F) -> F:
    """Add `--log`; the command gets it as `tracker`."""
    return click.option(
        "--log", "tracker", type=click.Choice(["trackio", "wandb"]),
        help="Send times and retention to this tracker as they come.",
    )(command)  # fmt: skip


@contextlib.contextmanager
def tracked(tracker: str | None, about: Callable[[], tuple[str, Mapping[str, Any]]]) -> Iterator[Tracking | None]:
    """The run of the tracker that was asked for; of a team, the first member alone has one.

    Args:
        about: gives the run's name and settings.
    """
    from expertprune.engine.team import team
    from expertprune.reporting.tracking import tracking

    if tracker is None or not team().leads:
        yield None
        return
    with tracking(tracker, *about()) as run:  # type: ignore[arg-type]  # click checks it
        yield run


def about_spec(spec: Path, overrides: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A spec's name and keys."""
    from expertprune.stages.validate import as_spec

    found = as_spec(spec, overrides)
    return found.name, found.document()


def about_expert(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """An expert's name, and the keys of the spec that it was made from."""
    from expertprune.artifacts.expert import Expert

    found = Expert.load(folder)
    return found.name, found.plan.spec
