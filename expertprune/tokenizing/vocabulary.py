"""A `tokenizer.json`: its kind, its tokens, and the other tokens that each token needs."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Set
from enum import StrEnum
from pathlib import Path
from typing import Any

from expertprune.errors import CheckpointError, refused
from expertprune.files import no_collection, read_object

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"  # how SentencePiece writes a space

_PLACEHOLDER = re.compile(
    r"\W*(unused|reserved|extra|dummy|placeholder|special|control)(_\w+?)?_?\d+\W*", re.IGNORECASE
)


class TokenizerKind(StrEnum):
    """The kinds of tokenizer whose vocabulary can be cut."""

    BYTE_LEVEL = "byte-level BPE"
    SENTENCEPIECE = "SentencePiece-style BPE"
    UNIGRAM = "Unigram"


class Vocabulary:
    """The vocabulary of one `tokenizer.json`.

    `tokens` maps the model's pieces to ids, `added` the added tokens to ids. A token may be in
    both.

    Raises:
        CheckpointError: the tokenizer is of another kind; the message names it and `where`.
    """

    def __init__(self, data: dict[str, Any], where: str) -> None:
        from tokenizers import Tokenizer

        with refused(f"{where}: not a tokenizer that can be read"):  # what it takes has the types that follow
            loaded = Tokenizer.from_str(json.dumps(data))
        self.data, self.model = data, data.get("model") or {}
        self.kind = _kind(data, where)
        if self.kind is TokenizerKind.UNIGRAM:
            self.tokens = {piece: index for index, (piece, _) in enumerate(self.model["vocab"])}
        else:
            self.tokens = dict(self.model["vocab"])
        # The library may give added tokens other numbers than the file.
        self.added = {token.content: index for index, token in loaded.get_added_tokens_decoder().items()}
        self.by_id = {index: token for token, index in (self.tokens | self.added).items()}
        self._parts: dict[str, tuple[int, ...]] = {}

    @functools.cached_property
    def placeholders(self) -> set[int]:
        """Added tokens without a meaning: numbered names that a model's makers left unused, such as
        `<unused7>`.

        Roles that `tokenizer_config.json` gives to some of them are not seen here.
        """
        return {index for token, index in self.added.items() if _PLACEHOLDER.fullmatch(token)}

    @functools.cached_property
    def named(self) -> set[int]:
        """Ids that other sections name: the unknown token, padding, and what is put around texts."""
        found = set[int]()
        if self.model.get("unk_token") in self.tokens:
            found.add(self.tokens[self.model["unk_token"]])
        if self.kind is TokenizerKind.UNIGRAM and self.model.get("unk_id") is not None:
            found.add(self.model["unk_id"])
        if self.data.get("padding"):
            found.add(self.data["padding"]["pad_id"])
        for part in nested(self.data.get("post_processor")):
            for entry in (part.get("special_tokens") or {}).values():
                found.update(entry["ids"])
            found.update(part[key][1] for key in ("sep", "cls") if key in part)
        return found

    @property
    def size(self) -> int:
        """One more than the largest id: the least number of rows that a model needs."""
        return max(self.by_id) + 1

    @property
    def reaches_bytes(self) -> bool:
        """Whether bytes spell all text and decode to it, so that no character must stay."""
        if self.kind is TokenizerKind.BYTE_LEVEL:
            return True
        spelled = bool(self.model.get("byte_fallback")) and all(byte in self.tokens for byte in BYTES)
        return spelled and "ByteFallback" in steps(self.data.get("decoder"))

    @functools.cached_property
    def merges(self) -> dict[tuple[str, str], int]:
        """Rank by pair; empty for Unigram."""
        pairs = self.model.get("merges") or []
        return {pair_of(merge): rank for rank, merge in enumerate(pairs)}

    def text(self, index: int) -> str:
        """The text of a token. An incomplete character shows as a replacement character."""
        token = self.by_id[index]
        if token in self.added:
            return token
        if self.kind is TokenizerKind.BYTE_LEVEL:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF).decode(errors="replace")
        return token.replace(SPACE, " ")

    def needs(self, index: int, kept: Set[int] = frozenset()) -> set[int]:
        """The token itself and every token that BPE forms on the way to it.

        Args:
            kept: tokens to leave out; with each of them, all that it needs is among them.
        """
        found: set[int] = set()
        left = [index]
        while left:
            if (each := left.pop()) not in kept and each not in found:
                found.add(each)
                left.extend(self.parts(each))
        return found

    def parts(self, index: int) -> tuple[int, ...]:
        """The two tokens that BPE merges into this one; none for a character, and none in Unigram.

        BPE merges the pair of least rank first, and of equal ones the leftmost. So text that
        becomes one token goes through the same merges wherever it stands, and these are the merges
        of its text alone; so are those of each of the two parts. A token that its own text does not
        become (it is found whole, or never) has no parts.
        """
        token = self.by_id[index]
        if self.kind is TokenizerKind.UNIGRAM or token not in self.tokens:
            return ()
        if token not in self._parts:
            self._parts[token] = tuple(self.tokens[part] for part in self._last_merge(token))
        return self._parts[token]

    def _last_merge(self, token: str) -> tuple[str, ...]:
        rank, never = self.merges.get, len(self.merges)
        symbols = list(token)
        if any(symbol not in self.tokens for symbol in symbols):
            return ()
        ranks = [rank(pair, never) for pair in itertools.pairwise(symbols)]
        while len(ranks) > 1:
            least = min(ranks)
            if least == never:
                return ()
            at = ranks.index(least)
            symbols[at : at + 2] = [merged := symbols[at] + symbols[at + 1]]
            del ranks[at]  # the pairs on both sides are new
            if at:
                ranks[at - 1] = rank((symbols[at - 1], merged), never)
            if at < len(ranks):
                ranks[at] = rank((merged, symbols[at + 1]), never)
        return tuple(symbols) if ranks and ranks[0] != never else ()

    def closed(self, ids: Iterable[int]) -> set[int]:
        """The tokens and all that they need."""
        kept: set[int] = set()
        for index in ids:
            kept |= self.needs(index, kept)
        return kept


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model's folder.

    Raises:
        CheckpointError: there is no `tokenizer.json`, the tokenizer needs code of its own, or is of
            another kind.
    """
    config, path = read_object(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    name = config.get("tokenizer_class", "unknown class")
    if isinstance(config.get("auto_map"), dict) and "AutoTokenizer" in config["auto_map"]:
        raise CheckpointError(
            f"{folder}: the tokenizer ({name}) comes with Python code of its own, which may change the text in any "
            "way; its vocabulary can only be cut, or written as GGUF, if tokenizer.json describes it"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: the tokenizer ({name}) has no tokenizer.json, so it is a slow one; save it as "
            "a fast one first (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    data = read_object(path)
    with no_collection():
        return Vocabulary(data, str(path))


def with_added(vocabulary: Vocabulary, tokenizer: Any, rows: int, where: Path) -> Vocabulary:
    """The vocabulary with the added tokens that `tokenizer.json` lacks.

    transformers takes them from `tokenizer_config.json` and its like, or from the tokenizer's class.

    Args:
        tokenizer: the running one.
        rows: of the model. Tokens behind them are left out: the model cannot read them.
        where: the folder, for errors.

    Raises:
        CheckpointError: the running tokenizer numbers an added token otherwise than `tokenizer.json`.
    """
    running = {index: token for index, token in sorted(tokenizer.added_tokens_decoder.items()) if index < rows}
    lacking = {index: token for index, token in running.items() if token.content not in vocabulary.added}
    whole = vocabulary
    if lacking:
        more = [{"id": index, "content": token.content, **_flags(token)} for index, token in lacking.items()]
        added = [*(vocabulary.data.get("added_tokens") or ()), *more]
        whole = Vocabulary({**vocabulary.data, "added_tokens": added}, str(where / "tokenizer.json"))
    for index, token in running.items():
        if whole.added.get(token.content) != index or whole.by_id[index] != token.content:
            raise CheckpointError(
                f"{where}: tokenizer.json and the files beside it disagree: transformers gives {token.content!r} the id "
                f"{index}; save them anew (AutoTokenizer.from_pretrained(...).save_pretrained(...)), and see that the "
                "ids are still those of the model"
            )
    return whole


def _flags(token: Any) -> dict[str, bool]:
    return {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}


def pair_of(merge: Any) -> tuple[str, str]:
    """A merge as a pair. Files hold `"a b"` or `["a", "b"]`."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def steps(part: Any) -> set[str]:
    """The types of a normalizer, pre-tokenizer, post-processor or decoder and of its members."""
    return {each["type"] for each in nested(part)}


def nested(part: Any) -> Iterator[dict[str, Any]]:
    """A section of a `tokenizer.json` and, where it is a sequence, its members."""
    if not isinstance(part, dict):
        return
    yield part
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        for member in part.get(key) or ():
            yield from nested(member)


def _kind(data: dict[str, Any], where: str) -> TokenizerKind:
    model = data.get("model") or {}
    name = model.get("type") or ("BPE" if "merges" in model else "of no stated type")
    if name == "Unigram":
        return TokenizerKind.UNIGRAM
    if name != "BPE":
        raise CheckpointError(
            f"{where}: a {name} tokenizer cannot be cut, nor written as GGUF; "
            f"{', '.join(kind.value for kind in TokenizerKind)} can"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(
                f"{where}: a BPE tokenizer with {key} {model[key]!r} cannot be cut, nor written as GGUF; "
                f"{', '.join(kind.value for kind in TokenizerKind)} can"
            )
    parts = [data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    if any("ByteLevel" in steps(part) for part in parts):
        return TokenizerKind.BYTE_LEVEL
    return TokenizerKind.SENTENCEPIECE


def _byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level BPE. Bytes that cannot be printed are written as
    characters from U+0100.

    As in GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(other)}


_BYTE_OF = _byte_characters()
