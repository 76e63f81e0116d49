"""A process that renders chat templates: one JSON line in, one JSON line out.

A template is a program that comes with a model. It can loop without end or fill the memory, and
Python code cannot be stopped from outside while it computes one huge number. So templates are
rendered in this process, under limits that the kernel keeps: SIGALRM ends it after `seconds`, and
it cannot get more memory than `_MEMORY`.

It is run as a file, by path, so it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import signal
import sys
from typing import Any

_MEMORY = 512 * 2**20  # bytes above those that the process begins with
_LONGEST = 64 * 2**20  # characters of a rendered text
# Some templates print the date. A fixed one keeps profiles the same from day to day.
_TODAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """The text and the spans that the template marks as generated, or the first line of what went wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    try:
        (text,), marked = render_jinja_template(
            [asked["messages"]],
            tools=asked["tools"],
            chat_template=asked["template"],
            return_assistant_tokens_mask=asked["marked"],
            add_generation_prompt=asked["opened"],
            strftime_now=_TODAY.strftime,
            **asked["special"],
        )
    except MemoryError:
        return {"error": f"it needs more than {_MEMORY // 2**20} MiB"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(text) > _LONGEST:
        return {"error": f"it makes a text of more than {_LONGEST // 2**20} MiB"}
    return {"text": text, "spans": list(marked[0]) if marked else []}


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
