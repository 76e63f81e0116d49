"""The whole way on Gemma 3 270M: a German expert with fewer rows and neurons, and one with fewer rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import expertprune
from expertprune.artifacts.expert import Expert
from tests.engines import ALONE, TRANSFORMERS, VLLM, run_script

pytestmark = pytest.mark.slow
SPEC = Path(__file__).parents[2] / "profiles" / "german.yaml"
PROMPTS = ["Die Stadt liegt an der", "Der Fluss fließt durch", "Im Jahr 1990 wurde die", "Das Wasser kocht bei"]
FEW = {"calibration.documents": 8, "evaluate.corpora": ["de"], "evaluate.documents": 8}


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


def base_of(expert: Path, store: Path) -> Path:
    return Expert.load(expert).find_base(store).folder


def test_a_german_expert_is_smaller_and_still_speaks_german(german: Path, real_store: Path) -> None:
    about = expertprune.inspect(german)
    config, base = (
        json.loads((folder / "config.json").read_text()) for folder in (german, base_of(german, real_store))
    )
    kept = {structure: about["plan"]["budget"][structure]["kept"] for structure in ("ffn", "query_heads")}
    assert config["vocab_size"] == 65_536
    heads = 18 * 4 - sum(kept["query_heads"])
    assert abs(heads - 18) <= 1  # one of four a layer on average, to the nearest step: one head or two at once
    assert base["num_attention_heads"] == 4
    neurons = 18 * 2048 - sum(kept["ffn"])
    gone = (262_144 - 65_536) * 640 + neurons * 3 * 640 + heads * 2 * 256 * 640
    assert about["parameters"] == {"before": 268_098_176, "after": 268_098_176 - gone}
    assert neurons / (18 * 2048) == pytest.approx(0.15, abs=64 / 2048)
    numbers = about["evaluation"]["corpora"]["language/de"]["metrics"]["bits_per_byte"]
    assert numbers["low"] <= numbers["retention"] <= numbers["high"]
    print(f"German expert: {numbers}")
    assert 0.6 < numbers["retention"] < 1.02


def test_the_repair_pays_where_outputs_pass_a_norm(german: Path, tmp_path: Path, real_store: Path) -> None:
    overrides = {**FEW, "budget.query_heads": 1, "compensation": "none"}
    plain = expertprune.build(SPEC, tmp_path / "plain", overrides=overrides, store=real_store)
    repaired, cut = (
        expertprune.inspect(folder)["evaluation"]["corpora"]["language/de"]["metrics"]["bits_per_byte"]
        for folder in (german, plain)
    )
    print(f"unrepaired: {cut}")
    assert repaired["base"] == pytest.approx(cut["base"])
    assert repaired["expert"] < cut["expert"]


def test_every_text_begins_with_bos(german: Path, trimmed: Path) -> None:
    """Gemma knows no text without: its loss on one is more than twice as large."""
    for folder in (german, trimmed):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Guten Tag").input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Guten Tag"


def test_fewer_rows_alone_change_nothing_that_is_kept(trimmed: Path, tmp_path: Path, real_store: Path) -> None:
    """Greedy tokens are the base's, up to the first for which the base takes a dropped row.

    The softmax over fewer rows has the same order among those that are left, so nothing else can part them.
    """
    base, new = (AutoTokenizer.from_pretrained(folder) for folder in (base_of(trimmed, real_store), trimmed))
    known = base.get_vocab()
    ids = {known[token]: index for token, index in new.get_vocab().items()}
    for prompt in PROMPTS:
        assert [ids.get(index) for index in base(prompt).input_ids] == new(prompt).input_ids
    expected = run_script(ALONE + TRANSFORMERS, base_of(trimmed, real_store), "float32", tmp_path, PROMPTS)
    found = run_script(ALONE + TRANSFORMERS, trimmed, "float32", tmp_path, PROMPTS)
    agreed = 0
    for mine, theirs in zip(found, expected, strict=True):
        mapped = [ids.get(index) for index in theirs]
        parting = next(
            (place for place, pair in enumerate(zip(mine, mapped, strict=False)) if pair[0] != pair[1]), None
        )
        if parting is not None:
            assert mapped[parting] is None, (base.decode(theirs), new.decode(mine))
        agreed += len(mapped) if parting is None else parting
    assert agreed > 8
    numbers = expertprune.inspect(trimmed)["evaluation"]["corpora"]["language/de"]["metrics"]["bits_per_byte"]
    assert numbers["expert"] < numbers["base"] * 1.05


@pytest.mark.vllm
@pytest.mark.parametrize("which", ["german", "trimmed"])
def test_vllm_generates_the_same(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In float32; the German expert's layers have widths of their own, so the plugin serves it."""
    pytest.importorskip("vllm")
    expert: Path = request.getfixturevalue(which)
    expected = run_script(ALONE + TRANSFORMERS, expert, "float32", tmp_path, PROMPTS)
    alone = ALONE if which == "trimmed" else ""
    assert run_script(alone + VLLM, expert, "float32", tmp_path, PROMPTS) == expected
