"""Multiple-choice questions: answers and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from expertprune.corpora.batches import make_batches
from expertprune.corpora.documents import Question
from expertprune.evaluation.documents import TOKENS_PER_BATCH
from expertprune.evaluation.retention import Floats, Paired
from expertprune.progress import Progress


@torch.inference_mode()
def answer_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Floats:
    """1 where the model prefers the right choice, 0 elsewhere, `[questions]`.

    A choice's score is the log-likelihood of `" choice"` after the prompt, divided by its bytes.
    This is `acc_norm` of lm-evaluation-harness, which divides by characters.
    """
    sequences, spans = [], []
    for question in questions:
        start = len(tokenizer(question.prompt)["input_ids"])
        for choice in question.choices:
            sequences.append(list(tokenizer(f"{question.prompt} {choice}")["input_ids"]))
            spans.append((start, len(choice.encode())))
    scores = np.zeros(len(sequences))
    for batch in make_batches(sequences, TOKENS_PER_BATCH):
        ids = batch.ids.to(model.device)
        logits = model(input_ids=ids).logits
        for row, (index, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            first, size = spans[index]
            likelihood = torch.log_softmax(logits[row, first - 1 : length - 1].float(), -1)
            scores[index] = float(likelihood.gather(1, ids[row, first:length, None]).sum()) / max(1, size)
        if progress is not None:
            progress()
    right, offset = np.zeros(len(questions)), 0
    for number, question in enumerate(questions):
        choices = scores[offset : offset + len(question.choices)]
        right[number] = float(int(choices.argmax()) == question.answer)
        offset += len(question.choices)
    return right


def paired_answers(questions: Sequence[Question], base: Floats, expert: Floats) -> Paired:
    """Right answers of both, `[questions]` each; chance is the mean of 1 / number of choices."""
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return Paired(base, expert, np.ones(len(questions)), chance)
