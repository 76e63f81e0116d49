"""What the store holds, what of it is old, and leftovers of killed commands."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expertprune.errors import UsageError
from expertprune.files.ownership import (
    UNFINISHED,
    Lock,
    forget_parents,
    locked,
    noted_parents,
    remove_abandoned,
    remove_leftovers,
    remove_locked,
)
from expertprune.files.places import folder_size

# The store's folders, and what is in them. All but the places can be made again.
HOLDINGS = {
    "profiles": "statistics of a base on a corpus, and unfinished ones, to go on from",
    "evaluations": "a base's answers to tasks",
    "sweeps": "points of sweeps",
    "repairs": "unfinished repairs, to go on from",
    "bases": "GGUF files converted to safetensors",
    "gguf": "bundled models joined from several packages",
    "datasets": "documents of data sets on the hub",
    "generated": "documents that bases wrote",
    "digests": "digests of files, by path and time",
    "places": "where bases and corpora of experts lie",
    "leases": "which process works on which task",
    "logs": "logs of vLLM",
    "parents": "where commands have something in the making",
}


LEASE_SECONDS = 300.0  # without a heartbeat, after which the holder of a lease counts as dead


@dataclass(frozen=True)
class StoreEntry:
    """One entry of the store; `unused` is seconds since it was last written or read."""

    kind: str
    path: Path
    bytes: int
    unused: float


def holdings(store: Path) -> Iterator[StoreEntry]:
    """Every entry of the store; hidden files are none, but for unfinished work."""
    for kind in HOLDINGS:
        for path in sorted((store / kind).iterdir()) if (store / kind).is_dir() else ():
            if path.name.startswith(".") and path.suffix not in UNFINISHED:
                continue
            with contextlib.suppress(FileNotFoundError):  # a command that works there has removed it
                files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else []
                used = max(_used(each) for each in files or [path])
                size = folder_size(path) if path.is_dir() else path.stat().st_size
                yield StoreEntry(kind, path, size, max(0.0, time.time() - used))


def _used(path: Path) -> float:
    """When a file was last written or read; of a lease that was given back, when that was."""
    status = path.stat()
    return max(status.st_mtime, status.st_atime) or status.st_ctime


def _alive(lease: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - lease.stat().st_mtime < LEASE_SECONDS
    return False


def prune_store(store: Path, older_than: float) -> list[StoreEntry]:
    """Remove what was not used for so many seconds, unless a command works in it; what went is returned.

    Places stay: no command can tell again where an expert's base and corpora lie. So do leases of live
    processes, which hold no locks.
    """
    gone = []
    for held in holdings(store):
        if held.unused < older_than or held.kind == "places" or (held.kind == "leases" and _alive(held.path)):
            continue
        with locked(held.path) as lock:
            if lock is Lock.TAKEN:
                continue
            remove_locked(held.path) if held.path.is_dir() else held.path.unlink(missing_ok=True)
        gone.append(held)
    return gone


def remove_all_leftovers(store: Path) -> None:
    """Remove what killed commands left: in the store, where old unfinished work goes too, among temporary files, and
    where the store has a note of them.
    """
    for folder in (Path(tempfile.gettempdir()), store, *(store / kind for kind in HOLDINGS), *noted_parents(store)):
        remove_leftovers(folder)
    for kind in HOLDINGS:
        remove_abandoned(store / kind)
    forget_parents(store)


_UNITS = {"h": 3600.0, "d": 24 * 3600.0, "w": 7 * 24 * 3600.0}


def duration(text: str) -> float:
    """Seconds of `12h`, `30d` or `4w`. Raises `UsageError` for other text."""
    found = re.fullmatch(r"(\d{1,6})([hdw])", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no time: give hours, days or weeks, such as 12h, 30d or 4w")
    return int(found[1]) * _UNITS[found[2]]
