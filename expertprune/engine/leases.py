"""Leases: which process works on which task, over a folder that several machines share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import psutil
from pydantic import TypeAdapter, ValidationError

from expertprune.errors import CheckpointError
from expertprune.files import LEASE_SECONDS, machine, own_folder, read_json

log = logging.getLogger(__name__)

_BEATS = 10  # heartbeats in that time
_RELEASED = (0, 0)  # the modification time of a lease that its owner gave back


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        machine: its host and the host's present boot.
        pids: the namespace of its process id; containers on one host have their own.
        pid, started: its process id, and when it was started, which tells it from a later process.
        label: what it is for people, such as `shard 3/8`.
    """

    machine: str
    pids: str
    pid: int
    started: float
    label: str = ""

    @classmethod
    def of_this_process(cls, label: str = "") -> Self:
        pid = os.getpid()
        return cls(machine(), _pid_namespace(), pid, psutil.Process(pid).create_time(), label)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The owner that a lease names; where it is not written yet, or damaged, one that nobody knows."""
        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except (CheckpointError, ValidationError):
            return cls("unknown-", "", 0, 0.0)

    @property
    def known_dead(self) -> bool:
        """Whether the process has ended; one of another machine or container is not known to have."""
        if (self.machine, self.pids) != (machine(), _pid_namespace()):
            return False  # only its heartbeat tells
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"{self.label or 'a process'} (process {self.pid} on {self.machine.rpartition('-')[0]})"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@dataclass(frozen=True)
class Leases:
    """The leases of tasks, as files in a folder.

    The lease of a task is the file `TASK.N.lease` of the highest number `N`. Its modification time
    is the last heartbeat. Whoever finds it expired creates number `N + 1`. Creation fails where the
    file exists, so exactly one process gets it; no file is removed while tasks are under way. So
    leases need no locks, only that a file is created once (`link`), as on NFS.

    Times are compared as the file system tells them, so the clocks of machines may differ.
    """

    folder: Path
    label: str = ""
    expires_after: float = LEASE_SECONDS

    @contextlib.contextmanager
    def held(self, task: str) -> Iterator[bool]:
        """Hold the lease of a task in the block, if nobody else does; gives whether this process does.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        number, owner = self._highest(task)
        if owner is not None or not self._create(self._path(task, number + 1)):
            yield False
            return
        path = self._path(task, number + 1)
        heart = _Heart(path, self.expires_after / _BEATS)
        heart.start()
        try:
            yield True
        finally:
            heart.stop()
            with contextlib.suppress(OSError):
                os.utime(path, _RELEASED)

    def owner(self, task: str) -> Owner | None:
        """Who holds the lease of a task; `None` if nobody does, or the heartbeat is too old."""
        return self._highest(task)[1]

    def clear(self, task: str) -> None:
        """Remove the files of a task that is done."""
        for path in self.folder.glob(f"{task}.*.lease"):
            path.unlink(missing_ok=True)

    def _path(self, task: str, number: int) -> Path:
        return self.folder / f"{task}.{number}.lease"

    def _highest(self, task: str) -> tuple[int, Owner | None]:
        """The highest number that was given out (0: none), and its owner if the lease is held."""
        numbers = [int(path.name.split(".")[-2]) for path in self.folder.glob(f"{task}.*.lease")]
        if not numbers:
            return 0, None
        path = self._path(task, max(numbers))
        with contextlib.suppress(OSError):  # removed meanwhile: held by nobody
            owner, beat = Owner.read(path), path.stat().st_mtime
            if not owner.known_dead and self._now() - beat < self.expires_after:
                return max(numbers), owner
        return max(numbers), None

    def _now(self) -> float:
        """The time by the clock of the file system, which also dates the heartbeats."""
        with own_folder(self.folder / "now") as probe:
            return probe.stat().st_mtime

    def _create(self, path: Path) -> bool:
        """Create a lease, whole, unless it exists; whether this process created it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with own_folder(self.folder / "lease") as folder:
                temporary = folder / "new"
                temporary.write_text(json.dumps(asdict(Owner.of_this_process(self.label))))
                return _linked(temporary, path)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: leases cannot be written: {error.strerror}") from error


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file another name unless that exists; whether it was given."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(temporary.read_text())
    return True


@dataclass
class _Heart:
    """A thread that renews a lease."""

    path: Path
    seconds: float
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._beat, name=f"lease {self.path.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self.seconds):
            try:
                os.utime(self.path)
            except OSError as error:  # the task goes on: at worst another process does it too
                log.warning("%s: the lease cannot be renewed: %s", self.path, error.strerror)
