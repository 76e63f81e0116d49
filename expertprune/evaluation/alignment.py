"""How alike the hidden states of base and expert are, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from expertprune.artifacts.evaluation import Alignment
from expertprune.corpora.batches import Batch
from expertprune.evaluation.reading import Read
from expertprune.models.layers import head_only
from expertprune.models.passes import Step


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


class Aligning:
    """Compares base and expert while they read in step (see `reading.read_together`).

    Args:
        corpora: of each batch, the corpus of its documents, or `None` to leave it out. The batches
            of a corpus must follow each other, so that the sums of one corpus are held at a time.
    """

    def __init__(self, corpora: Sequence[str | None]) -> None:
        self._corpora = corpora
        self._values: dict[str, list[float]] = defaultdict(list)
        self._tokens: dict[str, int] = {}
        self._open: tuple[int, str, LinearCKA] | None = None

    def watch(self, index: int, base: Step, expert: Step) -> None:
        """One batch behind layer `index` of both models."""
        corpus = self._corpora[base.number]
        if corpus is None:
            return
        if self._open is None or self._open[:2] != (index, corpus):
            self._close()
            self._open = (index, corpus, LinearCKA())
        self._open[2].add(_inner(base.batch, base.after), _inner(expert.batch, expert.after))

    def _close(self) -> None:
        if self._open is not None:
            _, corpus, cka = self._open
            self._values[corpus].append(cka.value())
            self._tokens[corpus] = cka.tokens
            self._open = None

    @torch.no_grad()
    def results(self, base: Read, expert: Read) -> dict[str, Alignment]:
        """By dimension and value (`"language en"`), when both models are behind their last layer."""
        self._close()
        cosines: dict[str, float] = dict.fromkeys(self._values, 0.0)
        documents: dict[str, int] = dict.fromkeys(self._values, 0)
        for number, (batch, corpus) in enumerate(zip(base.stream.batches, self._corpora, strict=True)):
            if corpus is not None:
                x, y = (_final(each, batch, number) for each in (base, expert))
                cosines[corpus] += float(torch.cosine_similarity(x, y, dim=1).sum())
                documents[corpus] += len(batch.documents)
        return {
            corpus.replace("/", " ", 1): Alignment(
                layers=values,
                cosine=cosines[corpus] / self._tokens[corpus],
                documents=documents[corpus],
                tokens=self._tokens[corpus],
            )
            for corpus, values in self._values.items()
        }


def _final(read: Read, batch: Batch, number: int) -> Tensor:
    """The states that the output head reads, `[tokens, hidden]`."""
    hidden, model = read.stream.hidden[number], read.model
    with head_only(model.model, model.family, hidden):
        states = model.model.get_decoder()(input_ids=batch.ids.to(hidden.device), use_cache=False).last_hidden_state
    return _inner(batch, states).double()
