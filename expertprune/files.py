"""Files and folders: written whole or not at all, digests, disk room, YAML, and what ships."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import yaml
from platformdirs import user_cache_path

from expertprune.errors import CheckpointError, SpecError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STORE_VARIABLE = "EXPERTPRUNE_STORE"
MEMORY_VARIABLE = "EXPERTPRUNE_MEMORY"
SPOOL_VARIABLE = "EXPERTPRUNE_SPOOL"
EXPERT_FILE = "expertprune.json"  # what makes a folder an expert


def store_folder(store: str | Path | None = None) -> Path:
    """The folder of profiles: the argument, else `EXPERTPRUNE_STORE`, else the user's cache."""
    if store is not None:
        return Path(store).expanduser()
    if os.environ.get(STORE_VARIABLE):
        return Path(os.environ[STORE_VARIABLE]).expanduser()
    return Path(user_cache_path("expertprune"))


def digest_of(data: Any) -> str:
    """SHA-256 of plain data. The order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, store: Path) -> str:
    """SHA-256 of a file's bytes, remembered in the store by path, size and modification time."""
    status = path.stat()
    key = digest_of([str(path.resolve()), status.st_size, status.st_mtime_ns])
    remembered = store / "digests" / key
    with contextlib.suppress(OSError):
        text = remembered.read_text()
        if len(text) == 64:
            return text
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(CheckpointError):  # without a store, the next run only reads the file again
        write_file(remembered, digest.encode())
    return digest


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with _own_folder(path) as folder:
            yield folder / path.name
            os.replace(folder / path.name, path)


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file or nothing; raises `CheckpointError` where the disk does not allow it."""
    with staged_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    write_file(path, (to_json(data) + "\n").encode())


def to_json(data: Any) -> str:
    """Plain data as strict JSON: NaN and infinity become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes
    when it does not.

    A run that is killed leaves its temporary folder behind. The next run for the same `out` removes
    it.

    Raises:
        CheckpointError: `out` exists and `overwrite` is off, or the disk is full.
    """
    check_output(out, overwrite)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        check_output(out, overwrite)  # again: an expert that a killed run had moved aside may be back
        with _own_folder(out) as folder:
            yield folder
            _replace_folder(folder, out)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for the block; what killed runs left of such folders goes first.

    Raises:
        CheckpointError: the disk is full, or the parent folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            folder = stack.enter_context(_own_folder(path))
        yield folder


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A folder for unfinished work at `path`: it goes when the block ends well, and stays when it does not.

    The next run for the same `path` finds what is there. Those of the same suffix that nobody has
    touched for a week go. While another process works there, this one gets a temporary folder.

    Raises:
        CheckpointError: the disk is full, or the parent folder cannot be written.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"*{path.suffix}"):
            temporary = other.suffix in (".partial", ".replaced")  # of a run that `_remove_leftovers` looks for
            if other != path and not temporary and _age(other) > ABANDONED_AFTER:
                with _locked(other) as lock:
                    if lock is not _Lock.TAKEN:
                        shutil.rmtree(other, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(path))
        if lock is _Lock.TAKEN or not path.exists():
            yield stack.enter_context(scratch_folder(path))
            return
        try:
            with disk_errors(path, "no room left on the disk"):
                yield path
        finally:
            if not any(path.iterdir()):
                path.rmdir()
        shutil.rmtree(path, ignore_errors=True)


def _replace_folder(new: Path, out: Path) -> None:
    """Rename `new` to `out`; an earlier `out` comes back if that fails."""
    if not out.exists():
        os.replace(new, out)
        return
    replaced = new.with_suffix(".replaced")
    # It is locked and not old, so that no other run takes it for a leftover before it is gone.
    with _locked(out):
        os.utime(out)
        os.replace(out, replaced)
        try:
            os.replace(new, out)
        except BaseException:
            replaced.rename(out)
            raise
        shutil.rmtree(replaced)


# A temporary folder is `.NAME.OWNER.partial`; what it replaces is `.NAME.OWNER.replaced` for a
# moment. OWNER names the host, its boot and this one folder at random. A process locks its folder
# (flock) while it works there, and the kernel ends the lock with the process. Process ids would not
# do: containers that share a disk have ids of their own.
ABANDONED_AFTER = 7 * 24 * 3600.0  # seconds since the last change, for a leftover of unknown owner


class _Lock(Enum):
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
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
    return f"{host}-{digest_of(boot.strip())[:8]}"


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[_Lock]:
    """Hold the lock of a folder or file during the block, if nobody else does; `wait` until then."""
    with contextlib.ExitStack() as stack:
        lock = _Lock.UNKNOWN
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                lock = _Lock.OURS
            except BlockingIOError:
                lock = _Lock.TAKEN
        yield lock


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Run the block while no other process runs one for the same folder or file, on file systems that have locks."""
    with _locked(path, wait=True):
        yield


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked by this process; whatever is left of it at the end goes."""
    while True:
        folder = path.with_name(f".{path.name}.{machine()}-{secrets.token_hex(4)}.partial")
        folder.mkdir()
        with _locked(folder, wait=True):
            if not folder.exists():  # another run took it for a leftover before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left of `path`: runs of this boot at once, others by age."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([^.]+)\.(partial|replaced)")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match is None:
            continue
        here = match.group(1).startswith(f"{machine()}-")
        with _locked(leftover) as lock:
            gone = here and lock is _Lock.OURS
            if lock is _Lock.TAKEN or not (gone or _age(leftover) > ABANDONED_AFTER):
                continue
            if match.group(2) == "replaced" and not path.exists():  # killed between the two renamings
                leftover.rename(path)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since a path, or anything below it, was last changed; 0 if it is gone."""
    changed = [time.time()]
    with contextlib.suppress(FileNotFoundError):
        changed = [each.lstat().st_mtime for each in (path, *path.rglob("*"))]
    return time.time() - max(changed)


def check_parent(path: Path) -> None:
    """Raises `CheckpointError` if a parent of `path` exists and is no folder."""
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise CheckpointError(f"{path}: cannot be written: {parent} is not a folder")
            return


def check_output(out: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` if `out` may not be written."""
    check_parent(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out}: exists and is not a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{out}: exists; choose another --out, or give --overwrite to replace it")
        if not (out / EXPERT_FILE).is_file():
            raise CheckpointError(f"{out}: is no expert (it has no {EXPERT_FILE}), so --overwrite does not touch it")


def require_room(folder: Path, needed: int) -> None:
    """Raises `CheckpointError` unless the disk of `folder` has `needed` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: needs {needed / 2**20:,.0f} MiB of disk, {free / 2**20:,.0f} MiB are free; "
            "free some, or choose a folder on another disk"
        )


@contextlib.contextmanager
def disk_errors(path: Path, full: str = "no room left on the disk; nothing was written") -> Iterator[None]:
    """Turn the disk's errors into `CheckpointError`; `full` is the message for a disk without room."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(f"{path}: {full}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        raise
    except Exception as error:  # safetensors writes files itself, and wraps the disk's error in its text
        code = re.search(r"os error (\d+)", str(error))
        if code is not None and int(code.group(1)) in _FULL:
            raise CheckpointError(f"{path}: {full}") from error
        raise


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The contents of a YAML file.

    Raises:
        SpecError: the file is missing or cannot be read, or a key stands twice, of which YAML would
            take the last.
    """
    try:
        text = path.read_text(encoding="utf-8")
        repeated = [f"{path}: {problem}" for problem in _repeated_keys(yaml.compose(text, Loader=loader), "", set())]
        if repeated:
            raise SpecError(repeated)
        return yaml.load(text, Loader=loader)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _repeated_keys(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[str]:
    """A message for each key that stands twice in a mapping; anchors are read once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, each in enumerate(node.value):
            yield from _repeated_keys(each, f"{where}[{number}]", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            full = f"{where}.{name}" if where else name
            if name in lines:
                yield f"{full}: stands twice, in lines {lines[name]} and {line}; keep one"
            lines[name] = line
            yield from _repeated_keys(value, full, seen)


def shipped(folder: str) -> Path:
    """A folder that ships with the project (`corpora` or `profiles`), in a wheel or a clone."""
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
