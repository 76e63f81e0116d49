"""`expertprune vocabulary`: what it counts, counted again by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import expertprune
from expertprune.errors import SpecError
from expertprune.spec.reading import parse_spec
from expertprune.stages import vocabulary as tradeoff
from tests.calling import call, call_json
from tests.vocabularies import save_worded, tokenizer_of, worded_spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded(tmp_path_factory.mktemp("worded") / "base")


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


def test_the_table_the_json_and_sizes_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    data = worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 384}})
    spec.write_text(yaml.safe_dump(data, allow_unicode=True))
    for rows, said in (
        ("64", "--rows 64.*must be at least"), ("512", "below the base's 512"), ("x", "whole numbers"),
        ("-5", "--rows -5: "), ("384,99999999", "--rows 99999999: "), ("500", "--rows 500: its next multiple of 64"),
    ):  # fmt: skip
        assert re.search(said, call("vocabulary", spec, "--rows", rows, code=2).stderr, re.DOTALL)
    found = call_json("vocabulary", spec)
    assert found["kind"] == "vocabulary"
    assert any(size["corpora"]["language/de"]["calibration_coverage"] >= 0.9 for size in found["sizes"])
    table = call("vocabulary", spec, "--rows", "320,384").stdout
    for text in ("byte-level BPE", "404 tokens in 512 rows", "320", "384", "language/de", "general/general"):
        assert text in table


def test_where_more_than_half_must_stay_the_fewest_rows_are_shown(folder: Path, tmp_path: Path) -> None:
    spec = parse_spec(worded_spec(folder, tmp_path / "spec", {"ffn": 0.25}), "spec", tmp_path)
    found = tradeoff.vocabulary(spec).document()
    assert found["smallest"] == 320  # of 512: no fraction up to a half is shown
    assert [size["rows"] for size in found["sizes"]] == [320, 448]


def test_a_vocabulary_is_not_cut_for_a_chat_with_tokens_of_its_own(tmp_path: Path) -> None:
    base = save_worded(tmp_path / "base", family="gpt_oss")

    def rows(served: list[str]) -> int | None:
        data = worded_spec(base, tmp_path / "spec", {"vocabulary": {"keep": 384}}, serve_with=served)
        return expertprune.validate(parse_spec(data, "spec", tmp_path)).rows

    assert rows(["transformers"]) == 384
    with pytest.raises(
        SpecError, match=r"budget\.vocabulary: vLLM .*'gpt_oss': .*; leave vocabulary out, or vllm out of"
    ):
        rows(["transformers", "vllm"])
