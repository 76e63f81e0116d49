"""Multiple-choice questions: answers and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from expertprune.corpora.batches import Tokens, open_ids
from expertprune.corpora.documents import Question
from expertprune.errors import SpecError
from expertprune.evaluation.arrays import Floats, Indices
from expertprune.evaluation.reading import Reading, bits, read
from expertprune.evaluation.retention import Paired
from expertprune.models.passes import TextRun
from expertprune.progress import Progress


def choices_of(questions: Sequence[Question], tokenizer: Any) -> list[Tokens]:
    """Every choice of every question in turn: `" choice"` is asked for after the prompt."""
    sequences = []
    for question in questions:
        start = len(open_ids(question.prompt, tokenizer))
        for choice in question.choices:
            ids = tuple(open_ids(f"{question.prompt} {choice}", tokenizer))
            answers = tuple(place >= start for place in range(len(ids)))
            sequences.append(Tokens(ids, answers, max(1, len(choice.encode()))))
    return sequences


def check_questions(sequences: Sequence[Tokens], questions: Sequence[Question], context: int | None) -> None:
    """Raises `SpecError` where a question is longer than a base's context.

    Args:
        sequences: `choices_of` the questions.
    """
    numbers = [number for number, question in enumerate(questions, 1) for _ in question.choices]
    for number, each in zip(numbers, sequences, strict=False):
        if context is not None and len(each) > context:
            raise SpecError(
                f"question {number} has {len(each)} tokens with a choice, and the base's context {context}: shorten it, "
                "or take it out"
            )


class Answers(NamedTuple):
    """What one model answers, `[questions]` each.

    `picks` are the numbers of the likeliest choices. `right` is 1 where that is the right choice, 0
    elsewhere. `margins` say by how much the right choice's score lies above the best wrong one's.
    """

    picks: Indices
    right: Floats
    margins: Floats


def answers(questions: Sequence[Question], bits: Floats, sizes: Floats) -> Answers:
    """The answers of a model that needs so many bits for each choice.

    A choice's score is its log-likelihood in bits divided by its bytes. This is `acc_norm` of
    lm-evaluation-harness, which divides by characters.

    Args:
        bits, sizes: bits and bytes of each choice of each question, `[choices]`.
    """
    picks, margins, offset = [], [], 0
    for question in questions:
        here = slice(offset, offset + len(question.choices))
        scores = -bits[here] / sizes[here]
        picks.append(int(scores.argmax()))
        margins.append(margin(scores, question.answer))
        offset = here.stop
    chosen = np.array(picks, dtype=np.int64)
    right = (chosen == [question.answer for question in questions]).astype(np.float64)
    return Answers(chosen, right, np.array(margins))


def margin(scores: Floats, answer: int) -> float:
    """By how much the score of choice `answer` lies above the best of the others; below it is negative."""
    return float(scores[answer] - np.delete(scores, answer).max(initial=-np.inf))


def answer_questions(
    model: TextRun, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Floats:
    """1 where the model prefers the right choice, 0 elsewhere, `[questions]` (see `answers`)."""
    reading = Reading.of(choices_of(questions, tokenizer))
    return answers(questions, bits(reading, read(reading, model, progress), progress), reading.sizes).right


def paired_answers(questions: Sequence[Question], base: Floats, expert: Floats) -> Paired:
    """Right answers of both, `[questions]` each; chance is the mean of 1 / number of choices."""
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return Paired(base, expert, np.ones(len(questions)), chance)
