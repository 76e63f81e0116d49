"""Renaming that never destroys what it was not meant for, and that a power loss does not undo."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

_HERE = -100  # AT_FDCWD: relative paths count from the current folder
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # what kernels and file systems without a flag say


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The C library's function; `None` where it has none."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        return None


def _rename(old: Path, new: Path, flag: int) -> bool:
    """Rename with a flag of renameat2; false where the system does not know it."""
    function = _renameat2()
    if function is None:
        return False
    if function(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))


def rename_new(old: Path, new: Path) -> None:
    """Rename a file or folder to a path where nothing is, or to an empty folder if it is a folder itself.

    Raises:
        FileExistsError: something is there. It stays, and so does `old`.
    """
    try:
        if old.is_dir():
            os.rename(old, new)  # the kernel itself refuses a target that is no empty folder
            return
        if _rename(old, new, _NO_REPLACE):
            return
        os.link(old, new)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP) or old.is_dir():
            raise
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # without hard links: claim the name first
        os.replace(old, new)
    else:
        old.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders, so that there is always one at each path; false if the system cannot."""
    return _rename(one, other, _EXCHANGE)


def sync(path: Path) -> None:
    """Bring a file or folder, with all that is in it, to the disk. File systems that cannot sync are passed over."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_one(Path(folder, name))
        _sync_one(Path(folder))
    if not path.is_dir():
        _sync_one(path)


def sync_entry(path: Path) -> None:
    """Bring to the disk that `path` is in its folder, after it was renamed there.

    A folder that may be written but not read is passed over.
    """
    with contextlib.suppress(PermissionError):
        _sync_one(path.absolute().parent.resolve())


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that a power loss does not undo them."""
    missing = [path, *path.parents]
    missing = missing[: next((count for count, each in enumerate(missing) if each.exists()), len(missing))]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_entry(each)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
