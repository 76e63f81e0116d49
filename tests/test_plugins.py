"""Criteria, rules, repairs and families from another distribution, and what is said of unknown names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertprune.errors import SpecError
from expertprune.spec.reading import parse_spec
from expertprune.stages.validate import validate
from tests import juniper
from tests.juniper import JuniperConfig, JuniperForCausalLM
from tests.plugins import distribution, unpack
from tests.processes import server
from tests.tiny import tiny_tokenizer

FFN = 32  # neurons of a layer of `JuniperConfig()`

# The later a neuron, the higher its score; the rule turns the order around, so that the first neurons stay.
CRITERION = """
import torch
from expertprune.relevance import criterion

@criterion("position", paper="https://example.org/position")
def position(statistics):
    return torch.arange(1.0, statistics.units + 1).expand(statistics.documents, -1)
"""
RULE = """
from expertprune.composition.scoring import rules

@rules.register("reciprocal")
def reciprocal(scores):
    return 1 / scores.amax(0)
"""
REPAIR = """
from expertprune.pruning.repair import repair

@repair("doubled", runs_model=True)
def doubled(job, progress=None):
    text = job.text
    for index, layer in text.layers(progress):
        weight = layer.get_parameter(text.family.ffn.output_weight).detach()
        name = text.family.layer_prefix(index) + text.family.ffn.output_weight
        yield name, 2 * weight[:, list(job.kept[index].ffn)]
"""
POINTS = {
    "expertprune.criteria": {"position": "grove.criterion"},
    "expertprune.rules": {"reciprocal": "grove.rule"},
    "expertprune.repairs": {"doubled": "grove.repair"},
    "expertprune.families": {"juniper": "grove.families"},
}
MODULES = {
    "grove/__init__.py": "",
    "grove/criterion.py": CRITERION,
    "grove/rule.py": RULE,
    "grove/repair.py": REPAIR,
    "grove/families/__init__.py": "from grove.families.model import register\n\nregister()\n",
    "grove/families/model.py": Path(juniper.__file__).read_text(encoding="utf-8"),
    "grove/families/juniper.yaml": juniper.FAMILY,
}


@pytest.mark.slow
def test_a_distribution_brings_entries_of_each_kind(tmp_path: Path, spec_data: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = JuniperForCausalLM(JuniperConfig())
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    spec_data |= {
        "base": str(tmp_path / "base"),
        "budget": {"ffn": 0.25, "multiple_of": 4},
        "relevance": "position",
        "compose": {"rule": "reciprocal", "allocation": "uniform"},
        "compensation": "doubled",
        "general": [],
        "evaluate": {"enabled": False},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec_data))
    installed = unpack(distribution("grove", POINTS, MODULES), tmp_path / "installed")
    finished = server().run("build", tmp_path / "spec.yaml", "--out", tmp_path / "expert", packages=installed)
    assert finished.code == 0, finished.stderr
    said = " ".join(finished.stderr.split())
    assert "the oracle holds on a tiny random copy" in said, "a family that our own tests do not cover"

    expert = load_file(tmp_path / "expert" / "model.safetensors")
    kept = FFN - FFN // 4
    for index, layer in enumerate(base.trunk.blocks):
        rise, fall = layer.feed.rise.weight.detach(), layer.feed.fall.weight.detach()
        values, gates = rise[:kept], rise[FFN : FFN + kept]
        assert torch.equal(expert[f"trunk.blocks.{index}.feed.rise.weight"], torch.cat([values, gates]))
        assert torch.equal(expert[f"trunk.blocks.{index}.feed.fall.weight"], 2 * fall[:, :kept])


def test_every_name_that_nobody_registered_is_told_at_once(tmp_path: Path, spec_data: dict[str, Any]) -> None:
    relevance = {"criterion": "impcat", "experts": "reep"}
    spec_data |= {"relevance": relevance, "compose": {"rule": "intersektion"}, "compensation": "least_square"}
    with pytest.raises(SpecError) as caught:
        validate(parse_spec(spec_data | {"general": ["generall"]}, "spec", tmp_path))
    problems = caught.value.problems
    assert problems[:4] == [
        "relevance.criterion: unknown criterion 'impcat'; did you mean 'impact'?",
        "relevance.experts: unknown criterion 'reep'; did you mean 'reap'?",
        "compose.rule: unknown composition rule 'intersektion'; did you mean 'intersection'?",
        "compensation.method: unknown repair 'least_square'; did you mean 'least_squares'?",
    ]
    assert problems[4].startswith("general: no corpus for 'generall'")
