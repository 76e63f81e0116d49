"""The errors that a user can act on: each names the file, the key and the fix, and says how the command exits."""

import contextlib
from collections.abc import Iterator


class ExpertpruneError(Exception):
    """Base of every error whose message is written for the user, and so is shown without a traceback."""

    exit_code = 2  # the user's to mend


class SpecError(ExpertpruneError):
    """The spec, or a corpus that it names, cannot be used as it stands."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def gathered(problems: list[str]) -> Iterator[None]:
    """What is wrong inside goes to `problems`, so that a user reads of everything at once."""
    try:
        yield
    except SpecError as error:
        problems += error.problems


class PlanError(ExpertpruneError):
    """No legal plan meets the budget, or a plan does not belong to the base that it is applied to."""


class CheckpointError(ExpertpruneError):
    """A model folder cannot be read, understood or written."""


class UsageError(ExpertpruneError):
    """What was asked for cannot be had on this machine: a port is taken, memory is short, a package is missing."""


class ServingError(ExpertpruneError):
    """A server did not get healthy, or died: nothing in what the user asked for says why."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
