"""Files and folders that are written whole or not at all, their digests, and the room they need."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from platformdirs import user_cache_path

from expertprune.errors import CheckpointError, SpecError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STORE_VARIABLE = "EXPERTPRUNE_STORE"
EXPERT_FILE = "expertprune.json"  # what makes a folder an expert


def store_folder(store: str | Path | None = None) -> Path:
    """The folder of profiles and converted bases: the argument, else `EXPERTPRUNE_STORE`, else the user's cache."""
    if store is not None:
        return Path(store).expanduser()
    if os.environ.get(STORE_VARIABLE):
        return Path(os.environ[STORE_VARIABLE]).expanduser()
    return Path(user_cache_path("expertprune"))


def digest_of(data: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
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
    with contextlib.suppress(CheckpointError):  # a store that cannot be written only costs the next run a second pass
        write_file(remembered, digest.encode())
    return digest


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file or nothing; raises `CheckpointError` where the disk does not allow it."""
    with staged_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    write_file(path, (to_json(data) + "\n").encode())


def to_json(data: Any) -> str:
    """Plain data as JSON that anything reads: what is not a finite number becomes null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    A run that was killed leaves a folder `.NAME.PROCESS.partial`, which the next one for the same `out` removes.

    Raises:
        CheckpointError: `out` exists and `overwrite` is off, or the disk is full.
    """
    check_output(out, overwrite)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        check_output(out, overwrite)  # again: an expert that a killed run had moved aside may be back
        temporary.mkdir()
        try:
            yield temporary
            _replace_folder(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, out: Path) -> None:
    """Rename `new` to `out`; what was there stays until then, and comes back if the renaming fails."""
    if not out.exists():
        os.replace(new, out)
        return
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    os.replace(out, replaced)
    try:
        os.replace(new, out)
    except BaseException:
        replaced.rename(out)
        raise
    shutil.rmtree(replaced)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs left of `path`; what belongs to a process that runs is left alone."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(partial|replaced)")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match is None or _runs(int(match.group(1))):
            continue
        if match.group(2) == "replaced" and not path.exists():  # killed between the two renamings
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_parent(path: Path) -> None:
    """Raises `CheckpointError` if something above `path` is there and is no folder."""
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
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(f"{path}: no room left on the disk; nothing was written") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        raise
    except Exception as error:  # safetensors writes files itself, and wraps the disk's error in its text
        code = re.search(r"os error (\d+)", str(error))
        if code is not None and int(code.group(1)) in _FULL:
            raise CheckpointError(f"{path}: no room left on the disk; nothing was written") from error
        raise


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The contents of a YAML file.

    Raises:
        SpecError: there is no such file, it cannot be read, or a key stands twice in it: YAML would let the last one win.
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
    """What to say of each key that stands twice in the same mapping; an anchor's node is looked at once."""
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
    """A folder that ships with the project (`corpora`, `profiles`), installed or in a clone."""
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
