"""What is shown of work and its time, and said when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from expertprune.errors import UsageError
from expertprune.models import base as bases
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.progress import silent, watching
from expertprune.spec.schema import Base


def test_memory_that_runs_out_is_one_line_with_stage_and_setting_and_other_errors_stay() -> None:
    gpu = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."
    cpu = "DefaultCPUAllocator: not enough memory: you tried to allocate 3221225472 bytes."
    errors: list[tuple[Exception, str | None]] = [
        (torch.OutOfMemoryError(gpu), "20.00 MiB"), (RuntimeError(cpu), "3.00 GiB"), (MemoryError(), None)
    ]  # fmt: skip
    for error, asked in errors:
        with pytest.raises(UsageError) as found, silent("prune and repair", 3):
            raise error
        said = str(found.value)
        assert said.startswith("prune and repair: memory ran out")
        assert (f"({asked} more were asked for)" in said) if asked else ("more were asked" not in said)
        assert "base.layers: streamed" in said
        assert "\n" not in said
    with pytest.raises(UsageError, match=r"3725290\.30 GiB more"), silent("evaluate", 1):
        torch.empty(10**15 * 4, dtype=torch.int8).fill_(0)
    with pytest.raises(RuntimeError, match="shape"), silent("evaluate", 1):
        raise RuntimeError("shape of the tensors")


def test_loading_and_hashing_are_shown(tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny checkpoint is one step of hashing; every stored tensor is one of loading (tied ones are stored once)."""
    monkeypatch.setattr(bases, "_MUCH", 0)
    tensors, files = len(Checkpoint(tiny_llama).tensors), len(list(tiny_llama.glob("*.safetensors")))
    stages: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def track(stage: str, steps: int) -> Iterator[Callable[[], None]]:
        done: list[int] = []
        yield lambda: done.append(1)
        stages.append((stage, steps, len(done)))

    with watching(track):
        digest = resolve_base(Base(model=str(tiny_llama)), store).digest
        load_model(tiny_llama, torch.float32)
        again = resolve_base(Base(model=str(tiny_llama)), store).digest  # remembered: nothing to show
    load_model(tiny_llama, torch.float32)  # nobody watches any more
    assert again == digest
    assert stages == [("hash weights", files, files), ("load weights", tensors, tensors)]
