"""The errors that a user can act on: each names the file, the key and the fix, and makes the command exit with 2."""


class ExpertpruneError(Exception):
    """Base of every error whose message is written for the user, and so is shown without a traceback."""


class SpecError(ExpertpruneError):
    """The spec, or a corpus that it names, cannot be used as it stands."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PlanError(ExpertpruneError):
    """No legal plan meets the budget, or a plan does not belong to the base that it is applied to."""


class CheckpointError(ExpertpruneError):
    """A model folder cannot be read, understood or written."""
