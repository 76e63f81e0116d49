"""A base whose layers are read one at a time gives the same expert and the same evaluation."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.errors import UsageError
from expertprune.models.sources import StreamedLayers, is_streamed
from expertprune.spec.reading import parse_spec
from expertprune.stages import evaluate as evaluating
from tests.calling import call
from tests.oracle import stored_tensors
from tests.tiny import save_tiny


def test_an_expert_of_a_streamed_base_is_the_same(
    tmp_path: Path, spec_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec_data["budget"] |= {"kv_groups": 1, "layers": 1}
    spec = parse_spec(spec_data, "spec", tmp_path)
    resident, streamed = (
        expertprune.build(spec, tmp_path / layers, {"base.layers": layers}, store=tmp_path / f"{layers}-store")
        for layers in ("resident", "streamed")
    )
    one, other = stored_tensors(resident), stored_tensors(streamed)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    found = Expert.load(streamed).evaluation
    assert found is not None
    assert found == Expert.load(resident).evaluation

    ran: list[Any] = []
    against = evaluating.Measuring.against
    monkeypatch.setattr(evaluating.Measuring, "against", lambda measuring, expert, *rest: (
        ran.extend((measuring.base.model, expert.model)), against(measuring, expert, *rest))[1])  # fmt: skip
    again = expertprune.evaluate(streamed, store=tmp_path / "streamed-store")
    assert [is_streamed(model) for model in ran] == [True, True], "neither model is whole in memory"
    assert again.corpora.keys() == found.corpora.keys()
    for name, corpus in again.corpora.items():
        for mine, theirs in zip(corpus.per_document, found.corpora[name].per_document, strict=True):
            assert (mine.base_bits, mine.expert_bits) == pytest.approx((theirs.base_bits, theirs.expert_bits), rel=1e-6)
    with pytest.raises(UsageError, match=r"layers are streamed \(base\.layers\): give --backend vllm"):
        expertprune.evaluate_suites(streamed, tasks=["piqa"], store=tmp_path / "streamed-store")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_build_with_gradients_and_hidden_states_in_files_is_the_same(
    family: str, tmp_path: Path, spec_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are about 10 kB of memory for hidden states; the resident build keeps its graphs."""
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
                "budget": {"layers": 1, "ffn": 0.5, "multiple_of": 8},
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
