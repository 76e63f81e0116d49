"""Progress of a stage: who watches, and who does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[], None]
# A stage's name and its number of steps give a function that is called after each step.
Track = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def silent(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """The progress of those who do not watch."""
    yield lambda: None
