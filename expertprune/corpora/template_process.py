"""A process that fills templates of chats and of tasks: one JSON line in, one JSON line out.

A template is a program that comes with a model or a suite. It can loop without end or fill the memory, and
Python code cannot be stopped from outside while it computes one huge number. So templates are
rendered in this process, under limits that the kernel keeps: SIGALRM ends it after `seconds`, and
it cannot get more memory than `_MEMORY`.

It is run as a file, by path, so it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 512 * 2**20  # bytes above those that the process begins with
_LONGEST = 64 * 2**20  # characters of a rendered text
# Some templates print the date. A fixed one keeps profiles the same from day to day.
_TODAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """The text and the spans that the template marks as generated, or the first line of what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    try:
        text, spans = _filled(asked) if "values" in asked else _rendered(asked)
    except MemoryError:
        return {"error": f"it needs more than {_MEMORY // 2**20} MiB"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(text) > _LONGEST:
        return {"error": f"it makes a text of more than {_LONGEST // 2**20} MiB"}
    return {"text": text, "spans": spans}


def _rendered(asked: dict[str, Any]) -> tuple[str, list[Any]]:
    """A chat template with messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), marked = render_jinja_template(
        [asked["messages"]],
        tools=asked["tools"],
        chat_template=asked["template"],
        return_assistant_tokens_mask=asked["marked"],
        add_generation_prompt=asked["opened"],
        continue_final_message=asked["continued"],
        strftime_now=_TODAY.strftime,
        **asked["special"],
    )
    return text, list(marked[0]) if marked else []


def _filled(asked: dict[str, Any]) -> tuple[str, list[Any]]:
    """A task's template with the values of an example."""
    return _compiled(asked["template"]).render(asked["values"]), []


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> jinja2.Environment:
    """What lm-evaluation-harness fills templates with, without access to Python."""
    made = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    made.filters["regex_replace"] = _regex_replace
    return made


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """The filter of lm-evaluation-harness, whose templates may name its arguments."""
    return re.sub(pattern, repl, string, count=count)


def main() -> None:
    """Answer until the pipe is closed."""
    import transformers.utils.chat_template_utils  # before the limit, and before the first clock runs

    assert transformers.utils.chat_template_utils is not None
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # Linux has it
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY,) * 2)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
