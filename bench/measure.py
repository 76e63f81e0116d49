"""What a quality table measures: perplexity by document, with bootstrap intervals, and PIQA.

Report files choose nothing: no method, no constant, no seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertprune.arch import family_of
from expertprune.corpora.documents import Question
from expertprune.evaluation.questions import answer_questions
from expertprune.evaluation.retention import bootstrap
from expertprune.models.passes import TextRun

BLOCK = 512
_ROWS = 2  # blocks in one pass
_CHUNK = 256  # positions whose logits are held at a time
_IN_A_PASS = 1024  # tokens of prompts
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Blocks:
    """Text cut into blocks of equal length.

    `ids` and `documents` are `[blocks, tokens]`: token ids, and the document of each token (−1 for
    a BOS put first).
    """

    ids: Tensor
    documents: Tensor


@dataclass(frozen=True)
class Sums:
    """Negative log-likelihood in nats and predicted tokens, both `[documents]`.

    Documents without a measured token are left out.
    """

    nats: Floats
    tokens: Floats

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Excess:
    """Excess log-perplexity, `ln(expert / base)`, with its 95% interval over documents."""

    value: float
    low: float
    high: float


def text_of(row: dict[str, Any]) -> str:
    """The text of a row: its text, its question and answer, or both."""
    if "long_answer" in row:
        return f"{row['text']}\nQuestion: {row['question']}\nAnswer: {row['long_answer']}"
    return row["text"] if "text" in row else f"Question: {row['question']}\nAnswer: {row['answer']}"


def blocks(path: Path, tokenizer: Any, count: int, length: int = BLOCK) -> Blocks:
    """At most `count` blocks of `length` tokens, spread evenly over a file's text.

    The documents stand one after the other in the file's order, an empty line between them; the
    last, shorter block is left out. Where the tokenizer puts a BOS before text, each block begins
    with one, which counts in its length.
    """
    ids: list[int] = []
    documents: list[int] = []
    with jsonlines.open(path) as rows:
        for number, row in enumerate(rows):
            found = tokenizer(text_of(row) + "\n\n", add_special_tokens=False)["input_ids"]
            ids += found
            documents += [number] * len(found)
    first = tokenizer("a")["input_ids"][0]
    head = [first] if first == tokenizer.bos_token_id else []
    room = length - len(head)
    total = len(ids) // room
    if total == 0:
        raise ValueError(f"{path}: {len(ids)} tokens, not one block of {room}")
    chosen = torch.linspace(0, total - 1, min(count, total)).long()

    def cut(values: list[int], before: list[int]) -> Tensor:
        every = torch.tensor(values[: total * room]).view(total, room)[chosen]
        return torch.cat([torch.tensor(before, dtype=torch.int64).expand(len(chosen), len(before)), every], 1)

    return Blocks(cut(ids, head), cut(documents, [-1] * len(head)))


@torch.inference_mode()
def losses(model: Any, data: Blocks) -> Sums:
    """Losses of every token behind a block's first, summed by the predicted token's document."""
    size = int(data.documents.max()) + 1
    nats, tokens = np.zeros(size), np.zeros(size)
    for first in range(0, len(data.ids), _ROWS):
        ids = data.ids[first : first + _ROWS].to(model.device)
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        found = torch.cat(list(token_losses(model, states, ids[:, 1:].flatten()))).double().cpu().numpy()
        owner = data.documents[first : first + _ROWS, 1:].flatten().numpy()
        nats += np.bincount(owner, found, size)
        tokens += np.bincount(owner, minlength=size)
    seen = tokens > 0
    return Sums(nats[seen], tokens[seen])


def token_losses(model: Any, states: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Losses in nats of `targets` `[tokens]` after the decoder's last states `[tokens, hidden]`.

    Yields:
        The losses of a few tokens at a time, in their order, `[some tokens]`: float32 logits of a
        large vocabulary for all of them would take more memory than the model.
    """
    cap = getattr(model.config, "final_logit_softcapping", None)
    for first in range(0, len(states), _CHUNK):
        logits = model.get_output_embeddings()(states[first : first + _CHUNK]).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        yield torch.nn.functional.cross_entropy(logits, targets[first : first + _CHUNK], reduction="none")


def excess(base: Sums, expert: Sums, seed: int = 0) -> Excess:
    """`ln(expert / base)` of two perplexities on the same blocks.

    The interval resamples documents 2,000 times.
    """
    if not np.array_equal(base.tokens, expert.tokens):
        raise ValueError("base and expert were measured on different tokens")
    more = expert.nats - base.nats
    low, high = bootstrap(lambda i: more[i].sum(1) / base.tokens[i].sum(1), len(more), seed)
    return Excess(float(more.sum() / base.tokens.sum()), low, high)


def piqa_answers(model: Any, tokenizer: Any, path: Path, count: int) -> Floats:
    """1 where the model prefers the right solution, `[questions]`: the first `count` of a file.

    A row has `goal`, `choices` and `label`. The model's answer is the solution of the higher
    log-likelihood per byte after `"Question: {goal}\\nAnswer:"`. PIQA:
    https://arxiv.org/abs/1911.11641
    """
    with jsonlines.open(path) as rows:
        every = [Question(row["goal"], tuple(row["choices"]), row["label"]) for row in rows]
    run = TextRun(model, family_of(model.config.model_type), (), ())
    return answer_questions(run, tokenizer, every[:count])


@torch.inference_mode()
def likeliest(model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """The number of the likeliest of `tokens` after each prompt, which is given in token ids."""
    picks = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    while order:
        longest = len(prompts[order[0]])
        size = max(1, _IN_A_PASS // longest)
        batch, order = order[:size], order[size:]
        ids = torch.tensor([[*prompts[number], *[0] * (longest - len(prompts[number]))] for number in batch])
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        last = states[range(len(batch)), [len(prompts[number]) - 1 for number in batch]]
        found = model.get_output_embeddings()(last)[:, list(tokens)].argmax(-1).tolist()
        for number, pick in zip(batch, found, strict=True):
            picks[number] = pick
    return picks
