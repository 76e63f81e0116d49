"""Errors that a user can act on.

Each message names the file, the key and the fix; each class has an exit code.
"""

import contextlib
import shlex
from collections.abc import Iterator


class ExpertpruneError(Exception):
    """Base of every error whose message is for the user. It is shown without a traceback."""

    exit_code = 2  # the user can mend it


class SpecError(ExpertpruneError):
    """The spec, or a corpus that it names, cannot be used as it stands."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def gathered(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a `SpecError` in the block, to report all at once."""
    try:
        yield
    except SpecError as error:
        problems += error.problems


class PlanError(ExpertpruneError):
    """No legal plan meets the budget, or a plan belongs to another base."""


class CheckpointError(ExpertpruneError):
    """A model folder cannot be read, understood or written."""


class UnevaluatedError(ExpertpruneError):
    """An expert was built, and its evaluation failed. It exits as the failure does, with 1 for a bug."""

    def __init__(self, folder: object, failure: Exception) -> None:
        self.exit_code = failure.exit_code if isinstance(failure, ExpertpruneError) else 1
        super().__init__(
            f"the evaluation failed: {first_line(failure)}; the expert itself is whole: when this is mended, run: "
            f"{_evaluation_of(folder)}"
        )


def unevaluated(stopped: KeyboardInterrupt, folder: object) -> None:
    """Note on an interrupt that the expert in a folder is whole, and has no evaluation."""
    stopped.add_note(f"the expert itself is whole, and not evaluated: run: {_evaluation_of(folder)}")


def _evaluation_of(folder: object) -> str:
    return f"expertprune evaluate {shlex.quote(str(folder))}"


class UsageError(ExpertpruneError):
    """This machine cannot do it: a port is taken, memory is short, a package is missing."""


class ServingError(ExpertpruneError):
    """A server died or did not become healthy, and nothing in the user's request says why."""

    exit_code = 1


class UnfinishedError(ExpertpruneError):
    """Other processes have not done their part of the work, or have failed in the middle of it."""

    exit_code = 1


@contextlib.contextmanager
def under(where: str) -> Iterator[None]:
    """Put the file or key that errors of the block are about before each of their problems."""
    try:
        yield
    except SpecError as error:
        raise SpecError([f"{where}: {problem}" for problem in error.problems]) from None
    except (PlanError, CheckpointError) as error:
        raise type(error)(f"{where}: {error}") from error.__cause__


@contextlib.contextmanager
def refused(what: object) -> Iterator[None]:
    """Turn whatever a library raises over a file of the user's into an error that names the file.

    Libraries that read models fail in any way over a damaged one, from `KeyError` to a panic of Rust
    code, which is no `Exception`.

    Raises:
        CheckpointError: the block failed.
    """
    try:
        yield
    except (ExpertpruneError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
