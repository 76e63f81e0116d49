"""Checkpoints that hold layers for multi-token prediction behind their decoder layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertprune.models.checkpoint import INDEX
from tests.oracle import SHARDS, change_config, load, pruned, random_plan, read_json, resolved, stored_tensors
from tests.tiny import save_tiny


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "model.layers.3."), ("qwen3_next", "mtp.layers.0.")])
def test_they_are_left_out_and_the_rest_is_cut_as_without_them(
    family: str, name: str, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real ones have another embedding, and routed experts in the number that the config says."""
    plain = save_tiny(tmp_path / "plain", family, max_shard_size=SHARDS["several files"])
    more = save_tiny(tmp_path / "more", family, max_shard_size=SHARDS["several files"])
    last = {key: value for key, value in stored_tensors(more).items() if key.startswith("model.layers.2.")}
    added = {name + key.removeprefix("model.layers.2."): value for key, value in last.items()}
    added |= {f"{name}eh_proj.weight": torch.ones(24, 48), f"{name}embed_tokens.weight": torch.ones(64, 24)}
    index, files = read_json(more / INDEX), sorted(more.glob("*.safetensors"))
    shared, own = dict(list(added.items())[:2]), dict(list(added.items())[2:])  # in a file of others, and in their own
    save_file(load_file(files[0]) | shared, files[0], {"format": "pt"})
    save_file(own, more / "prediction.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(shared, files[0].name) | dict.fromkeys(own, "prediction.safetensors")
    (more / INDEX).write_text(json.dumps(index))
    change_config(more, num_nextn_predict_layers=1)

    caplog.set_level("WARNING")
    base, without = resolved(more, store), resolved(plain, store)
    assert f"layers for multi-token prediction ({name}" in caplog.text
    assert base.checkpoint.parameters == without.checkpoint.parameters
    out = pruned(random_plan(base, experts=4), base, tmp_path / "out")
    expected = stored_tensors(pruned(random_plan(without, experts=4), without, tmp_path / "expected"))
    found = stored_tensors(out)
    assert found.keys() == expected.keys() == read_json(out / INDEX)["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_json(out / "config.json")["num_nextn_predict_layers"] == 0
    load(out)
