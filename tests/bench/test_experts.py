"""Experts of three dimensions: what they are asked, and the table."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from bench import experts, instruct
from bench.experts import Asked, Bench, asked_of, four, spanish
from bench.measure import likeliest
from bench.records import made, write
from tests.tiny import tiny_model


def test_the_likeliest_token_is_that_after_the_prompt_alone() -> None:
    """Prompts of several lengths are padded together; each answer is that of the prompt run by itself."""
    model = tiny_model("llama")
    prompts = [[3, 5, 7], [4], [9, 8, 7, 6, 5, 4, 3], [11, 12], [5, 4, 3, 2, 1]]
    alone = [model(input_ids=model.dummy_inputs["input_ids"].new_tensor([ids])).logits[0, -1] for ids in prompts]
    tokens = [2, 9, 14, 21]
    assert likeliest(model, prompts, tokens) == [int(logits[tokens].argmax()) for logits in alone]
    assert len({*likeliest(model, [[each] for each in range(3, 30)], tokens)}) > 1


def test_a_question_is_asked_with_its_letters() -> None:
    asked = four({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2})
    assert asked is not None
    assert str(asked) == "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert asked.answered.endswith("\nAnswer: C")
    assert four({"question": "Which?", "choices": ["a", "b", "c"], "answer": 2}) is None
    questions = [{"question": f"¿{each}?", "answer": each} for each in ("uno", "dos", "dos", "uno", "tres", "cuatro")]
    found = spanish({"text": "Texto.", "questions": questions})
    assert isinstance(found, Asked)
    assert sorted(found.choices) == ["cuatro", "dos", "tres", "uno"]
    assert found.choices[found.answer] == "uno"
    assert spanish({"text": "Texto.", "questions": questions[:4]}) is None, "there are not four different answers"


def test_nothing_that_is_measured_calibrates(tmp_path: Path) -> None:
    """Every corpus and every set of questions of the same data lie in other files; halves of one file are apart."""
    for name, about in experts.CORPORA.items():
        assert about.calibration != about.report, name
        assert about.calibration not in {f"{each.file}.jsonl" for each in experts.QUESTIONS.values()}
    rows = [
        {"text": f"{number}", "questions": [{"question": "?", "answer": f"{a}"} for a in range(4)]}
        for number in range(9)
    ]
    (tmp_path / "language").mkdir()
    (tmp_path / "language/xquad_es_calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = Bench(tmp_path, tmp_path, tmp_path)
    halves = [bench.texts(name, "language/xquad_es_calibration.jsonl") for name in ("encyclopedia-es", "reading-es")]
    contexts = [{text.split("\n")[0] for text in half} for half in halves]
    assert set.union(*contexts) == {row["text"] for row in rows}
    assert not set.intersection(*contexts)


def test_the_table_counts_means_over_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has 3 of 4 of each set. The expert has 2 of 4 of its own and 3 of 4 of the general ones."""
    monkeypatch.setattr(experts, "RESULTS", tmp_path)
    monkeypatch.setattr(instruct, "RESULTS", tmp_path)
    assert set(itertools.chain(*map(asked_of, experts.EXPERTS))) == set(experts.QUESTIONS) == set(asked_of("base"))
    write(experts.path_of("base"), {"right": {name: [1, 1, 1, 0] for name in experts.QUESTIONS}, "made": made()})
    write(instruct.path_of(experts.BASE, instruct.BASE), {"right": [1, 1, 0, 0]})
    right = {name: [1, 1, 0, 0] if about.experts else [1, 1, 1, 0] for name, about in asked_of("software").items()}
    bits: dict[str, Any] = {
        "domain/software": {"group": "expert", "examples": 2, "base": 0.5, "expert": 1.0, "retention": 0.5,
                            "low": 0.4, "high": 0.6}
    }  # fmt: skip
    figures = {
        "parameters": [8, 6],
        "tokens": 7,
        "bits": bits,
        "programs": [0, 1, 0, 0],
        "right": right,
        "made": made(),
    }
    write(experts.path_of("software", 0.25), figures)
    found = experts.text()
    start = "| software | 25% |"
    assert f"{start} MMLU, computing (4) | expert | 0.750 | 0.500 | 0.667 | 0.500" in found
    assert f"{start} MBPP, programs (4) | expert | 0.500 | 0.250 | 0.500 | 0.500" in found
    assert f"{start} domain/software, bits per byte | expert | 0.500 | 1.000 |  | 0.500 (0.400 to 0.600) |" in found
    assert f"{start} **mean accuracy** | expert | 0.625 | 0.375 | 0.600 | 0.500" in found
    assert f"{start} **mean accuracy** | general | 0.750 | 0.750 | 1.000 | 1.000" in found
    assert "medical" not in found
    assert "\nsoftware, 25%: 0 of 0 million parameters, 7 tokens.\nCommit" in found
