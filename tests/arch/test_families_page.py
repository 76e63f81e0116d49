"""Follows `docs/families.md` for the invented family of its worked example."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import expertprune
from expertprune.arch import families, family
from expertprune.cli import main
from expertprune.spec.reading import parse_spec
from tests.documents import blocks, page
from tests.juniper import FAMILY, JuniperConfig, JuniperForCausalLM, register
from tests.oracle import read_json
from tests.tiny import tiny_tokenizer

HERE = Path(family.__file__).parent
PAGE = page("docs/families.md")


def block(language: str, beginning: str = "") -> str:
    """A fenced block of the page, by how it begins."""
    return next(text for text in blocks(language, PAGE) if text.startswith(beginning))


@pytest.fixture
def arch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the families' folder, to which files may be added."""
    folder = tmp_path / "arch"
    folder.mkdir()
    shutil.copytree(HERE / "families", folder / "families")
    shutil.copy(HERE / "bundled.yaml", folder)
    monkeypatch.setattr(family, "_HERE", folder)
    families.cache_clear()
    yield folder
    monkeypatch.undo()
    families.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    register()
    torch.manual_seed(0)
    made = JuniperForCausalLM(JuniperConfig())
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    made.save_pretrained(tmp_path / "juniper")
    tiny_tokenizer().save_pretrained(tmp_path / "juniper")
    return tmp_path / "juniper"


def check(model: Path, code: int) -> str:
    line = block("sh", "expertprune families").strip().replace("path/to/juniper", str(model))
    result = CliRunner().invoke(main, [*line.split()[1:], "--json"])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output if code else result.stdout


def test_the_page_prints_what_a_layer_stores(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("python").replace("path/to/juniper", str(model)), {})
    assert capsys.readouterr().out == block("text", "before_mix")


def test_with_the_file_the_oracle_holds_and_an_expert_is_built(
    arch: Path, model: Path, spec_data: dict[str, Any], tmp_path: Path
) -> None:
    assert "model_type 'juniper' is not supported" in check(model, 2)
    (arch / "families" / "juniper.yaml").write_text(block("yaml"))
    families.cache_clear()
    held = json.loads(check(model, 0))
    assert held["listed"] is True
    assert held["held"] == ["ffn", "kv_groups", "query_heads", "widths of single layers", "a whole layer"]
    spec_data["base"] = str(model)
    spec_data["budget"] = {"ffn": 0.25, "kv_groups": 1, "multiple_of": 4}
    out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    config = read_json(out / "config.json")
    assert (config["inner"], config["heads"], config["groups"], config["head_size"]) == (24, 4, 2, 4)
    expert = AutoModelForCausalLM.from_pretrained(out)
    assert expert.trunk.blocks[0].feed.rise.weight.shape == (48, 24)


WRONG = {
    "[query, key_value]": "mix.read.weight is [48, 24], the config makes axis 0 36",
    "[key_value, key_value, query]": "trunk.blocks.0.mix.write.weight, or what goes into it, is off",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_wrong_is_told_the_tensor(arch: Path, model: Path, wrong: str) -> None:
    right = "[query, key_value, key_value]"
    assert right in block("yaml")
    assert wrong in " ".join(PAGE.split())  # a line may end inside it
    (arch / "families" / "juniper.yaml").write_text(block("yaml").replace(right, wrong))
    assert WRONG[wrong] in check(model, 2)


def test_the_page_names_every_key_and_shows_the_file_that_other_tests_use() -> None:
    """`tested` is set by the program alone."""
    assert block("yaml") == FAMILY
    named = set(re.findall(r"`([a-z_]+)`", PAGE.partition("## A worked example")[0]))
    assert set(family.Family.model_fields) - {"tested"} <= named
    assert set(yaml.safe_load(block("yaml"))) <= set(family.Family.model_fields)
