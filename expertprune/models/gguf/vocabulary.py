"""A folder's tokenizer in the terms of GGUF: tokens with types and scores, merges, and the pre-tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertprune.arch import PreTokenizer, gguf_names
from expertprune.errors import CheckpointError
from expertprune.tokenizing.vocabulary import BYTES, SPACE, TokenizerKind, Vocabulary, nested, pair_of, steps

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the format's types of tokens


_LAST = -1e4  # the score of a token that no merge makes, below every rank


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer in the terms of the format.

    `tokens`, `types` and `scores` have one entry for each row of the embedding. `pre` names the pre-tokenizer.
    `special` holds ids by the format's names (`bos`, `eos`, `unknown`, `padding`). `begins` and `ends` say whether
    texts begin with BOS and end with EOS.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str]
    special: dict[str, int] = field(default_factory=dict)
    begins: bool = False
    ends: bool = False
    space_before: bool | None = None
    template: str | list[dict[str, str]] | None = None


def gguf_vocabulary(folder: Path, vocabulary: Vocabulary, tokenizer: Any, rows: int) -> GgufVocabulary:
    """Express a tokenizer in the terms of the format.

    Args:
        folder: named in errors.
        vocabulary: what its `tokenizer.json` says.
        tokenizer: the same, running.
        rows: of the embedding; rows without a token get a name that no text is tokenized to.

    Raises:
        CheckpointError: the format cannot express the tokenizer.
    """
    where = folder / "tokenizer.json"
    if vocabulary.size > rows:
        raise CheckpointError(f"{where}: has {vocabulary.size} tokens, the embedding {rows} rows")
    tokens, types = _tokens(vocabulary, tokenizer, rows)
    names = gguf_names()
    if vocabulary.kind is TokenizerKind.BYTE_LEVEL:
        kind, pre, scores, space = names.byte_level, _parting(where, vocabulary), None, None
    elif vocabulary.kind is TokenizerKind.SENTENCEPIECE:
        kind, pre, space = names.sentencepiece, "default", _space_before(where, vocabulary)
        scores = _scores(vocabulary, rows)
    else:
        raise CheckpointError(f"{where}: a {vocabulary.kind.value} tokenizer cannot be written as GGUF; BPE can")
    begins, ends = _around(tokenizer)
    merges = [" ".join(pair_of(merge)) for merge in vocabulary.model.get("merges") or []]
    if any(merge.count(" ") != 1 for merge in merges):
        raise CheckpointError(f"{where}: merges of tokens with spaces in them cannot be written as GGUF")
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {name: getattr(tokenizer, f"{short}_token_id") for short, name in ids.items()}
    return GgufVocabulary(
        kind, pre, tokens, types, scores, merges,
        {name: index for name, index in special.items() if index is not None},
        begins, ends, space, _template(folder, tokenizer),
    )  # fmt: skip


def _tokens(vocabulary: Vocabulary, tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """The token of each row, and its type."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens, types = [], []
    for index in range(rows):
        token = vocabulary.by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if vocabulary.kind is TokenizerKind.SENTENCEPIECE and token == vocabulary.model.get("unk_token"):
            types.append(UNKNOWN)
        elif token in vocabulary.added:
            types.append(CONTROL if token in special else USER_DEFINED)
        elif vocabulary.kind is TokenizerKind.SENTENCEPIECE and token in BYTES:
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return tokens, types


def _scores(vocabulary: Vocabulary, rows: int) -> list[float]:
    """Minus the rank of the first merge that makes a token: readers merge the pair whose token scores highest."""
    scores = [_LAST - index for index in range(rows)]
    for rank, (first, second) in reversed(list(enumerate(vocabulary.merges))):
        if (index := vocabulary.tokens.get(first + second)) is not None:
            scores[index] = -float(rank)
    return scores


def _parting(where: Path, vocabulary: Vocabulary) -> str:
    """The format's name for the pre-tokenizer of a byte-level tokenizer."""
    data, known = vocabulary.data, gguf_names().pre_tokenizers
    parts = [part for part in nested(data.get("pre_tokenizer")) if part["type"] != "Sequence"]
    found = [_described(parts, bool(vocabulary.model.get("ignore_merges")), entry) for entry in known]
    if any(found) and steps(data.get("normalizer")) <= {"NFC", "Sequence"}:
        return known[found.index(True)].name
    raise CheckpointError(
        f"{where}: GGUF has no name for this pre-tokenizer ({', '.join(part['type'] for part in parts) or 'none'}"
        f"{', ignore_merges' if vocabulary.model.get('ignore_merges') else ''}); known are "
        f"{', '.join(entry.name for entry in known)}"
    )


def _described(parts: list[dict[str, Any]], ignores_merges: bool, entry: PreTokenizer) -> bool:
    """Whether these steps of a pre-tokenizer are those of an entry."""
    if ignores_merges != entry.whole_words:
        return False
    expected = (["Digits"] if entry.digits else []) + (["Split"] if entry.split else []) + ["ByteLevel"]
    if [part["type"] for part in parts] != expected or parts[-1].get("add_prefix_space"):
        return False
    if entry.digits and not parts[0].get("individual_digits"):
        return False
    if entry.split is None:
        return bool(parts[-1].get("use_regex", True))
    return (
        parts[-2]["pattern"] == {"Regex": entry.split}
        and parts[-2]["behavior"] == "Isolated"
        and not parts[-2].get("invert")
        and not parts[-1].get("use_regex", True)
    )


def _space_before(where: Path, vocabulary: Vocabulary) -> bool:
    """Whether a space is put before each text.

    Raises:
        CheckpointError: text is changed in other ways than by marking its spaces.
    """
    data, model = vocabulary.data, vocabulary.model
    if not (model.get("byte_fallback") and all(byte in vocabulary.tokens for byte in BYTES)):
        raise CheckpointError(f"{where}: a SentencePiece tokenizer without byte fallback cannot be written as GGUF")
    before, prepends = [], False
    for part in (*nested(data.get("normalizer")), *nested(data.get("pre_tokenizer"))):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            prepends = True
        elif part["type"] == "Metaspace" and part["replacement"] == SPACE:
            prepends = part.get("prepend_scheme", "always") != "never"
        elif part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, SPACE):
            continue
        elif part["type"] == "Split" and part["pattern"] == {"String": " "}:
            continue  # spaces are marks already
        elif part["type"] != "Sequence":
            before.append(part["type"])
    if before:
        raise CheckpointError(f"{where}: {', '.join(before)} before merging cannot be written as GGUF")
    return prepends


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether texts begin with BOS, and whether they end with EOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins = len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id
    return begins, len(whole) > len(plain) + begins and whole[-1] == tokenizer.eos_token_id


def _template(where: Path, tokenizer: Any) -> str | list[dict[str, str]] | None:
    """The chat template; several have names, of which the engine asks for `tool_use` where there are tools."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        if "default" not in template:
            log.warning(
                "%s: has chat templates (%s) and none named default, so %s takes ChatML unless you give it a file",
                where, ", ".join(template), gguf_names().engine,
            )  # fmt: skip
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
