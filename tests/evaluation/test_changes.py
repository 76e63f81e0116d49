"""Answers that flipped and documents whose loss changed, against one choice and one document at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertprune.artifacts.changes import AnswerChange, Changes
from expertprune.corpora.documents import Corpus, CorpusName, Question
from expertprune.errors import CheckpointError
from expertprune.evaluation.changes import LIMIT, LONGEST, largest, of_corpora, shortened
from expertprune.evaluation.measure import Measuring
from expertprune.spec.schema import Evaluate
from tests.evaluation.test_evaluation import DOCUMENTS, likelihoods, some_questions
from tests.tiny import as_run, tiny_model, tiny_tokenizer


def expected_answers(questions: list[Question]) -> list[tuple[Any, ...]]:
    """Prompt, both answers, outcome and both margins of each flipped question, largest change first."""
    models = [as_run(tiny_model("llama", seed=seed)) for seed in (0, 1)]
    tokenizer, found = tiny_tokenizer(), []
    for question in questions:
        picks, margins = [], []
        for model in models:
            sizes = [len(choice.encode()) for choice in question.choices]
            scores = likelihoods(model, tokenizer, question) / math.log(2) / sizes
            picks.append(int(scores.argmax()))
            margins.append(scores[question.answer] - np.delete(scores, question.answer).max())
        if picks[0] != picks[1]:
            outcome = {picks[0]: "lost", picks[1]: "gained"}.get(question.answer, "neither")
            found.append((question.prompt, *(question.choices[pick] for pick in picks), outcome, *margins))
    return sorted(found, key=lambda row: -abs(row[-1] - row[-2]))


def test_flipped_answers_have_their_texts_and_margins_and_documents_their_loss() -> None:
    questions = some_questions()
    corpora = [
        Corpus(CorpusName.parse("language/en"), (), tuple(DOCUMENTS)),
        Corpus(CorpusName.parse("general/qa"), (), (), tuple(questions)),
    ]
    base, expert = (as_run(tiny_model("llama", seed=seed)) for seed in (0, 1))
    result = Measuring(base, tiny_tokenizer(), corpora, Evaluate(max_tokens=20)).against(expert)
    found = of_corpora(corpora, result.corpora)
    expected = expected_answers(questions)[:LIMIT]
    assert {row[3] for row in expected} == {"lost", "gained", "neither"}
    assert [(a.prompt, a.base, a.expert, a.outcome) for a in found.answers] == [row[:4] for row in expected]
    for answer, row in zip(found.answers, expected, strict=True):
        assert (answer.base_margin, answer.expert_margin) == pytest.approx(row[4:], rel=1e-4, abs=1e-6)
        assert answer.change == pytest.approx(row[5] - row[4], rel=1e-3, abs=1e-6)
        assert (answer.source, answer.group) == ("general/qa", "general")
    losses = []
    for document, row in zip(DOCUMENTS, result.corpora["language/en"].per_document, strict=True):
        if row.bytes:
            before, after = row.base_bits / row.bytes, row.expert_bits / row.bytes
            losses.append((document.text, before, after, after - before))
    losses.sort(key=lambda loss: -abs(loss[3]))
    assert [(d.text, d.base, d.expert, d.change) for d in found.documents] == losses


def change(source: str, size: float | None, outcome: Any = "lost") -> AnswerChange:
    about = {"group": "expert", "prompt": "", "base": "a", "expert": "b", "gold": None}
    return AnswerChange(source=source, outcome=outcome, change=size, **about)


def test_sources_take_turns_answers_without_margins_are_ranked_by_what_was_lost_and_texts_are_bounded() -> None:
    first, second = [change("a", 0.1), change("a", -3.0)], [change("b", None, "neither"), change("b", None)]
    assert largest([first, second]) == [first[1], second[1], first[0], second[0]]
    assert len(largest([[change("a", float(number)) for number in range(50)]])) == LIMIT
    text = "".join(str(number % 10) for number in range(5000))
    assert shortened(text) == text[: LONGEST - 1] + "…"
    assert shortened(text, end=True) == "…" + text[-(LONGEST - 1) :]


def test_the_file_comes_back_and_another_is_named(tmp_path: Path) -> None:
    assert Changes.read(tmp_path) is None
    kept = Changes(answers=[change("a", 0.5)])
    kept.save(tmp_path)
    assert Changes.read(tmp_path) == kept
    (tmp_path / "changes.json").write_text('{"kind": "timing"}')
    with pytest.raises(CheckpointError, match=r"changes\.json: is no list of changes.*evaluate the expert again"):
        Changes.read(tmp_path)
