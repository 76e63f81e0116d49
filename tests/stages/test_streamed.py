"""A whole build from streamed layers, with hidden states in files, is the build of a resident model."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from expertprune.artifacts.expert import Expert
from expertprune.models.sources import StreamedLayers
from tests.calling import call
from tests.tiny import save_tiny


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_streamed_build_gives_the_same_plan_weights_and_evaluation(
    family: str, tmp_path: Path, spec_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamed one has about 10 kB for hidden states, so most are in files; profiles are not shared."""
    for name in ("EXPERTPRUNE_MEMORY", "EXPERTPRUNE_SPOOL"):
        monkeypatch.setenv(name, "")  # what the command sets goes with the test
    opened, open_layer = [], StreamedLayers.opened
    monkeypatch.setattr(StreamedLayers, "opened", lambda *given: (opened.append(given[2]), open_layer(*given))[1])
    base = save_tiny(tmp_path / "base", family, max_shard_size="20KB")
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        yaml.safe_dump(
            {
                **spec_data,
                "base": str(base),
                "relevance": {"criterion": "fisher"},
                "budget": {"ffn": 0.5, "multiple_of": 8},
            }
        )
    )
    common = ["build", spec, "--out"]
    call(*common, tmp_path / "resident", "--store", tmp_path / "store-1")
    assert not opened
    spool = tmp_path / "spool"
    monkeypatch.setattr("expertprune.models.spool.SHARE", 1e-5)
    limits = ["--memory", "1GiB", "--spool", spool]
    call(*common, tmp_path / "streamed", "--store", tmp_path / "store-2", "--set", "base.layers=streamed", *limits)
    assert len(opened) > 3 * 4  # layers of corpora at least
    assert spool.is_dir()
    gc.collect()
    assert os.listdir(spool) == []
    experts = [Expert.load(tmp_path / each) for each in ("resident", "streamed")]
    assert experts[0].plan.kept == experts[1].plan.kept
    files = sorted(path.name for path in experts[0].folder.glob("*.safetensors"))
    for file in files:
        resident, streamed = (load_file(each.folder / file) for each in experts)
        assert resident.keys() == streamed.keys()
        for name, value in resident.items():
            torch.testing.assert_close(streamed[name], value, rtol=1e-4, atol=1e-5)
    results = [each.evaluation for each in experts]
    assert results[0] is not None
    assert results[1] is not None
    for corpus, result in results[0].corpora.items():
        for metric, measured in result.metrics.items():
            assert results[1].corpora[corpus].metrics[metric].expert == pytest.approx(measured.expert, rel=1e-4), metric
