"""Names and patterns of modules in an adapter's config, when layer 2 of twelve goes."""

from __future__ import annotations

import re

import pytest

from expertprune.errors import CheckpointError
from expertprune.pruning.adapter_config import renumbered, renumbered_names

POSITIONS = {layer: layer - (layer > 2) for layer in range(12) if layer != 2}


@pytest.mark.parametrize(
    ("name", "new"),
    [
        (r"layers\.10\.mlp\.up_proj|layers\.1\.mlp\.up_proj", [r"layers\.9\.mlp\.up_proj|layers\.1\.mlp\.up_proj"]),
        (r".*layers\.2\.mlp\.(up|down)_proj|.*\.layers\.2\.self_attn\.q_proj", []),
        *((rf"layers\.{number}\.mlp\.w[0-9]", [rf"layers\.{number}\.mlp\.w[0-9]"])
          for number in ("[0-9]+", "[0-9]*", r"\d+", r"\d*", ".+", ".*", r"\w+")),
    ],
)  # fmt: skip
def test_a_pattern_whose_layers_all_stay_or_all_go_is_renumbered_or_left_out(name: str, new: list[str]) -> None:
    assert renumbered_names([name], "model.layers", POSITIONS) == new


@pytest.mark.parametrize(
    "name",
    [
        r".*layers\.2\.mlp\.up_proj|.*layers\.3\.mlp\.up_proj",
        r"layers\.2\.mlp\.up_proj|down_proj",
        r"(layers\.2\.mlp|shared)\.up_proj",
        r".*(?!layers\.2\.)\.up_proj",
        r"layers\.[0-9]\.mlp\.up_proj",  # one digit: layers 0 to 9, of which the last would be what was 10
        r"layers\.\d\.mlp\.up_proj",
        r"layers\.1\d\.mlp\.up_proj",
        r"layers\.\d{2}\.mlp\.up_proj",
        r"layers\..\.mlp\.up_proj",
        r"layers\.\w\.mlp\.up_proj",
    ],
)
def test_a_pattern_that_cannot_be_renumbered_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(repr(name)) + " names .*write it as a list of full names"):
        renumbered({"alpha_pattern": {name: 40}}, "model.layers", POSITIONS)
