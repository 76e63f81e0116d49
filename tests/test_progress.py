"""What is said when memory runs out."""

from __future__ import annotations

import pytest
import torch

from expertprune.errors import UsageError
from expertprune.progress import silent


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
