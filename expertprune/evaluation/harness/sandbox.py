"""What a task's own files may run: templates in a sandbox, Python code only where the caller allows it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.corpora.templates import fill_template
from expertprune.errors import SpecError
from expertprune.evaluation.suites import TaskEntry, TaskFile, TaskFunction
from expertprune.files import digest_of, digest_of_files

log = logging.getLogger(__name__)


def check_code(entry: TaskEntry, task: TaskFile, trusted: bool) -> str:
    """Name the code that a task YAML of the user's would run: functions, and metrics of the `evaluate` library.

    Returns its digest: that of the folders' Python files, as one may import another.

    Raises:
        SpecError: there is some, and the caller does not trust it.
    """
    code = sorted({*(function.code for function in task.functions), *_metrics(task.keys)})
    if code and not trusted:
        raise _untrusted(entry, f"{entry.file} runs", code)
    if code:
        log.warning("task %s: runs Python code: %s", entry.label, ", ".join(code))
    folders = sorted({Path(each).parent for each in code if Path(each).is_file()})
    return digest_of([digest_of_files(sorted(folder.glob("*.py")), folder) for folder in folders])


def _untrusted(entry: TaskEntry, who: str, code: list[str]) -> SpecError:
    return SpecError(
        f"task {entry.label}: {who} Python code: {', '.join(code)}; if you trust it, give --trust-remote-code"
    )


def _metrics(keys: dict[str, Any]) -> Iterator[str]:
    """The Python files of metrics that lm-evaluation-harness lacks, and asks the `evaluate` library for."""
    import lm_eval.api.metrics  # noqa: F401  (it registers them)
    from lm_eval.api.registry import metric_registry

    listed = keys.get("metric_list")
    for each in listed if isinstance(listed, list) and keys.get("process_results") is None else ():
        name = each.get("metric") if isinstance(each, dict) else None
        if isinstance(name, str) and (each.get("hf_evaluate") or name not in metric_registry):
            yield _file_of_metric(name)


def _file_of_metric(name: str) -> str:
    """The file that the `evaluate` library runs for a name."""
    file = Path(name) if name.endswith(".py") else Path(name, f"{Path(name).name}.py")
    return str(file.resolve()) if file.is_file() else f"the metric {name!r} of the Hugging Face hub"


def with_functions(value: Any) -> Any:
    """The keys of a task, or a part of them, with its functions imported, which runs their files."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    if isinstance(value, TaskFunction):
        return _import_func_in_yml(value.name, value.folder)
    if isinstance(value, dict):
        return {key: with_functions(each) for key, each in value.items()}
    return [with_functions(each) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def metric_code(entry: TaskEntry, trusted: bool) -> Iterator[None]:
    """Let the `evaluate` library run files of metrics in the block only where the caller trusts them.

    lm-evaluation-harness asks that library in some of its own tasks too.

    Raises:
        SpecError: it was asked for one, and the caller does not trust it.
    """
    try:
        from evaluate import loading
    except ImportError:
        yield
        return
    original, refused = loading.evaluation_module_factory, list[str]()

    def found(path: str, *args: Any, **keys: Any) -> Any:
        if not trusted:
            refused.append(_file_of_metric(path))
            raise _untrusted(entry, "runs", refused)
        if entry.file is None:  # else `check_code` has said it
            log.warning("task %s: runs Python code: %s", entry.label, _file_of_metric(path))
        return original(path, *args, **keys)

    loading.evaluation_module_factory = found
    try:
        yield
    except Exception:
        if not refused:
            raise
    finally:
        loading.evaluation_module_factory = original
    if refused:  # lm-evaluation-harness takes every error of the library for a metric that is not there
        raise _untrusted(entry, "runs", refused)


def sandbox_templates() -> None:
    """Let lm-evaluation-harness fill templates in a process of their own: a template is part of a task's file.

    It has no access to Python there, and is ended when it takes too long or too much memory.
    """
    from lm_eval import utils

    utils.env = _Elsewhere()


class _Elsewhere:
    """What lm-evaluation-harness needs of a `jinja2.Environment`."""

    def from_string(self, template: str) -> _Template:
        return _Template(template)


@dataclass(frozen=True)
class _Template:
    source: str

    def render(self, **values: Any) -> str:
        return fill_template(self.source, values)
