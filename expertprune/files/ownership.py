"""Folders in the making: each has an owner that can be checked, and what nobody owns is removed.

A folder in the making is `.NAME.OWNER.partial`; what a new one takes the place of lies in
`.NAME.OWNER.replaced` for a moment, where the file system cannot swap the two. OWNER names the host,
its boot and this one folder at random. A process locks its folder (flock) while it works there, and
the kernel ends the lock with the process. Process ids would not do: containers that share a disk
have ids of their own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import psutil

from expertprune.errors import CheckpointError
from expertprune.files.digests import digest_of
from expertprune.files.renaming import rename_new

ABANDONED_AFTER = 7 * 24 * 3600.0  # seconds since the last change, for a leftover of unknown owner
UNFINISHED = (".working", ".unfinished")  # suffixes of the store's folders of unfinished work
_LEFTOVER = re.compile(r"\..+\.([A-Za-z0-9-]{1,40}-[0-9a-f]{8})-[0-9a-f]{8}\.(partial|replaced)", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
           errno.ELOOP, errno.EXDEV, errno.EINVAL, errno.ENOENT)  # fmt: skip


class Lock(Enum):
    OURS = "nobody else had the lock, so this process has it now"
    TAKEN = "another process has the lock"
    UNKNOWN = "this file system has no locks, or the path cannot be opened"


@functools.cache
def machine() -> str:
    """This host and its present boot, as they stand in the names of temporary folders."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = str(round(psutil.boot_time()))
    return f"{_host()}-{digest_of(boot.strip())[:8]}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:31]


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock of a folder or file during the block, if nobody else does; `wait` until then."""
    with contextlib.ExitStack() as stack:
        lock = Lock.UNKNOWN
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                lock = Lock.OURS
            except BlockingIOError:
                lock = Lock.TAKEN
        yield lock


@contextlib.contextmanager
def own_folder(path: Path, kind: str = "partial") -> Iterator[Path]:
    """A new folder beside `path`, locked by this process; whatever is left of it at the end goes."""
    tag = path.name if len(os.fsencode(path.name)) <= 60 else digest_of(path.name)[:32]
    while True:
        folder = path.with_name(f".{tag}.{machine()}-{secrets.token_hex(4)}.{kind}")
        folder.mkdir()
        _note(folder.absolute().parent)
        with locked(folder, wait=True):
            if not folder.exists():  # another run took it for a leftover before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary files. If the process is killed, a later command removes it."""
    place = Path(tempfile.gettempdir()) / "expertprune"
    with disk_errors(place), own_folder(place) as folder:
        inner = folder / "folder"
        inner.mkdir()
        yield inner


_SOCKET = 40  # bytes of a socket's name in its folder
_LONGEST_SOCKET = 107  # bytes of the path of a Unix socket


@contextlib.contextmanager
def socket_folder() -> Iterator[Path | None]:
    """An empty temporary folder for sockets; `None` where its path would be too long for theirs.

    If the process is killed, a later command removes it.
    """
    place = Path(tempfile.gettempdir()) / "ipc"
    with disk_errors(place), own_folder(place) as folder:
        yield folder if len(os.fsencode(folder)) + _SOCKET <= _LONGEST_SOCKET else None


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for the block; what killed runs left of such folders goes first.

    Raises:
        CheckpointError: the disk is full, or the parent folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            folder = stack.enter_context(own_folder(path))
        yield folder


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A folder for unfinished work at `path`: it goes when the block ends well, and stays when it does not.

    The next run for the same `path` finds what is there; see also `remove_abandoned`. While another
    process works there, this one gets a temporary folder.

    Args:
        path: its suffix is one of `UNFINISHED`.

    Raises:
        CheckpointError: the disk is full, or the parent folder cannot be written.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, keep=path)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(path))
        if lock is Lock.TAKEN or not path.exists():
            yield stack.enter_context(scratch_folder(path))
            return
        try:
            with disk_errors(path, "no room left on the disk"):
                yield path
        finally:
            if not any(path.iterdir()):
                path.rmdir()
        remove_locked(path)


def remove_finished(path: Path) -> None:
    """Remove the folder of work whose result is there by now, as a kill left it, unless somebody works in it."""
    if path.is_dir():
        with locked(path) as lock:
            if lock is not Lock.TAKEN:
                remove_locked(path)


def remove_locked(path: Path) -> None:
    """Remove a folder that is locked. What a kill leaves of it has the name of a leftover, and goes with those."""
    with contextlib.suppress(OSError), own_folder(path) as aside:
        os.replace(path, aside / "done")
    shutil.rmtree(path, ignore_errors=True)  # where it could not be renamed


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Run the block while no other process runs one for the same folder or file, on file systems that have locks."""
    with locked(path, wait=True):
        yield


def is_leftover(path: Path) -> bool:
    """Whether a path is a folder in the making, or lies in one, by its names (see `own_folder`)."""
    return any(_LEFTOVER.fullmatch(name) for name in path.parts)


_stores: list[Path] = []  # the store of this process' command


def note_parents(store: Path) -> None:
    """From now on, note in the store where this process has folders in the making, for `noted_parents`."""
    _stores[:] = [store]


def _note(parent: Path) -> None:
    """Note a folder, unless every command looks through it anyway, or it is within one that is in the making itself."""
    if is_leftover(parent):
        return
    for store in _stores:
        if parent == Path(tempfile.gettempdir()) or parent.is_relative_to(store.absolute()):
            continue
        notes = store / "parents"
        with contextlib.suppress(OSError):  # a store that cannot be written costs a leftover
            notes.mkdir(parents=True, exist_ok=True)
            with locked(notes, wait=True):
                (notes / f"{_host()}-{digest_of(str(parent))[:32]}").write_bytes(os.fsencode(parent))


def noted_parents(store: Path) -> list[Path]:
    """Folders of this host in which commands with this store had something in the making."""
    found = []
    for note in (store / "parents").glob(f"{_host()}-*"):
        with contextlib.suppress(OSError, ValueError):
            found.append(Path(os.fsdecode(note.read_bytes()[:4096])))
    return [folder for folder in found if folder.is_absolute()]


def forget_parents(store: Path) -> None:
    """Remove the notes of folders in which nothing is in the making any more."""
    with locked(store / "parents", wait=True):
        for note in (store / "parents").glob(f"{_host()}-*"):
            with contextlib.suppress(OSError):
                if not _leftovers(Path(os.fsdecode(note.read_bytes()[:4096]))):
                    note.unlink()


def _leftovers(folder: Path) -> list[Path]:
    """Folders in the making, of anybody."""
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if _LEFTOVER.fullmatch(entry.name)]
    except (OSError, ValueError):
        return []


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left in a folder: runs of this boot at once, others by age.

    An expert that a killed run had moved aside goes back to its place, if nothing is there.
    """
    for leftover in _leftovers(folder):
        match = _LEFTOVER.fullmatch(leftover.name)
        with contextlib.suppress(OSError), locked(leftover) as lock:
            if match is None or leftover.is_symlink() or leftover.stat().st_uid != os.getuid():
                continue  # in a folder that is everybody's, such as /tmp
            here = match.group(1) == machine() and lock is Lock.OURS
            if lock is Lock.TAKEN or not (here or age(leftover) > ABANDONED_AFTER):
                continue
            for aside in leftover.iterdir() if match.group(2) == "replaced" else ():
                with contextlib.suppress(FileExistsError):
                    rename_new(aside, folder / aside.name)
            shutil.rmtree(leftover, ignore_errors=True)


def remove_abandoned(folder: Path, keep: Path | None = None) -> None:
    """Remove unfinished work in a folder of the store that nobody has touched for a week, all but `keep`."""
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(UNFINISHED)]
    except OSError:
        return
    for work in found:
        if work != keep and age(work) > ABANDONED_AFTER:
            with locked(work) as lock:
                if lock is not Lock.TAKEN:
                    remove_locked(work)


def age(path: Path) -> float:
    """Seconds since a path, or anything below it, was last changed; 0 if it is gone."""
    changed = [time.time()]
    with contextlib.suppress(FileNotFoundError):
        changed = [each.lstat().st_mtime for each in (path, *path.rglob("*"))]
    return time.time() - max(changed)


@contextlib.contextmanager
def disk_errors(path: Path, full: str = "no room left on the disk; nothing was written") -> Iterator[None]:
    """Turn errors of the disk into messages that name the output; `full` is the one for a disk without room.

    Raises:
        CheckpointError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(f"{path}: {full}") from error
        if error.errno in _DENIED:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        raise
    except Exception as error:  # safetensors writes files itself, and wraps the disk's error in its text
        code = re.search(r"os error (\d+)", str(error))
        if code is not None and int(code.group(1)) in _FULL:
            raise CheckpointError(f"{path}: {full}") from error
        raise
