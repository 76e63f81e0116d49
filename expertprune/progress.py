"""How a stage reports its progress, and what it says when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from expertprune.errors import UsageError

foretold = logging.getLogger(f"{__name__}.foretold")  # what a command will take, which it always says

Progress = Callable[[], None]
# Takes a stage's name and its number of steps; gives a function to call after each step.
Track = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def silent(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """Report nothing."""
    with within_memory(stage):
        yield no_progress


_watching: ContextVar[Track] = ContextVar("watching", default=silent)


@contextlib.contextmanager
def watching(track: Track) -> Iterator[None]:
    """Let `track` show work in the block that no stage hands one to, such as loading and hashing."""
    before = _watching.set(track)
    try:
        yield
    finally:
        _watching.reset(before)


def shown(stage: str, steps: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """A stage of its own for whoever watches this thread, if anybody does."""
    return _watching.get()(stage, steps)


@contextlib.contextmanager
def within_memory(stage: str) -> Iterator[None]:
    """Turn a failed allocation in the block into one line with the stage and the settings that help.

    Raises:
        UsageError: memory ran out, on a GPU or on the host.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        needed = _refused(error)
        if needed is None:
            raise
        raise UsageError(
            f"{stage}: memory ran out{needed}; lower calibration.tokens_per_batch, read one layer at a time "
            "(base.layers: streamed), or keep hidden states in files (--spool FOLDER)"
        ) from error


def _refused(error: MemoryError | RuntimeError) -> str | None:
    """What an allocation asked for, in words, or `None` for an error of another kind.

    torch has a class for GPUs alone (`OutOfMemoryError`); on CPUs it says so in a `RuntimeError`.
    """
    text = str(error)
    gpu = type(error).__name__ == "OutOfMemoryError"
    if not (gpu or isinstance(error, MemoryError) or re.search(r"can't allocate memory|not enough memory", text)):
        return None
    if found := re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", text):
        return f" ({found.group(1)} more were asked for)"
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f" ({int(found.group(1)) / 2**30:.2f} GiB more were asked for)"
    return ""


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
