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
    shutil.copytree(HERE / "families", folder / "families")
    shutil.copy(HERE / "bundled.yaml", folder)
    monkeypatch.setattr(family, "_HERE", folder)
    families.cache_clear()
    yield folder
    monkeypatch.undo()
    families.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    torch.manual_seed(0)
    made = JuniperForCausalLM(JuniperConfig())
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    folder = tmp_path_factory.mktemp("model") / "juniper"
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def check(model: Path, code: int) -> str:
    line = block("sh", "expertprune families").strip().replace("path/to/juniper", str(model))
    result = CliRunner().invoke(main, [*line.split()[1:], "--json"])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output if code else result.stdout


def test_the_page_prints_what_a_layer_stores(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("python").replace("path/to/juniper", str(model)), {})
    assert capsys.readouterr().out == block("text", "before_mix")


WRONG = {
    "[query, key_value]": "mix.read.weight is [48, 24], the config makes axis 0 36",
    "[key_value, key_value, query]": "trunk.blocks.0.mix.write.weight, or what goes into it, is off",
}


def test_the_oracle_says_which_tensor_is_wrong_or_an_expert_is_built(
    arch: Path, model: Path, spec_data: dict[str, Any], tmp_path: Path
) -> None:
    def write(content: str) -> None:
        (arch / "families" / "juniper.yaml").write_text(content)
        families.cache_clear()

    assert "model_type 'juniper' is not supported" in check(model, 2)
    for wrong, said in WRONG.items():
        assert wrong in " ".join(PAGE.split())  # a line may end inside it
        write(block("yaml").replace("[query, key_value, key_value]", wrong))
        assert said in check(model, 2)
    write(block("yaml"))
    held = json.loads(check(model, 0))
    assert held["listed"] is True
    assert held["held"] == ["ffn", "kv_groups", "query_heads", "widths of single layers", "a whole layer"]
    spec_data |= {"base": str(model), "budget": {"ffn": 0.25, "kv_groups": 1, "multiple_of": 4}}
    out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    config = read_json(out / "config.json")
    assert (config["inner"], config["heads"], config["groups"], config["head_size"]) == (24, 4, 2, 4)
    expert = AutoModelForCausalLM.from_pretrained(out)
    assert expert.trunk.blocks[0].feed.rise.weight.shape == (48, 24)


def test_the_page_names_every_key_and_shows_the_file_that_other_tests_use() -> None:
    """`tested` is set by the program alone."""
    assert block("yaml") == FAMILY
    named = set(re.findall(r"`([a-z_]+)`", PAGE.partition("## A worked example")[0]))
    assert set(family.Family.model_fields) - {"tested"} <= named
    assert set(yaml.safe_load(block("yaml"))) <= set(family.Family.model_fields)
