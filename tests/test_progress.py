"""What is shown of work and its time, and said when memory runs out."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from expertprune.commands import terminal
from expertprune.errors import UsageError
from expertprune.files import HASHED, file_digest
from expertprune.models import base as bases
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.progress import silent, watching
from expertprune.spec.schema import Base


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."), "20.00 MiB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3221225472 bytes."), "3.00 GiB"),
        (MemoryError(), None),
    ],
)
def test_memory_that_runs_out_is_one_line_with_stage_and_setting(error: Exception, asked: str | None) -> None:
    with pytest.raises(UsageError) as found, silent("prune and repair", 3):
        raise error
    said = str(found.value)
    assert said.startswith("prune and repair: memory ran out")
    assert (f"({asked} more were asked for)" in said) if asked else ("more were asked" not in said)
    assert "base.layers: streamed" in said
    assert "\n" not in said


def test_torch_itself_is_understood_and_other_errors_stay() -> None:
    with pytest.raises(UsageError, match=r"3725290\.30 GiB more"), silent("evaluate", 1):
        torch.empty(10**15 * 4, dtype=torch.int8).fill_(0)
    with pytest.raises(RuntimeError, match="shape"), silent("evaluate", 1):
        raise RuntimeError("shape of the tensors")


class Watched:
    """Notes stages, their steps, and how many were done."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def track(self, stage: str, steps: int) -> Iterator[Callable[[], None]]:
        done: list[int] = []
        yield lambda: done.append(1)
        self.stages.append((stage, steps, len(done)))


def test_loading_and_hashing_are_shown_where_they_take_long(
    tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny checkpoint is one step of hashing; every stored tensor is one of loading (tied ones are stored once)."""
    monkeypatch.setattr(bases, "_MUCH", 0)
    tensors = len(Checkpoint(tiny_llama).tensors)
    files = len(list(tiny_llama.glob("*.safetensors")))
    seen = Watched()
    with watching(seen.track):
        first = resolve_base(Base(model=str(tiny_llama)), store)
        digest = first.digest
        load_model(tiny_llama, torch.float32)
        again = resolve_base(Base(model=str(tiny_llama)), store).digest  # remembered: nothing to show
    assert again == digest
    assert seen.stages == [("hash weights", files, files), ("load weights", tensors, tensors)]
    load_model(tiny_llama, torch.float32)
    assert len(seen.stages) == 2


@pytest.mark.parametrize(("size", "steps"), [(0, 0), (1, 1), (HASHED, 1), (HASHED + 1, 2)])
def test_a_file_is_hashed_in_steps(tmp_path: Path, size: int, steps: int) -> None:
    content = b"x" * size
    (tmp_path / "file").write_bytes(content)
    counted: list[int] = []
    digest = file_digest(tmp_path / "file", tmp_path / "store", lambda: counted.append(1))
    assert digest == hashlib.sha256(content).hexdigest()
    assert len(counted) == steps
    assert file_digest(tmp_path / "file", tmp_path / "store", lambda: counted.append(1)) == digest
    assert len(counted) == steps


def test_a_stage_within_another_has_a_bar_of_its_own_and_both_say_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "messages", Console(file=io.StringIO(), width=100, force_terminal=False))
    with terminal.progress_bar("evaluate", 4) as step:
        step()
        with terminal.progress_bar("load expert", 2) as inner:
            for _ in range(3):  # more than was foreseen
                inner()
        step()
    shown = terminal.messages.file.getvalue()  # type: ignore[attr-defined]
    outer, nested = [line.split() for line in shown.splitlines() if line.strip()]
    assert (outer[0], nested[:2]) == ("evaluate", ["load", "expert"])
    assert "2/2" in outer
    assert "3/3" in nested
    assert outer[-2:][0] == nested[-2:][0] == "left:"
