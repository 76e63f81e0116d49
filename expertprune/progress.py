"""How a stage reports its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[], None]
# Takes a stage's name and its number of steps; gives a function to call after each step.
Track = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def silent(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """Report nothing."""
    yield no_progress


def no_progress() -> None:
    """Report nothing."""
