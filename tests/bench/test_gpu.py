"""The bench of builds on a GPU, run where there is none: all that it calls of a GPU is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, scale


@pytest.mark.parametrize("name", gpu.BUILDS)
def test_a_build_is_taken_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scale.make_checkpoint

    def small(folder: Path, family: str, config: dict[str, Any], device: str) -> None:
        assert device == "cuda"
        narrow = {key: value // 32 for key, value in config.items() if key in scale.WIDTHS} | {"num_hidden_layers": 2}
        few = {"num_experts": 16, "moe_intermediate_size": 32} if "num_experts" in config else {}
        made(folder, family, {**config, **narrow, **few, "head_dim": 8})

    for function in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, function, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * gpu.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(gpu, "make_checkpoint", small)
    monkeypatch.setattr(gpu, "WORDS", 8)
    found = gpu.measure(name, 3, tmp_path)
    assert found["tokens"] == 2 * 47  # a third document is kept for evaluation
    assert found["seconds"].keys() == set(gpu.STAGES)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["forecast"].keys() == {"profile", "repair", "write"}
    table = gpu.Table(["name"])
    gpu.add_build(table, name, found | {"plain": 2.0, "seconds": dict.fromkeys(gpu.STAGES, 4.0)})
    assert table.rows[0][1:7] == ["2.0", "4.0", "4.0", "4.0", "4.0", "4.00"]
    assert table.rows[0][-1].endswith(" / 3.0")
