"""How a stage reports its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Progress = Callable[[], None]
# Takes a stage's name and its number of steps; gives a function to call after each step.
Track = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def silent(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """Report nothing."""
    yield no_progress


@dataclass(frozen=True)
class Standing:
    """How far a task has come: its stage, and so many of the stage's steps."""

    stage: str = "waiting"
    done: int = 0
    steps: int = 0


# Takes the names of tasks that run at the same time; gives a function that shows one's standing.
Board = Callable[[Sequence[str]], contextlib.AbstractContextManager[Callable[[str, Standing], None]]]


@contextlib.contextmanager
def no_board(names: Sequence[str]) -> Iterator[Callable[[str, Standing], None]]:
    """Show nothing."""
    yield lambda name, standing: None


def no_progress() -> None:
    """Report nothing."""
