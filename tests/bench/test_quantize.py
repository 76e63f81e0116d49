"""An expert that llm-compressor quantized: rounded to half a step, it runs and is evaluated."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import expertprune
from bench.quantize import check_names, quantized
from expertprune.errors import CheckpointError, UsageError
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.spec.schema import Base

# llm-compressor's pins are not vLLM's, so it usually has an environment of its own.
COMPRESSOR = os.environ.get("EXPERTPRUNE_TEST_COMPRESSOR") or sys.executable


def test_no_expert_gets_the_results_of_another_one(tmp_path: Path, tiny_build: tuple[Path, Path]) -> None:
    expert, out = tiny_build[0], tmp_path / "out"
    check_names([expert], out)
    with pytest.raises(UsageError, match="have one name, by which results are kept"):
        check_names([expert, tmp_path / expert.name], out)
    shutil.copytree(expert, out / f"{expert.name}-unquantized")
    check_names([expert], out)
    about = json.loads((expert / "expertprune.json").read_text())
    about["name"] = "other"
    (tmp_path / expert.name).mkdir()
    (tmp_path / expert.name / "expertprune.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="holds another expert than"):
        check_names([tmp_path / expert.name], out)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.executable == COMPRESSOR and importlib.util.find_spec("llmcompressor") is None,
    reason="llm-compressor is not installed; EXPERTPRUNE_TEST_COMPRESSOR names a Python that has it",
)
def test_weights_round_to_the_nearest_step(tmp_path: Path, tiny_build: tuple[Path, Path], store: Path) -> None:
    (expert, built), folder = tiny_build, tmp_path / "w8a8"
    quantized(expert, folder, "W8A8", COMPRESSOR)
    stored = load_file(folder / "model.safetensors")
    checkpoint, seen = Checkpoint(expert), 0
    for name in checkpoint.tensors:
        scale = stored.get(name.replace(".weight", ".weight_scale"))
        if scale is None:
            assert torch.equal(stored[name], checkpoint.read(name))
            continue
        exact, seen = checkpoint.read(name).float(), seen + 1
        assert stored[name].dtype is torch.int8
        assert scale.shape == (len(exact), 1)
        assert torch.allclose(scale[:, 0].float(), exact.abs().amax(1) / 127.5, rtol=1e-2)
        assert ((stored[name] * scale.float() - exact).abs() <= scale.float() * (0.5 + 1e-3)).all()
    assert seen == 3 * 7  # projections in three layers: four of attention, three of the FFN

    corpora = expertprune.evaluate(folder, store=built).corpora
    before = json.loads((expert / "expertprune.json").read_text())["evaluation"]["corpora"]
    for name, corpus in corpora.items():
        kept, was = corpus.metrics["bits_per_byte"], before[name]["metrics"]["bits_per_byte"]
        assert kept.base == was["base"]
        assert kept.expert == pytest.approx(was["expert"], rel=0.05)
        assert kept.expert != was["expert"]
    with pytest.raises(CheckpointError, match="prune the unquantized model first, then quantize the expert"):
        resolve_base(Base(model=str(folder)), store)
