"""One rule for everything that a command writes where the user says.

What is there stays, unless `--overwrite` is given and it is of the kind that the command writes. An
output is never a folder or file that the command reads. Before any work, the output is tried for
real: created, written and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from expertprune.errors import CheckpointError
from expertprune.files.ownership import disk_errors, own_folder, remove_leftovers
from expertprune.files.places import ADAPTER_WEIGHTS, EXPERT_FILE

_HEAD = 4096  # bytes of a file that say what it is


@dataclass(frozen=True)
class OutputKind:
    """What a command writes.

    Attributes:
        name: in words.
        made: whether a path holds one, so that `--overwrite` may replace it.
        option: how the user names it.
    """

    name: str
    made: Callable[[Path], bool]
    folder: bool = False
    option: str = "--out"


def _begins(*signs: bytes) -> Callable[[Path], bool]:
    """Whether the head of a file holds one of these."""

    def made(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return any(sign in head for sign in signs)

    return made


def _cut_adapter(path: Path) -> bool:
    weights = path / ADAPTER_WEIGHTS
    return weights.is_file() and _begins(CUT_ALONG.encode())(weights)


GENERATOR = "expertprune report"  # in the page's head
CUT_ALONG = "expertprune_cut_along"  # in the header of an adapter's weights that were cut along with an expert
ADAPTER = OutputKind("adapter that expertprune cut", _cut_adapter, folder=True)
EXPERT = OutputKind(f"expert (it has no {EXPERT_FILE})", lambda path: (path / EXPERT_FILE).is_file(), folder=True)
PLAN = OutputKind("plan", _begins(b'"kind": "plan"'))
GGUF = OutputKind("GGUF file", _begins(b"GGUF\x03"))
PAGE = OutputKind("page of expertprune", _begins(f'content="{GENERATOR}"'.encode()))
TIMING = OutputKind("timing", _begins(b'"kind": "throughput"'))
PICTURE = OutputKind("picture", _begins(b"\x89PNG\r\n", b"<svg"), option="--picture")


def check_parent(path: Path) -> None:
    """Raises `CheckpointError` if a parent of `path` exists and is no folder."""
    with disk_errors(path):
        for parent in path.absolute().parents:
            if os.path.lexists(parent):
                if not parent.is_dir():
                    raise CheckpointError(f"{path}: cannot be written: {parent} is not a folder")
                return


def check_output(out: Path, overwrite: bool, kind: OutputKind = EXPERT, inputs: Iterable[Path] = ()) -> None:
    """Check that an output can be written, and may be.

    Args:
        out: the output.
        overwrite: whether one of its kind that is there may be replaced.
        inputs: files and folders that the command reads.

    Raises:
        CheckpointError: something is in the way, or the disk does not take it.
    """
    check_parent(out)
    check_inputs(out, inputs)
    with disk_errors(out):
        refuse_present(out, overwrite, kind)
    check_writable(out)


def refuse_present(out: Path, overwrite: bool, kind: OutputKind) -> None:
    """Raises `CheckpointError` where something is that may not be replaced."""
    if out.name in ("", ".."):
        raise CheckpointError(f"{out}: cannot be written; name something new in it, such as {out / 'expert'}")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not (out.is_dir() if kind.folder else out.is_file()):
        if out.is_symlink():
            raise CheckpointError(
                f"{out}: is a symbolic link, which is not replaced; name where it leads, or remove it"
            )
        there = "it is a folder" if out.is_dir() else "it exists and is not a file"
        raise CheckpointError(
            f"{out}: exists and is not a folder" if kind.folder else f"{out}: cannot be written: {there}"
        )
    if kind.folder and not any(out.iterdir()):
        if out.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise CheckpointError(f"{out}: you are in this folder; name a new one, such as {out / 'expert'}")
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists; choose another {kind.option}, or give --overwrite to replace it")
    if not kind.made(out):
        raise CheckpointError(f"{out}: is no {kind.name}, so --overwrite does not touch it")


def check_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raises `CheckpointError` if an output is, or holds, something that the command reads."""
    place = out.resolve()
    for each in inputs:
        read = each.resolve()
        if read == place or place in read.parents:
            raise CheckpointError(f"{out}: the command reads {each}, which this would replace; choose another --out")


def check_writable(out: Path) -> None:
    """Create, write and rename something where an output will be. Nothing is left of it.

    Raises:
        CheckpointError: the disk does not take it.
    """
    check_parent(out)
    parent = out.absolute().parent
    missing: list[str] = []
    while not parent.exists():
        missing.insert(0, parent.name)
        parent = parent.parent
    remove_leftovers(parent)  # of commands that were killed while they tried
    with disk_errors(out), own_folder(parent / out.name) as folder:
        inner = folder.joinpath(*missing)
        inner.mkdir(parents=True, exist_ok=True)
        file = inner / "part"
        file.write_bytes(b"x")
        os.replace(file, inner / out.name)
