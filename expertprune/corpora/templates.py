"""Fill templates of chats and tasks in a process (see `template_process`) that ends when one takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertprune.errors import SpecError

TIME_LIMIT = 3.0  # seconds that a template may take for one conversation
_PROCESS = Path(__file__).with_name("template_process.py")
Span = tuple[int, int]


class TemplateFailedError(Exception):
    """A template refuses a conversation, or fails."""


class TemplateStoppedError(SpecError):
    """A template does not end."""


def run_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    special: Mapping[str, Any] | None = None,
    opened: bool = False,
    continued: bool = False,
    marked: bool = False,
) -> tuple[str, list[Span]]:
    """The text of messages, and the spans that the template itself marks as generated.

    Args:
        special: the tokenizer's special tokens by name, such as `bos_token`.
        opened: whether the text ends with what opens an answer.
        continued: whether the text ends within the last message, which goes on.
        marked: whether the template marks answers.

    Raises:
        TemplateFailedError: the template fails; the message is one line.
        TemplateStoppedError: it did not end within `TIME_LIMIT` seconds.
    """
    asked = {
        "template": template, "messages": list(messages), "tools": tools, "opened": opened, "continued": continued,
        "marked": marked, "special": dict(special or {}),
    }  # fmt: skip
    answer = _answer(asked, "the base's chat template")
    return answer["text"], [(start, end) for start, end in answer["spans"]]


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """The text of a task's template with the values of one example.

    Raises:
        TemplateFailedError, TemplateStoppedError: as above.
    """
    return str(_answer({"template": template, "values": dict(values)}, f"its template {template[:60]!r}")["text"])


def _answer(asked: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the process answers; `what` names the template where it does not end."""
    with _lock:
        answer = _ask(json.dumps({**asked, "seconds": TIME_LIMIT}, default=str), what)
    if "error" in answer:
        raise TemplateFailedError(answer["error"])
    return answer


_lock = threading.Lock()
_running: list[tuple[int, subprocess.Popen[str]]] = []  # the process, and which process has started it


def _ask(line: str, what: str) -> dict[str, Any]:
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        said = process.stdout.readline()
        if said:
            return dict(json.loads(said))
    except BaseException:  # an interruption between question and answer: the next question must not get this answer
        process.kill()
        raise
    code = process.wait()
    if code == -signal.SIGALRM:
        raise TemplateStoppedError(f"{what} did not end within {TIME_LIMIT:g} s")
    raise TemplateFailedError(f"the process that runs it ended with {code}")


def _process() -> subprocess.Popen[str]:
    """The process, started at the first call and where it has ended; a fork of this process gets its own."""
    if _running and (_running[-1][0] != os.getpid() or _running[-1][1].poll() is not None):
        _running.clear()
    if not _running:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "USE_TORCH": "0"},  # templates need no torch, and it takes seconds to import
            start_new_session=True,  # a Ctrl-C at the terminal is this process' to answer
        )
        _running.append((os.getpid(), process))
    return _running[-1][1]
