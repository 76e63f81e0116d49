"""Models are loaded in no more memory than they need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import core_model_loading

from expertprune.models.loading import load_model
from tests.tiny import save_tiny


def test_routed_experts_that_change_dtype_are_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that threads read ahead would wait for those that share a tensor with them."""

    def threads(**_: object) -> None:
        raise AssertionError("weights are read ahead")

    folder = save_tiny(tmp_path / "mixture", "qwen3_moe", dtype=torch.bfloat16)
    expected = {name: value.float() for name, value in load_model(folder, torch.bfloat16).state_dict().items()}
    before = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(core_model_loading, "ThreadPoolExecutor", threads)
        found = load_model(folder, torch.float32).state_dict()
    assert dict(os.environ) == before
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
