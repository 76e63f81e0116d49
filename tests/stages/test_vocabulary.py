"""`expertprune vocabulary`: what it counts, counted again by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from expertprune.cli import main
from expertprune.errors import PlanError
from expertprune.spec.reading import parse_spec
from expertprune.stages import vocabulary as tradeoff
from tests.vocabularies import save_worded, tokenizer_of, worded_spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded(tmp_path_factory.mktemp("worded") / "base")


def shown(data: dict[str, Any], folder: Path, *options: str) -> Any:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True))
    return CliRunner().invoke(main, ["vocabulary", str(path), *options])


def test_rows_coverage_tokens_per_word_and_parameters(folder: Path, tmp_path: Path) -> None:
    spec = parse_spec(worded_spec(folder, tmp_path / "spec", {"ffn": 0.25}), "spec", tmp_path)
    found = tradeoff.vocabulary(spec, rows=[384, 300]).document()
    assert [size["rows"] for size in found["sizes"]] == [320, 384]
    assert found["base"]["rows"] == 512
    assert found["base"]["tokens"] == 404
    for size in found["sizes"]:
        assert size["saved"] == (512 - size["rows"]) * 24 * 2
        assert size["parameters"] == found["base"]["parameters"] - size["saved"]
    base = tokenizer_of("byte_level")
    texts = [json.loads(line)["text"] for line in (tmp_path / "spec" / "de.evaluation.jsonl").read_text().splitlines()]
    tokens = [index for text in texts for index in base.encode(text, add_special_tokens=False).ids]
    words = sum(len(text.split(" ")) for text in texts)
    german = found["corpora"]["language/de"]
    assert (german["split"], german["words"], german["tokens"]) == ("evaluation", words, len(tokens))
    assert german["tokens_per_word"] == len(tokens) / words
    small, large = (size["corpora"]["language/de"] for size in found["sizes"])
    assert small["coverage"] <= large["coverage"] <= 1
    assert small["tokens_per_word"] >= large["tokens_per_word"] >= german["tokens_per_word"]
    assert small["tokens_of_base"] == small["tokens_per_word"] / german["tokens_per_word"]


def test_the_table_and_the_json(folder: Path, tmp_path: Path) -> None:
    data = worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 384}})
    result = shown(data, tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kind"] == "vocabulary"
    assert 384 in [size["rows"] for size in found["sizes"]] or len(found["sizes"]) >= 1
    own = [size for size in found["sizes"] if size["corpora"]["language/de"]["calibration_coverage"] >= 0.9]
    assert own
    result = shown(data, tmp_path, "--rows", "320,384")
    assert result.exit_code == 0, result.output
    for text in ("byte-level BPE", "404 tokens in 512 rows", "320", "384", "language/de", "general/general"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("rows", "said"), [("64", "must be at least"), ("512", "below the base's 512"), ("x", "whole numbers")]
)
def test_sizes_that_cannot_be_are_refused(folder: Path, tmp_path: Path, rows: str, said: str) -> None:
    result = shown(worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 320}}), tmp_path, "--rows", rows)
    assert result.exit_code == 2
    assert said in result.stderr


def test_sizes_are_checked_before_any_model_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertprune.models.running.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    spec = parse_spec(worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 320}}), "spec", tmp_path)
    with pytest.raises(PlanError, match="--rows 64"):
        tradeoff.vocabulary(spec, rows=[64])
