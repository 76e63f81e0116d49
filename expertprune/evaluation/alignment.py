"""How alike the hidden states of base and expert are, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.artifacts.evaluation import Alignment
from expertprune.corpora.batches import Batch, make_batches, tokenize
from expertprune.corpora.documents import Corpus, Document
from expertprune.models.layers import head_only
from expertprune.models.passes import TextRun

_TOKENS_PER_BATCH = 1024


class LinearCKA:
    """Linear centred kernel alignment (CKA) of two representations of the same tokens.

    `‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)` in Frobenius norms, with the columns of `X` and `Y`, `[tokens,
    hidden]`, centred: 1 where one is a rotation and scaling of the other (Kornblith et al. 2019,
    https://arxiv.org/abs/1905.00414, equation 5, in feature space). It holds sums of `[hidden,
    hidden]` in float64, whatever the number of tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._width = 0
        self._shift = self._sums = self._products = torch.empty(0)

    def add(self, base: Tensor, expert: Tensor) -> None:
        """Further tokens: `[tokens, hidden]` of both models."""
        both = torch.cat([base, expert], dim=1).double()
        if not self.tokens:  # any shift gives the same result; one near the mean keeps the digits
            self._shift = both.mean(0)
            self._sums = torch.zeros_like(self._shift)
            self._products = both.new_zeros(both.shape[1], both.shape[1])
            self._width = base.shape[1]
        both = both - self._shift
        self.tokens += both.shape[0]
        self._sums += both.sum(0)
        self._products += both.T @ both

    def value(self) -> float:
        """Between 0 and 1; not a number where one of the two does not vary."""
        if not self.tokens:
            return float("nan")
        centred = self._products - torch.outer(self._sums, self._sums) / self.tokens
        x, y = slice(None, self._width), slice(self._width, None)
        own = centred[x, x].norm() * centred[y, y].norm()
        return float(centred[y, x].square().sum() / own)


def _inner(batch: Batch, states: Tensor) -> Tensor:
    """The states of real tokens without each document's first one, `[tokens, hidden]`.

    At the first position many models keep activations hundreds of times larger than all others,
    whatever the text (https://arxiv.org/abs/2402.17762). They would drown every other state in a
    product of states.
    """
    return torch.cat([states[row, 1:length] for row, length in enumerate(batch.lengths)])


@torch.no_grad()
def align(
    base: Any, expert: Any, family: Family, tokenizer: Any, documents: Sequence[Document], max_tokens: int
) -> Alignment:
    """Compare hidden states of two running models on documents, without the first token of each."""
    batches = make_batches(tokenize(documents, tokenizer, max_tokens), _TOKENS_PER_BATCH)
    runs = [TextRun(model, family, (), batches) for model in (base, expert)]
    mine, theirs = (run.start() for run in runs)
    values, tokens = [], 0
    for (index, layer), (_, other) in zip(*(run.layers() for run in runs), strict=True):
        cka = LinearCKA()
        for ours, others in zip(mine.advance(layer, index), theirs.advance(other, index), strict=True):
            cka.add(_inner(ours.batch, ours.after), _inner(others.batch, others.after))
        values.append(cka.value())
        tokens = cka.tokens
    cosine = 0.0
    for number, batch in enumerate(batches):
        x = _final(base, family, batch, mine.hidden[number])
        y = _final(expert, family, batch, theirs.hidden[number])
        cosine += float(torch.cosine_similarity(x, y, dim=1).sum())
    return Alignment(layers=values, cosine=cosine / tokens, documents=len(documents), tokens=tokens)


def _final(model: Any, family: Family, batch: Batch, hidden: Tensor) -> Tensor:
    """The states that the output head reads, `[tokens, hidden]`."""
    with head_only(model, family, hidden):
        states = model.get_decoder()(input_ids=batch.ids.to(hidden.device), use_cache=False).last_hidden_state
    return _inner(batch, states).double()


def align_corpora(
    base: Any, expert: Any, family: Family, tokenizer: Any, corpora: Sequence[Corpus], max_tokens: int
) -> dict[str, Alignment]:
    """`align` on the evaluation documents of each corpus, by dimension and value: `"language en"`."""
    return {
        corpus.name.replace("/", " ", 1): align(base, expert, family, tokenizer, corpus.evaluation, max_tokens)
        for corpus in corpora
        if any(len(ids) >= 2 for ids in tokenize(corpus.evaluation, tokenizer, max_tokens))
    }
