"""Turn documents into batches of token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertprune.corpora.chat import Rendered, render
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.templates import Span
from expertprune.errors import CheckpointError, SpecError
from expertprune.files import digest_of
from expertprune.spec.schema import Spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Token ids of a document, or of a window of it.

    Attributes:
        ids: `[tokens]`.
        answers: `[tokens]`, whether the loss counts on each; `None`: on all of them.
        size: UTF-8 bytes of the text that the predicted tokens stand for, where it is known. Special
            tokens have no text.
    """

    ids: tuple[int, ...]
    answers: tuple[bool, ...] | None = None
    size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> int:
        """How many tokens the loss counts on. Nothing predicts the first one."""
        return max(0, len(self.ids) - 1) if self.answers is None else sum(self.answers[1:])


@dataclass(frozen=True)
class Placed:
    """What a pass needs of a batch beside its ids, on one device.

    Attributes:
        documents: `[rows]`, int64.
        real: `[real tokens]`, int64: where they are in the batch, row after row.
        weights: `[rows, tokens]`, float32 (see `Batch.weights`).
        asked: `[rows, tokens]`, float32: 1 where `Batch.asked` holds, 0 elsewhere.
        totals: `[rows]`, the sums of the weights.
        predicted: `[rows]`, float64: how many tokens the loss counts on.
        whole: whether nothing is padding.
    """

    documents: Tensor
    real: Tensor
    weights: Tensor
    asked: Tensor
    totals: Tensor
    predicted: Tensor
    whole: bool


@dataclass(frozen=True)
class Batch:
    """Token ids of several documents, padded on the right.

    `documents` are positions in the corpus, `[rows]`; `ids` is `[rows, tokens]`; `lengths`,
    `[rows]`, counts the real tokens. Padding follows the text, so under causal attention no real
    token ever sees it and no mask is needed.

    `answers` `[rows, tokens]` says on which tokens the loss counts; `None`: on all real ones. In
    statistics, the other tokens of a conversation weigh `prompt_weight`, and all tokens of a row
    weigh its `scales`, `[rows]`, at least 0; `None`: 1.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]
    answers: Tensor | None = None
    prompt_weight: float = 1.0
    scales: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def of_rows(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, no wider than the longest of them."""
        rows = list(rows)
        lengths, documents = (tuple(each[row] for row in rows) for each in (self.lengths, self.documents))
        width = max(lengths)
        answers = None if self.answers is None else self.answers[rows, :width]
        scales = None if self.scales is None else tuple(self.scales[row] for row in rows)
        ids = self.ids[rows, :width]
        return replace(self, ids=ids, lengths=lengths, documents=documents, answers=answers, scales=scales)

    @property
    def real(self) -> Tensor:
        """`[rows, tokens]`, false on padding."""
        return torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]

    @property
    def counted(self) -> Tensor:
        """`[rows, tokens]`: whether the loss counts on each token; the first one has none before it."""
        return self.real if self.answers is None else self.real & self.answers

    @property
    def targets(self) -> Tensor:
        """`[rows, tokens - 1]`: whether the loss counts on the token behind each position."""
        return self.counted[:, 1:]

    @property
    def predicted(self) -> tuple[int, ...]:
        """How many tokens of each row the loss counts on."""
        return tuple(self.targets.sum(1).tolist())

    @property
    def weights(self) -> Tensor:
        """`[rows, tokens]`, float32: how much each token counts in statistics; padding counts 0."""
        real = self.real.float()
        if self.scales is not None:
            real = real * torch.tensor(self.scales)[:, None]
        return real if self.answers is None else torch.where(self.answers, real, self.prompt_weight * real)

    @property
    def asked(self) -> Tensor:
        """`[rows, tokens]`: whether the prediction behind each token counts.

        It does where the loss counts on the token that it predicts. Behind the last token, it does
        where the loss counts on that one.
        """
        counted, last = self.counted, torch.tensor(self.lengths)[:, None] - 1
        following = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
        return following.scatter(1, last, counted.gather(1, last))

    def on(self, device: torch.device) -> Placed:
        """What a pass needs on a device. It is copied there once, so layers do not wait for it."""
        placed: dict[torch.device, Placed] = vars(self).setdefault("_placed", {})
        if device not in placed:
            weights, real = self.weights, self.real.flatten().nonzero()[:, 0]
            placed[device] = Placed(
                documents=torch.tensor(self.documents).to(device),
                real=real.to(device),
                weights=weights.to(device),
                asked=self.asked.float().to(device),
                totals=weights.sum(1).to(device),
                predicted=torch.tensor(self.predicted, dtype=torch.float64).to(device),
                whole=len(real) == self.ids.numel(),
            )
        return placed[device]


def rendered(document: Document, tokenizer: Any) -> Rendered:
    """`render`, with errors that quote the document."""
    try:
        return render(document, tokenizer)
    except SpecError as error:
        beginning = " ".join(document.text.split())[:40]
        raise SpecError([f"conversation {beginning!r}: {problem}" for problem in error.problems]) from None


def open_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that goes on: without the end that some tokenizers put behind every text."""
    ids, plain = (list(tokenizer(text, add_special_tokens=each)["input_ids"]) for each in (True, False))
    ended = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != plain
    return ids[:-1] if ended else ids


def encode(texts: Sequence[Rendered], tokenizer: Any, max_tokens: int | None = None) -> list[Tokens]:
    """Token ids of rendered texts, cut at `max_tokens`.

    Raises:
        SpecError: a conversation and a tokenizer that does not say where its tokens stand.
    """
    found: dict[int, Tokens] = {}
    for chat in (False, True):
        mine = [i for i, text in enumerate(texts) if (text.answers is not None) == chat]
        if not mine:
            continue
        if chat and not tokenizer.is_fast:
            raise SpecError("the base's tokenizer is a slow one, which does not tell answers apart: 'documents: raw'")
        limit = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
        tokenizer.truncation_side = "right"  # a document is read from its beginning, whatever the tokenizer's habit
        encoded = tokenizer(
            [texts[i].text for i in mine],
            add_special_tokens=not chat,  # a chat template writes them itself
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            **limit,
        )
        offsets = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(mine)
        for i, ids, places in zip(mine, encoded["input_ids"], offsets, strict=True):
            found[i] = _tokens(texts[i], list(ids), places, tokenizer)
    return [found[i] for i in range(len(texts))]


def _tokens(text: Rendered, ids: list[int], places: list[Span] | None, tokenizer: Any) -> Tokens:
    if places is None:
        said = tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Tokens(tuple(ids), None, len(said.encode()))
    if text.answers is None:
        first = places[0][1] if places else 0
        return Tokens(tuple(ids), None, len(text.text[first : max((end for _, end in places), default=0)].encode()))
    special, answers, ends = set(tokenizer.all_special_ids), [], dict[Span, int]()
    for number, (index, (start, end)) in enumerate(zip(ids, places, strict=True)):
        span = next((span for span in text.answers if start < span[1] and end > span[0]), None)
        answers.append(span is not None)
        if span is not None and number and index not in special:
            ends[span] = max(ends.get(span, 0), min(end, span[1]))
    said = sum(len(text.text[span[0] : end].encode()) for span, end in ends.items())  # offsets may leave spaces out
    return Tokens(tuple(ids), tuple(answers), said)


def make_batches(
    documents: Sequence[Tokens | Sequence[int]], tokens_per_batch: int, pad: int = 0, prompt_weight: float = 1.0
) -> list[Batch]:
    """Batches of documents of similar length.

    A batch has at most `tokens_per_batch` tokens, padding included, or one longer document.
    Documents in which the loss counts on no token are left out.

    Args:
        documents: bare ids count whole.
        prompt_weight: see `Batch`.
    """
    tokens = [each if isinstance(each, Tokens) else Tokens(tuple(each)) for each in documents]
    order = sorted((i for i in range(len(tokens)) if tokens[i].predicted), key=lambda i: (len(tokens[i]), i))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(tokens[index]) * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(index)
        else:
            groups.append([index])
    batches = []
    for group in groups:
        width = len(tokens[group[-1]])
        ids = torch.full((len(group), width), pad, dtype=torch.int64)
        answers = torch.ones(len(group), width, dtype=torch.bool)
        for row, index in enumerate(group):
            ids[row, : len(tokens[index])] = torch.tensor(tokens[index].ids)
            if (own := tokens[index].answers) is not None:
                answers[row, : len(own)] = torch.tensor(own)
        whole = all(tokens[index].answers is None for index in group)
        lengths = tuple(len(tokens[index]) for index in group)
        batches.append(Batch(ids, lengths, tuple(group), None if whole else answers, prompt_weight))
    return batches


def check_ids(batches: Sequence[Batch], rows: int) -> None:
    """Raises `CheckpointError` for a token id that has no row in the model's vocabulary."""
    largest = max((int(batch.ids.max()) for batch in batches), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer gives the token id {largest}, and the model's vocabulary has {rows} rows: this tokenizer is "
            "of another model"
        )


def warn_of_length(name: CorpusName, sequences: Sequence[Tokens], positions: int | None, key: str) -> None:
    """Say how many sequences of a corpus are longer than the base was made for.

    Args:
        positions: the base's `max_position_embeddings`, if it says so.
        key: of the spec, that cuts them.
    """
    if positions is not None and (longer := sum(len(each) > positions for each in sequences)):
        log.warning(
            "corpus %s: %d of %d texts have more tokens than the base was made for (max_position_embeddings: %d): lower %s",
            name, longer, len(sequences), positions, key,
        )  # fmt: skip


@dataclass(frozen=True)
class CalibrationText:
    """What of a corpus is profiled: windows of its documents.

    Attributes:
        documents: `[windows]`, the document of each.
        tokens: `[windows]`.
        batches: their rows are positions in both.
    """

    documents: list[Document]
    tokens: list[Tokens]
    batches: list[Batch]

    @property
    def digest(self) -> str:
        """Digest of what a pass reads: ids, answers and their weights; not how batches are cut."""
        weights = {batch.prompt_weight for batch in self.batches if batch.answers is not None}
        return digest_of([[[each.ids, each.answers] for each in self.tokens], sorted(weights)])


def each_once(
    texts: Sequence[CalibrationText], share: Callable[[Sequence[Batch]], Sequence[Batch]] = list
) -> list[list[Batch | None]]:
    """The batches of several texts, without windows that an earlier batch has; `None` where nothing is left.

    They are the batches that are profiled, so a later pass can use what a profile has computed.

    Args:
        share: gives those of a text's batches that run here, perhaps cut between their rows.
    """
    seen: set[Tokens] = set()
    found = []
    for text in texts:
        first: set[int] = set()  # documents whose window no earlier batch has
        for document in (document for batch in text.batches for document in batch.documents):
            if text.tokens[document] not in seen:
                seen.add(text.tokens[document])
                first.add(document)
        own: list[Batch | None] = []
        for batch in share(text.batches):
            rows = [row for row, document in enumerate(batch.documents) if document in first]
            own.append(batch if len(rows) == len(batch.documents) else batch.of_rows(rows) if rows else None)
        found.append(own)
    return found


def calibration_text(documents: Sequence[Document], tokenizer: Any, spec: Spec) -> CalibrationText:
    """The windows of documents that calibration reads, as many of each as `calibration.windows`.

    Windows in which the loss counts on no token are left out.
    """
    settings = spec.calibration
    texts = [rendered(document, tokenizer) for document in documents]
    if settings.windows == 1:
        every = [[each] for each in encode(texts, tokenizer, settings.max_tokens)]
    else:
        whole = encode(texts, tokenizer)
        every = [windows(each, settings.max_tokens, settings.windows, tokenizer.bos_token_id) for each in whole]
    pairs = [(document, each) for document, own in zip(documents, every, strict=True) for each in own if each.predicted]
    tokens = [each for _, each in pairs]
    batches = make_batches(tokens, settings.tokens_per_batch, prompt_weight=settings.prompt_weight)
    return CalibrationText([document for document, _ in pairs], tokens, batches)


def windows(tokens: Tokens, max_tokens: int, count: int, bos: int | None = None) -> list[Tokens]:
    """At most `count` windows of at most `max_tokens`, spread evenly over a document.

    The first begins with the document, the last ends with it, unless there is only one.

    Args:
        bos: the token that begins every text; if it begins this one, it begins each window.
    """
    number = min(count, -(-len(tokens) // max_tokens))
    if number <= 1:
        return [_window(tokens, 0, max_tokens, None)]
    last = len(tokens) - max_tokens
    head = bos if bos is not None and tokens.ids[0] == bos else None
    return [_window(tokens, round(last * i / (number - 1)), max_tokens, head if i else None) for i in range(number)]


def _window(tokens: Tokens, start: int, length: int, head: int | None) -> Tokens:
    here = slice(start, start + length)
    ids, answers = tokens.ids[here], None if tokens.answers is None else tokens.answers[here]
    if head is None:
        return Tokens(ids, answers)
    return Tokens((head, *ids[1:]), None if answers is None else (False, *answers[1:]))


def corpus_text(corpus: Corpus, tokenizer: Any, spec: Spec) -> CalibrationText:
    """`calibration_text` of a corpus.

    Raises:
        SpecError: a conversation cannot be rendered, or no token is left for the loss to count on.
    """
    text = calibration_text(corpus.calibration, tokenizer, spec)
    if not text.batches:
        chat = any(document.conversation is not None for document in corpus.calibration)
        longer = f"no answer begins within the first {spec.calibration.max_tokens} tokens: raise calibration.max_tokens"
        raise SpecError(longer if chat else "every document is shorter than two tokens")
    unread = len(corpus.calibration) - len(set(map(id, text.documents)))
    if unread and all(document.conversation is not None for document in corpus.calibration):
        log.warning(
            "corpus %s: %d of %d conversations calibrate nothing, as no answer begins in the tokens that are read: raise "
            "calibration.max_tokens (%d)",
            corpus.name, unread, len(corpus.calibration), spec.calibration.max_tokens,
        )  # fmt: skip
    return text
