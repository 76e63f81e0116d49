"""Answers that flipped and documents whose loss changed, against one choice and one document at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from expertprune.artifacts.changes import AnswerChange, Changes
from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.errors import CheckpointError
from expertprune.evaluation.changes import LIMIT, LONGEST, largest, of_corpora, shortened
from expertprune.evaluation.measure import Measuring
from expertprune.spec.schema import Evaluate
from tests.evaluation.test_evaluation import DOCUMENTS, likelihoods, some_questions
from tests.tiny import as_run, tiny_model, tiny_tokenizer


def expected_answers(questions: list[Question]) -> list[tuple[Any, ...]]:
    """Prompt, both answers, outcome and both margins of each flipped question, largest change first."""
    tokenizer, found = tiny_tokenizer(), []
    for question in questions:
        picks, margins = [], []
        for seed in (0, 1):
            sums = likelihoods(as_run(tiny_model("llama", seed=seed)), tokenizer, question) / math.log(2)
            scores = [total / len(choice.encode()) for total, choice in zip(sums, question.choices, strict=True)]
            picks.append(max(range(len(scores)), key=scores.__getitem__))
            wrong = [score for number, score in enumerate(scores) if number != question.answer]
            margins.append(scores[question.answer] - max(wrong))
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
    losses = {
        document.text: (row.base_bits / row.bytes, row.expert_bits / row.bytes)
        for document, row in zip(DOCUMENTS, result.corpora["language/en"].per_document, strict=True)
    }
    order = sorted(losses, key=lambda text: -abs(losses[text][1] - losses[text][0]))
    assert [(d.text, d.base, d.expert, d.change) for d in found.documents] == [
        (text, *losses[text], losses[text][1] - losses[text][0]) for text in order
    ]


def change(source: str, size: float | None, outcome: Any = "lost") -> AnswerChange:
    about = {"group": "expert", "prompt": "", "base": "a", "expert": "b", "gold": None}
    return AnswerChange(source=source, outcome=outcome, change=size, **about)


def test_sources_take_turns_and_answers_without_margins_are_ranked_by_what_was_lost() -> None:
    first = [change("a", 0.1), change("a", -3.0)]
    second = [change("b", None, "neither"), change("b", None, "gained"), change("b", None, "lost")]
    taken = [(each.source, each.change, each.outcome) for each in largest([first, second])]
    assert taken == [("a", -3.0, "lost"), ("b", None, "lost"), ("a", 0.1, "lost"), ("b", None, "gained"),
                     ("b", None, "neither")]  # fmt: skip
    assert len(largest([[change("a", float(number)) for number in range(50)]])) == LIMIT


def test_texts_are_bounded_and_a_prompt_keeps_its_end() -> None:
    text = "".join(str(number % 10) for number in range(5000))
    assert shortened(text) == text[: LONGEST - 1] + "…"
    assert shortened(text, end=True) == "…" + text[-(LONGEST - 1) :]
    assert shortened(text[:LONGEST]) == text[:LONGEST]


def test_the_file_comes_back_and_another_is_named(tmp_path: Path) -> None:
    assert Changes.read(tmp_path) is None
    kept = Changes(answers=[change("a", 0.5)])
    kept.save(tmp_path)
    assert Changes.read(tmp_path) == kept
    (tmp_path / "changes.json").write_text('{"kind": "timing"}')
    with pytest.raises(CheckpointError, match=r"changes\.json: is no list of changes.*evaluate the expert again"):
        Changes.read(tmp_path)


def test_a_document_without_predicted_bytes_has_no_change() -> None:
    corpora = [Corpus(CorpusName.parse("language/en"), (), (Document("heart"), DOCUMENTS[0]))]
    base, expert = (as_run(tiny_model("llama", seed=seed)) for seed in (0, 1))
    result = Measuring(base, tiny_tokenizer(), corpora, Evaluate(metrics=["bits_per_byte"])).against(expert)
    assert [each.text for each in of_corpora(corpora, result.corpora).documents] == [DOCUMENTS[0].text]
