"""What a command that refuses an input may take of the machine."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.torture.fuzz import MEGABYTES, SECONDS

SLOWER = 4  # than the bench's quiet machine: another one, with coverage
HANGS = 60  # seconds of the clock: longer than any refusal, on a machine that does other work too


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Fail if the block takes more than 20 s of the processor or 500 MB of memory, or does not end."""

    def hangs(*_: Any) -> None:
        raise AssertionError(f"the command has not ended after {HANGS} s")

    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here
    begun, memory = time.process_time(), _megabytes("VmRSS")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begun < SLOWER * SECONDS
    assert _megabytes("VmHWM") - memory < MEGABYTES


def _megabytes(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
