"""The arms of the table of instruct models."""

from __future__ import annotations

from pathlib import Path

import jsonlines
import pytest

from bench.instruct import ARMS, Bench
from expertprune.corpora.loading import load_corpora

PROMPTS = {"medquad": 3, "oasst1": 2}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Six conversations of each corpus, told apart by their numbers."""
    for name in ("domain/medquad", "chat/oasst1"):
        path = tmp_path / f"{name}_calibration.jsonl"
        path.parent.mkdir()
        said = [("user", "question"), ("assistant", "answer")]
        rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in said]} for i in range(6)]
        with jsonlines.open(path, "w") as file:
            file.write_all(rows)
    return Bench(tmp_path, tokens=100, documents=2, work=tmp_path)


def test_arms_differ_in_one_thing_and_read_no_held_out_row(bench: Bench) -> None:
    plain = bench.spec(ARMS["conversations, prompts 1"], PROMPTS)
    for name, arm in ARMS.items():
        spec = bench.spec(arm, PROMPTS)
        for source in spec.corpora.sources.values():
            assert source.documents == ("raw" if name == "text" else "chat")
            assert (source.generate is not None) == name.startswith("generated")
        others = spec.document() | {"corpora": None, "calibration": None}
        assert others == plain.document() | {"corpora": None, "calibration": None}
    weights = [bench.spec(arm, PROMPTS).calibration.prompt_weight for name, arm in ARMS.items() if "prompts" in name]
    assert weights == [0, 0.1, 0.3, 1]
    medquad, oasst = load_corpora(plain).values()
    assert {document.text.split()[1] for document in medquad.calibration} == {"0", "1", "2"}
    assert {document.text.split()[1] for document in oasst.calibration} == {"0", "1"}
    assert {document.text.split()[1] for document in medquad.evaluation} == {"4", "5"}
