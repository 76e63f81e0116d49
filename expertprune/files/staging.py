"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from expertprune.errors import CheckpointError
from expertprune.files.digests import digest_of
from expertprune.files.outputs import EXPERT, OutputKind, check_output
from expertprune.files.ownership import disk_errors, locked, own_folder, remove_leftovers
from expertprune.files.places import numbered
from expertprune.files.reading import not_a_file, opened
from expertprune.files.renaming import exchange, make_folder, rename_new, sync, sync_entry

_Identity = tuple[int, int] | None  # of a file or folder: its device and number there; `None` where there is none


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    For files of our own, such as those of the store: what is there is replaced. For a file that the
    user asked for, see `staged_output`.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    with _making(path) as made:
        yield made
        _finish(made)
        os.replace(made, path)
        sync_entry(path)


@contextlib.contextmanager
def staged_output(path: Path, kind: OutputKind, overwrite: bool = False) -> Iterator[Path]:
    """The same for a file that the user asked for; `path` is replaced only as `check_output` allows.

    Raises:
        CheckpointError: as above; or something came to `path` meanwhile, which stays. The result is then beside it.
    """
    check_output(path, overwrite, kind)
    with _present(path) as present, _making(path) as made:
        yield made
        _finish(made)
        _put(made, path, present if overwrite else None)


@contextlib.contextmanager
def staged_folder(out: Path, overwrite: bool = False, kind: OutputKind = EXPERT) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    A run that is killed leaves its temporary folder behind. A later run beside it removes it.

    Raises:
        CheckpointError: `out` may not be written; the disk is full; or something came to `out`
            meanwhile, which stays. The result is then beside it.
    """
    remove_leftovers(out.parent)  # first: an expert that a killed run had moved aside comes back
    check_output(out, overwrite, kind)
    with _present(out) as present, _making(out) as made:
        made.mkdir()
        yield made
        _finish(made)
        _put(made, out, present if overwrite else None)


@contextlib.contextmanager
def stored_folder(path: Path, whole: Callable[[Path], bool]) -> Iterator[Path]:
    """The same for a folder of the store, which any process may make at the same time.

    A whole one that came to `path` meanwhile stays, and what is left of a damaged one goes.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    with _making(path) as made:
        made.mkdir()
        yield made
        _finish(made)
        try:
            rename_new(made, path)
        except FileExistsError:
            if not whole(path):
                _replaced(made, path, _identity(path))  # unless another process has put a whole one there by now
        sync_entry(path)


@contextlib.contextmanager
def _making(path: Path) -> Iterator[Path]:
    """A path for something new, in a folder of this process beside `path`."""
    with disk_errors(path):
        make_folder(path.parent)
        remove_leftovers(path.parent)
        with own_folder(path) as folder:
            yield folder / path.name


def _finish(made: Path) -> None:
    """Give everything the mode that the umask says, and bring it to the disk.

    Libraries that write files themselves give them other modes.
    """
    mode = made.parent.stat().st_mode & 0o777
    for each in (made, *made.rglob("*")):
        if not each.is_symlink():
            each.chmod(mode if each.is_dir() else mode & 0o666)
    sync(made)


def _put(made: Path, path: Path, expected: _Identity) -> None:
    """Rename to `path`. Of what is there, only the file or folder of the expected identity is replaced."""
    try:
        rename_new(made, path)
    except FileExistsError:
        if not _replaced(made, path, expected):
            raise CheckpointError(
                f"{path}: something else came there while this command ran, and stays; the result is {_beside(made, path)}"
            ) from None
    sync_entry(path)


def _replaced(made: Path, path: Path, expected: _Identity) -> bool:
    """Put `made` into the place of what is expected there; false if something else is there."""
    with locked(path, wait=True):  # nobody writes into an expert that is about to go
        if expected is None or _identity(path) != expected:
            return False
        if exchange(made, path):
            if _identity(made) == expected:
                return True  # what was replaced goes with the folder that it is in now
            exchange(made, path)
            return False
        with own_folder(path, "replaced") as aside:
            moved = aside / path.name
            os.replace(path, moved)
            try:
                if _identity(moved) == expected:
                    rename_new(made, path)
                    return True
            except BaseException:
                _put_back(moved, path)
                raise
            _put_back(moved, path)
            return False


def _put_back(moved: Path, path: Path) -> None:
    """Rename back what was moved aside, or beside its place if something is there by now."""
    try:
        rename_new(moved, path)
    except FileExistsError:
        _beside(moved, path)


def _beside(made: Path, path: Path) -> Path:
    """Rename to a name beside `path` that nothing has."""
    for other in numbered(path, folder=made.is_dir()):
        with contextlib.suppress(FileExistsError):
            rename_new(made, other)
            sync_entry(other)
            return other
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def _present(path: Path) -> Iterator[_Identity]:
    """What is at a path now. Its number is not given to another file during the block, since it is held open."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        status = os.fstat(handle)
        yield status.st_dev, status.st_ino
    finally:
        os.close(handle)


def _identity(path: Path) -> _Identity:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


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


def _remembered(path: Path, store: Path) -> Path:
    """Where the store remembers a file's digest: by path, size and modification time."""
    status = path.stat()
    return store / "digests" / digest_of([str(path.resolve()), status.st_size, status.st_mtime_ns])


def known_digest(path: Path, store: Path) -> str | None:
    """What the store remembers of a file's digest."""
    with contextlib.suppress(OSError):
        text = _remembered(path, store).read_text()
        if len(text) == 64:
            return text
    return None


_BLOCK = 2**22  # bytes in memory
HASHED = 16 * _BLOCK  # bytes that a step of `file_digest` reads


def file_digest(path: Path, store: Path, step: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file's bytes, remembered in the store by path, size and modification time.

    Args:
        step: called after every `HASHED` bytes that are read, and after the rest.

    Raises:
        CheckpointError: it is missing, or no regular file.
    """
    if problem := not_a_file(path):
        raise CheckpointError(f"{path}: {problem}")
    if (known := known_digest(path, store)) is not None:
        return known
    remembered, digest, read = _remembered(path, store), hashlib.sha256(), 0
    with opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            read += len(block)
            if step is not None and (len(block) < _BLOCK or read % HASHED == 0):
                step()
    with contextlib.suppress(CheckpointError):  # without a store, the next run only reads the file again
        write_file(remembered, digest.hexdigest().encode())
    return digest.hexdigest()
