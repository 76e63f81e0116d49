"""The whole way on Gemma 3 270M: a German expert with fewer rows and neurons, and one with fewer rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import expertprune
from expertprune.artifacts.expert import Expert
from tests.engines import by_transformers, by_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test builds the expert
SPEC = Path(__file__).parents[2] / "profiles" / "german.yaml"
PROMPTS = ["Die Stadt liegt an der", "Der Fluss fließt durch", "Im Jahr 1990 wurde die", "Das Wasser kocht bei"]
FEW = {
    "calibration.documents": 4, "calibration.max_tokens": 256,
    "evaluate.corpora": ["de"], "evaluate.documents": 4, "evaluate.max_tokens": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """Rows, FFN neurons and a query head of four."""
    overrides = {**FEW, "budget.query_heads": 1}
    return expertprune.build(SPEC, tmp_path_factory.mktemp("german") / "expert", overrides=overrides, store=real_store)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """Fewer rows, and nothing else."""
    overrides = {**FEW, "budget.ffn": 0}
    return expertprune.build(SPEC, tmp_path_factory.mktemp("rows") / "expert", overrides=overrides, store=real_store)


@pytest.fixture(scope="module")
def answers(german: Path, trimmed: Path, real_store: Path) -> list[list[list[int]]]:
    """Greedy tokens by transformers in float32: of the base, of the one with fewer rows, of the German expert."""
    base = Expert.load(trimmed).find_base(real_store).folder
    return [each.tokens for each in by_transformers([(each, "float32") for each in (base, trimmed, german)], PROMPTS)]


def test_a_german_expert_is_smaller_and_still_speaks_german(german: Path, real_store: Path, tmp_path: Path) -> None:
    about = expertprune.inspect(german)
    assert json.loads((german / "config.json").read_text())["vocab_size"] == 65_536
    kept = {structure: about["plan"]["budget"][structure]["kept"] for structure in ("ffn", "query_heads")}
    heads = 18 * 4 - sum(kept["query_heads"])
    assert abs(heads - 18) <= 1  # one of four a layer on average, to the nearest step: one head or two at once
    neurons = 18 * 2048 - sum(kept["ffn"])
    gone = (262_144 - 65_536) * 640 + neurons * 3 * 640 + heads * 2 * 256 * 640
    assert about["parameters"] == {"before": 268_098_176, "after": 268_098_176 - gone}
    assert neurons / (18 * 2048) == pytest.approx(0.15, abs=64 / 2048)
    # The repair pays where outputs pass a norm.
    overrides = {**FEW, "budget.query_heads": 1, "compensation": "none"}
    plain = expertprune.build(SPEC, tmp_path / "plain", overrides=overrides, store=real_store)
    repaired, cut = (
        each["evaluation"]["corpora"]["language/de"]["metrics"]["bits_per_byte"]
        for each in (about, expertprune.inspect(plain))
    )
    print(f"German expert: {repaired}, unrepaired: {cut}")
    assert repaired["low"] <= repaired["retention"] <= repaired["high"]
    assert 0.6 < repaired["retention"] < 1.02
    assert repaired["base"] == pytest.approx(cut["base"])
    assert repaired["expert"] < cut["expert"]


def test_fewer_rows_alone_change_nothing_that_is_kept(
    trimmed: Path, answers: list[list[list[int]]], real_store: Path
) -> None:
    """Greedy tokens are the base's, up to the first for which the base takes a dropped row.

    The softmax over fewer rows has the same order among those that are left, so nothing else can part them. Every text
    begins with one BOS: Gemma knows no text without.
    """
    folder = Expert.load(trimmed).find_base(real_store).folder
    base, new = (AutoTokenizer.from_pretrained(each) for each in (folder, trimmed))
    known = base.get_vocab()
    ids = {known[token]: index for token, index in new.get_vocab().items()}
    for prompt in PROMPTS:
        tokens = new(prompt).input_ids
        assert tokens == [ids.get(index) for index in base(prompt).input_ids]
        assert tokens[0] == new.bos_token_id
        assert tokens.count(new.bos_token_id) == 1
        assert new.decode(tokens, skip_special_tokens=True) == prompt
    agreed = 0
    for mine, theirs in zip(answers[1], answers[0], strict=True):
        mapped = [ids.get(index) for index in theirs]
        parting = next((i for i, (a, b) in enumerate(zip(mine, mapped, strict=False)) if a != b), None)
        if parting is not None:
            assert mapped[parting] is None, (base.decode(theirs), new.decode(mine))
        agreed += len(mapped) if parting is None else parting
    assert agreed > 8
    numbers = expertprune.inspect(trimmed)["evaluation"]["corpora"]["language/de"]["metrics"]["bits_per_byte"]
    assert numbers["expert"] < numbers["base"] * 1.05


@pytest.mark.vllm
def test_vllm_generates_the_same(german: Path, trimmed: Path, answers: list[list[list[int]]]) -> None:
    """In float32; the German expert's layers have widths of their own, so the plugin serves it."""
    pytest.importorskip("vllm")
    found = by_vllm((trimmed, "float32"), (german, "float32"), PROMPTS)
    assert [answer.tokens for answer in found] == answers[1:]
