"""The choice of the fusion's constants, on a tiny base."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest

from bench import constants
from bench.cells import Bench, Cell
from tests.tiny import WORDS


def write_rows(path: Path, keys: tuple[str, ...], seed: int, count: int = 60) -> None:
    """Rows of random words, long enough to be pieces of a corpus."""
    drawn = random.Random(seed)
    rows = [{key: " ".join(drawn.choices(WORDS, k=60)) for key in keys} for _ in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_choice_is_measured_on_text_that_calibrates_nothing(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for seed, (name, keys) in enumerate((
        ("domain/pubmedqa", ("text", "question", "long_answer")),
        ("general/wikitext2", ("text",)),
        ("task/gsm8k", ("question", "answer")),
    )):  # fmt: skip
        write_rows(data / f"{name}_calibration.jsonl", keys, seed)
    small = partial(Cell, model=str(tiny_llama), documents=6, budget={"ffn": 0.25, "multiple_of": 4})
    monkeypatch.setattr(constants, "Cell", small)
    found = list(constants.losses_of(Bench(data, tmp_path / "results"), 0))
    assert [len(each) for each in found] == [len(constants.HELD_OUT)] * len(constants.CHOICES)
    assert len({tuple(each) for each in found}) > 1
