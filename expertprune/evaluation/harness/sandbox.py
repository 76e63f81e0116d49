"""What a task's own files may run: templates in a sandbox, functions only where the caller allows it."""

from __future__ import annotations

import logging
from pathlib import Path

from expertprune.errors import SpecError
from expertprune.evaluation.suites import TaskEntry, task_code

log = logging.getLogger(__name__)


def check_code(entry: TaskEntry, trusted: bool) -> None:
    """Name the code that a task YAML of the user's would run.

    Raises:
        SpecError: there is some, and the caller does not trust it.
    """
    code = task_code(Path(entry.file)) if entry.file is not None else []
    if code and not trusted:
        raise SpecError(
            f"task {entry.label}: {entry.file} runs Python code (!function): {', '.join(code)}; if you trust it, give "
            "--trust-remote-code"
        )
    if code:
        log.warning("task %s: runs Python code: %s", entry.label, ", ".join(code))


def sandbox_templates() -> None:
    """Let lm-evaluation-harness fill templates without access to Python: a template is part of a task's file."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox
