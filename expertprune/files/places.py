"""Where things lie: the store, what ships with the project, room on a disk, and paths that users write."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from platformdirs import user_cache_path

from expertprune.errors import CheckpointError, UsageError

STORE_VARIABLE = "EXPERTPRUNE_STORE"
MEMORY_VARIABLE = "EXPERTPRUNE_MEMORY"
SPOOL_VARIABLE = "EXPERTPRUNE_SPOOL"
EXPERT_FILE = "expertprune.json"  # what makes a folder an expert
CHANGES_FILE = "changes.json"  # beside it: the examples that changed most,
THROUGHPUT_FILE = "throughput.json"  # the speeds,
REPORT_PAGE, COMPARISON_PAGE = "report.html", "comparison.html"  # and the pages of `report`
PAGE_SUFFIXES = (".html", ".htm")  # of pages in other places, in small or capital letters
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name for the weights of an adapter,
ADAPTER_CONFIG = "adapter_config.json"  # and for what describes it
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, of Linux


def against_file(model: str) -> str:
    """The name of the file with an expert's speeds beside those of another model than its base."""
    return f"throughput-{model}.json"


def is_report(name: str) -> bool:
    """Whether a file of an expert's folder tells of the expert and is no part of it."""
    return name in (CHANGES_FILE, REPORT_PAGE, COMPARISON_PAGE, THROUGHPUT_FILE) or fnmatch.fnmatch(
        name, against_file("*")
    )


def store_folder(store: str | Path | None = None) -> Path:
    """The folder of profiles: the argument, else `EXPERTPRUNE_STORE`, else the user's cache.

    Raises:
        UsageError: it cannot be the path of a folder.
    """
    try:
        if store is not None:
            return user_path(str(store))
        if os.environ.get(STORE_VARIABLE):
            return user_path(os.environ[STORE_VARIABLE])
    except ValueError as error:
        raise UsageError(f"the store: {error}") from None
    return Path(user_cache_path("expertprune"))


def user_path(text: str) -> Path:
    """A path that a user wrote, with `~` replaced by the home folder.

    Raises:
        ValueError: no file can have that path: a NUL, a name that is too long, an unknown user.
    """
    try:
        path = Path(text).expanduser()
        written = os.fsencode(path)
    except RuntimeError:
        raise ValueError(f"{text!r}: the home folder of this user is not known; write the whole path") from None
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no path: it holds half of a character") from None
    if b"\0" in written:
        raise ValueError(f"{text!r} is no path: it holds a NUL")
    if len(written) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise ValueError(f"{text[:40]!r}... is no path: it is too long")
    return path


def numbered(path: Path, folder: bool = False) -> Iterator[Path]:
    """Other names beside a path: `plan-2.json`, `plan-3.json`, ...; of a folder `expert.v1-2`, ..."""
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}" if folder else f"{path.stem}-{number}{path.suffix}")


def unused(path: Path) -> bool:
    """Whether nothing is at a path, or an empty file."""
    return not os.path.lexists(path) or (path.is_file() and not path.is_symlink() and not path.stat().st_size)


def size_in_bytes(text: str) -> int:
    """Bytes of `12884901888`, `12GiB`, `12G` or `1.5 TiB`; raises `ValueError` for other text."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is no size, such as 12GiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def shipped(folder: str) -> Path:
    """A folder that ships with the project (`corpora` or `profiles`), in a wheel or a clone."""
    package = Path(__file__).parent.parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    """The nearest folder that is there."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def require_rooms(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Compare what is to be written with what is free, on each disk.

    Args:
        needs: by the option that names it, such as `--store`, a folder and how many bytes come there.

    Raises:
        CheckpointError: a disk has less room than its folders need together; the message has their options.
    """
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for option, (folder, needed) in needs.items():
        if needed:
            disks.setdefault(_existing(folder).stat().st_dev, []).append((option, folder, needed))
    for here in disks.values():
        free, needed = shutil.disk_usage(_existing(here[0][1])).free, sum(each for _, _, each in here)
        if needed > free:
            parts = ", ".join(f"{each / 2**20:,.0f} MiB in {folder} ({option})" for option, folder, each in here)
            raise CheckpointError(
                f"the disk lacks room: {parts}; {free / 2**20:,.0f} MiB are free; free some, or name a folder on another "
                f"disk with {' or '.join(option for option, _, _ in here)}"
            )


def require_room(folder: Path, needed: int) -> None:
    """Raises `CheckpointError` unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: needs {needed / 2**20:,.0f} MiB of disk, {free / 2**20:,.0f} MiB are free; "
            "free some, or choose a folder on another disk"
        )
