"""Multiple-choice questions: answers and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from expertprune.corpora.batches import make_batches
from expertprune.corpora.documents import Question
from expertprune.evaluation.documents import TOKENS_PER_BATCH
from expertprune.evaluation.retention import Floats, bootstrap
from expertprune.progress import Progress


@torch.inference_mode()
def answer_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Floats:
    """1 where the model prefers the right choice, 0 elsewhere, `[questions]`.

    A choice's score is the log-likelihood of `" choice"` after `"Question: ...\\nAnswer:"`, divided by its bytes: what
    lm-evaluation-harness reports as `acc_norm` up to its counting characters.
    """
    sequences, spans = [], []
    for question in questions:
        prompt = f"Question: {question.question}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        for choice in question.choices:
            sequences.append(list(tokenizer(f"{prompt} {choice}")["input_ids"]))
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


def question_metrics(base: Floats, expert: Floats) -> dict[str, float]:
    """Accuracy of both, retention (expert over base) with its interval, and how many answers flipped each way."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = bootstrap(lambda i: expert[i].sum(1) / base[i].sum(1), len(base))
    return {
        "base": float(base.mean()),
        "expert": float(expert.mean()),
        "retention": float(expert.sum() / base.sum()) if base.sum() else math.nan,
        "low": low,
        "high": high,
        "lost": float(((base == 1) & (expert == 0)).sum()),
        "gained": float(((base == 0) & (expert == 1)).sum()),
    }
