"""The whole way with fewer layers: built, read back, explained, reported, cut again, exported and swept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import load_plan
from expertprune.errors import SpecError
from expertprune.models.checkpoint import Checkpoint
from tests.calling import call, call_json
from tests.vocabularies import save_worded, worded_spec


def written(data: dict[str, Any], path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(data | changes))
    return path


def test_an_expert_of_fewer_layers_goes_the_whole_way(spec_data: dict[str, Any], tmp_path: Path, store: Path) -> None:
    """One of three layers goes, and a quarter of the neurons of the others, ranked over both."""
    budget = {"layers": 1, "ffn": 0.25, "multiple_of": 4}
    spec = written(spec_data, tmp_path / "spec.yaml", budget=budget, compose={"allocation": "global"})
    checked = call_json("validate", spec, "--store", store)
    folder = expertprune.build(spec, tmp_path / "expert", store=store)
    plan = Expert.load(folder).plan
    (gone,) = plan.gone
    assert plan.depth is not None
    assert plan.depth.relevance[gone] == min(plan.depth.relevance[1:])
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert Checkpoint(folder).parameters == plan.parameters.after == checked["expert"]["parameters"]
    assert sum(len(units.ffn) for units in plan.kept) == 48  # of 2 times 32
    assert f"2 of 3 (without {gone})" in call("inspect", folder).output
    page = tmp_path / "report.html"
    call("report", folder, "--out", page, "--store", store)
    assert "whole layers</b> were cut" in page.read_text()
    assert "| layers, of the whole model | 2 | 3 |" in (folder / "README.md").read_text()
    again = written(spec_data, tmp_path / "again.yaml", base=str(folder), budget={"layers": 0.5}, compose={})
    smaller = expertprune.build(again, tmp_path / "smaller", store=store)
    assert Expert.load(smaller).plan.gone == (1,)
    assert json.loads((smaller / "config.json").read_text())["num_hidden_layers"] == 1


def test_layers_and_vocabulary_alone_give_a_stock_checkpoint_that_can_be_exported(tmp_path: Path, store: Path) -> None:
    base = save_worded(tmp_path / "base", num_hidden_layers=3)
    budget = {"layers": 1, "vocabulary": {"keep": 320}}
    spec = written(worded_spec(base, tmp_path / "texts", budget), tmp_path / "spec.yaml")
    folder = expertprune.build(spec, tmp_path / "expert", store=store)
    config, before = (json.loads((each / "config.json").read_text()) for each in (folder, base))
    assert {key for key in config if not key.endswith("_token_id") and config[key] != before[key]} == {
        "num_hidden_layers",
        "vocab_size",
    }
    call("export", folder, "--out", tmp_path / "expert.gguf", "--type", "f32")
    reader = GGUFReader(tmp_path / "expert.gguf")
    assert reader.fields["llama.block_count"].contents() == 2
    assert {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")} == {"0", "1"}


def test_a_plan_that_was_composed_is_applied_later(spec_data: dict[str, Any], tmp_path: Path, store: Path) -> None:
    spec = written(spec_data, tmp_path / "spec.yaml", budget={"layers": 1}, compensation="none")
    call("compose", spec, "--out", tmp_path / "plan.json", "--store", store)
    plan = load_plan(tmp_path / "plan.json")
    folder = expertprune.prune(tmp_path / "plan.json", tmp_path / "expert", store=store)
    assert Expert.load(folder).plan.gone == plan.gone


def test_a_sweep_over_layers(spec_data: dict[str, Any], tmp_path: Path, store: Path) -> None:
    spec = written(spec_data, tmp_path / "spec.yaml", budget={"layers": 1})
    points = expertprune.sweep(spec, [0.3, 0.6], store=store).points
    layer = 24 * 24 + 2 * 12 * 24 + 24 * 24 + 3 * 32 * 24 + 2 * 24
    assert [point.parameters["before"] - point.parameters["after"] for point in points] == [layer, 2 * layer]
    with pytest.raises(SpecError, match=r"0\.01 of 3 layers is less than half a layer"):
        expertprune.sweep(spec, [0.01], store=store)
