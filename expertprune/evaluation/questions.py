"""Multiple-choice questions: answers and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expertprune.corpora.batches import Tokens
from expertprune.corpora.documents import Question
from expertprune.evaluation.reading import Floats, Reading, bits, read
from expertprune.evaluation.retention import Paired
from expertprune.models.passes import TextRun
from expertprune.progress import Progress


def choices_of(questions: Sequence[Question], tokenizer: Any) -> list[Tokens]:
    """Every choice of every question in turn: `" choice"` is asked for after the prompt."""
    sequences = []
    for question in questions:
        start = len(tokenizer(question.prompt)["input_ids"])
        for choice in question.choices:
            ids = tuple(tokenizer(f"{question.prompt} {choice}")["input_ids"])
            answers = tuple(place >= start for place in range(len(ids)))
            sequences.append(Tokens(ids, answers, max(1, len(choice.encode()))))
    return sequences


def right_answers(questions: Sequence[Question], bits: Floats, sizes: Floats) -> Floats:
    """1 where the likeliest choice is the right one, 0 elsewhere, `[questions]`.

    A choice's score is its log-likelihood divided by its bytes. This is `acc_norm` of
    lm-evaluation-harness, which divides by characters.

    Args:
        bits, sizes: bits and bytes of each choice of each question, `[choices]`.
    """
    right, offset = np.zeros(len(questions)), 0
    for number, question in enumerate(questions):
        here = slice(offset, offset + len(question.choices))
        right[number] = float(int((bits[here] / sizes[here]).argmin()) == question.answer)
        offset = here.stop
    return right


def answer_questions(
    model: TextRun, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Floats:
    """1 where the model prefers the right choice, 0 elsewhere, `[questions]` (see `right_answers`)."""
    reading = Reading.of(choices_of(questions, tokenizer))
    return right_answers(questions, bits(reading, read(reading, model, progress), progress), reading.sizes)


def paired_answers(questions: Sequence[Question], base: Floats, expert: Floats) -> Paired:
    """Right answers of both, `[questions]` each; chance is the mean of 1 / number of choices."""
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return Paired(base, expert, np.ones(len(questions)), chance)
