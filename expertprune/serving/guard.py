"""A watchdog process: when its parent ends, it ends every process that the parent had started.

A parent that is killed cannot clean up, and vLLM's engines are no children of it alone. So the parent marks all that it
starts with a token in the environment, and holds a pipe to this program. When the pipe closes, for whatever reason, this
program ends every process that carries the token.

It is run as a file, by path, so it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil

VARIABLE = "EXPERTPRUNE_STARTED_BY"  # its value is the token
GRACE = 4.0  # seconds between SIGTERM and SIGKILL
_LAST_LOOK = 9.0  # seconds after which nothing is looked for any more


class Guard:
    """The guard of one process, and the token of all that the process starts."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.owner = os.getpid()
        # A session of its own: a Ctrl-C at the terminal must not end it.
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None


_guards: list[Guard] = []


def token() -> str:
    """The token of this process' guard, which is started at the first call, and again if it has died."""
    if not _guards or not _guards[-1].alive:
        _guards.append(Guard())
    return _guards[-1].token


def marked(wanted: str) -> Iterator[psutil.Process]:
    """Processes whose environment carries a token."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if _carries(process, wanted) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _carries(process: psutil.Process, wanted: str) -> bool:
    """Whether a token is in a process' environment.

    vLLM's engines change their titles, which writes zeros over the first variables, and psutil reads no further.
    """
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            return f"{VARIABLE}={wanted}".encode() in file.read().split(b"\0")
    except FileNotFoundError:  # another system, or the process has ended
        return process.environ().get(VARIABLE) == wanted


def end_all(wanted: str) -> None:
    """Ask the processes of a token to end, and kill those that are left after `GRACE` seconds, their new children too."""
    start = time.monotonic()
    asked: set[int] = set()
    while (left := list(marked(wanted))) and time.monotonic() - start < _LAST_LOOK:
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() - start > GRACE:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
        time.sleep(0.1)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_all(sys.argv[1])
