"""How many bits base and expert need for held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expertprune.artifacts.evaluation import DocumentBits
from expertprune.corpora.batches import Tokens, encode, rendered
from expertprune.corpora.chat import Rendered
from expertprune.corpora.documents import Corpus, Document
from expertprune.errors import SpecError
from expertprune.evaluation.arrays import Floats
from expertprune.evaluation.reading import Compared, Reading, bits, read
from expertprune.models.passes import TextRun
from expertprune.spec.schema import Evaluate


def texts_of(documents: Sequence[Document], tokenizer: Any, end: int | None = None) -> list[Rendered]:
    """The text of each document: of a conversation, as the base's chat template renders it.

    Args:
        end: cut each where the tokenizer has so many tokens, for another to read.

    Raises:
        SpecError: the chat template cannot render a conversation.
    """
    texts = [rendered(document, tokenizer) for document in documents]
    return texts if end is None else [text.cut(_end(text, tokenizer, end)) for text in texts]


def tokens_of(
    texts: Sequence[Rendered],
    tokenizer: Any,
    settings: Evaluate,
    other_tokens: bool,
    what: str = "of its evaluation documents: raise evaluate.max_tokens",
) -> list[Tokens]:
    """The tokens that an evaluation reads of each text.

    Args:
        other_tokens: whether experts have tokenizers of their own. The texts are then cut already (see `end_of`).
        what: the documents and their key, for the error.

    Raises:
        SpecError: they are conversations, and all are cut off before their first answer.
    """
    tokens = encode(texts, tokenizer, None if other_tokens else settings.max_tokens)
    if any(each.answers for each in tokens) and not any(each.predicted for each in tokens):
        raise SpecError(f"no answer begins within the first {settings.max_tokens} tokens {what}")
    return tokens


def check_documents(corpus: Corpus, tokens: Sequence[Tokens], asks: bool) -> None:
    """Check that a corpus' evaluation documents measure something.

    Args:
        asks: whether its questions are asked.

    Raises:
        SpecError: there is no token to predict, and no question is asked.
    """
    if tokens and not any(each.predicted for each in tokens) and not (corpus.questions and asks):
        raise SpecError("every evaluation document is shorter than two tokens; give it longer ones")


def end_of(settings: Evaluate, other_tokens: bool) -> int | None:
    """Where texts are cut: where experts have other tokens, base and expert read what the base's tokens are cut to."""
    return settings.max_tokens if other_tokens else None


def document_rows(documents: Sequence[Document], reading: Reading, found: Compared) -> list[DocumentBits]:
    """What both models need for each document, where they have the same tokens."""
    return _rows(documents, reading, found.base, reading, found.expert, found)


def document_rows_apart(
    documents: Sequence[Document], base: Reading, base_bits: Floats, expert: Reading, expert_bits: Floats
) -> list[DocumentBits]:
    """The same where base and expert read other tokens; predictions over different rows have no KL."""
    return _rows(documents, base, base_bits, expert, expert_bits, None)


def _rows(
    documents: Sequence[Document],
    base: Reading,
    base_bits: Floats,
    expert: Reading,
    expert_bits: Floats,
    found: Compared | None,
) -> list[DocumentBits]:
    return [
        DocumentBits(
            digest=document.digest,
            tokens=mine.predicted,
            bytes=mine.size,
            base_bits=float(base_bits[i]),
            expert_bits=float(expert_bits[i]),
            kl_bits=float(found.kl[i]) if found is not None else math.nan,
            agreed=int(found.agreed[i]) if found is not None else None,
            expert_tokens=theirs.predicted,
            expert_bytes=theirs.size,
        )
        for i, (document, mine, theirs) in enumerate(zip(documents, base.sequences, expert.sequences, strict=True))
    ]


def score_alone(model: TextRun, tokenizer: Any, documents: Sequence[Document]) -> tuple[Floats, Floats, Floats]:
    """One model on whole documents: bits, number and bytes of the predicted tokens of each."""
    reading = Reading.of(encode(texts_of(documents, tokenizer), tokenizer))
    return bits(reading, read(reading, model)), reading.tokens, reading.sizes


def _end(text: Rendered, tokenizer: Any, max_tokens: int) -> int:
    """Characters of a text up to where it is cut."""
    plain = text.answers is None
    offsets = tokenizer(text.text, add_special_tokens=plain, return_offsets_mapping=True)["offset_mapping"]
    return len(text.text) if len(offsets) <= max_tokens else max(end for _, end in offsets[:max_tokens])
