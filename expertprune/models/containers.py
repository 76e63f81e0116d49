"""How much host memory is free where a container, or a job of a scheduler, may use a part of it only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_OWN = Path("/proc/self/cgroup")  # the control groups that hold this process
_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Names:
    """What a version of control groups calls its limit, what counts towards it, and the cached files within that."""

    limit: str
    used: str
    cached: tuple[str, str]


_FIRST = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_SECOND = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory() -> int:
    """Bytes that are free on this machine, and that the limits of the process' control groups leave.

    Files that the kernel has cached count as free, since it drops them first.
    """
    return min([int(psutil.virtual_memory().available), *_left()])


def _left() -> Iterator[int]:
    """What each group with a limit leaves."""
    for folder, names in _groups():
        with contextlib.suppress(OSError, ValueError):  # a group without a limit says `max`, or has no such file
            limit, used = (int((folder / name).read_text()) for name in (names.limit, names.used))
            counts = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0, limit - used + sum(int(counts.get(name, 0)) for name in names.cached))


def _groups() -> Iterator[tuple[Path, _Names]]:
    """The groups that hold this process, each within the next, as far as they are seen from here."""
    with contextlib.suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, names = (_MOUNT / "memory", _FIRST) if controllers else (_MOUNT, _SECOND)
            own = root / path.lstrip("/")
            yield from ((folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root))
