"""Renumber the files beside `tokenizer.json` that name token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, RootModel, TypeAdapter, ValidationError

from expertprune.errors import CheckpointError
from expertprune.files import as_model, read_object
from expertprune.tokenizing.trimming import Trimmed
from expertprune.tokenizing.vocabulary import pair_of

# Other files of the whole vocabulary. They would contradict the smaller one.
_STALE = ("*.model", "*.tiktoken", "tekken.json", "vocab.txt")
_ID = re.compile(r"_token_(ids?|index)$|_token_indices$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids")


_Shape = tuple[Any, str]  # what a key may hold, as a type and in words
_IDS: _Shape = (bool | int | list[int] | None, "a token id, or a list of token ids")
_SHAPES: dict[str, _Shape] = {
    "bad_words_ids": (list[list[int]] | None, "a list of lists of token ids"),
    "force_words_ids": (list[list[int] | list[list[int]]] | None, "a list of lists of token ids, or of lists of such"),
    "forced_decoder_ids": (list[tuple[int, int | None]] | None, "a list of pairs: a position and a token id"),
    "sequence_bias": (list[tuple[list[int], float]] | None, "a list of pairs: a list of token ids, and a number"),
    "stop_strings": (str | list[str] | None, "text, or a list of texts"),
    "added_tokens_decoder": (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Any] | None, "a mapping whose keys are token ids"
    ),
    **dict.fromkeys(_ID_LISTS, _IDS),
}  # fmt: skip


def read_settings(path: Path) -> dict[str, Any]:
    """A config of a model's folder; `{}` where there is none.

    Raises:
        CheckpointError: it is no JSON object, or a key that holds token ids or texts of tokens holds something else.
    """
    settings = read_object(path)
    for key, value in settings.items():
        shape = _SHAPES.get(key, _IDS if _ID.search(key) else None)
        if shape is None:
            continue
        kind, words = shape
        try:
            TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
        except ValidationError:
            raise CheckpointError(f"{path}: {key}: must be {words} (found {str(value)[:40]})") from None
    return settings


class Renumbering:
    """New ids for old ones in configs. An id without a token is dropped from every list."""

    def __init__(self, ids: Mapping[int, int]) -> None:
        self.ids = ids

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` or `generation_config.json` with new ids under every key that holds ids."""
        return {key: self._value(key, value) for key, value in config.items()}

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return value
        if _ID.search(key) or key in _ID_LISTS:
            return self._ids(value)
        if key in _SEQUENCES and isinstance(value, list):
            return [new for each in value if (new := self._sequence(each)) is not None]
        if key == "forced_decoder_ids" and isinstance(value, list):
            return [[place, self.ids[index]] for place, index in value if index in self.ids]
        if key == "sequence_bias" and isinstance(value, list):
            return [[new, bias] for each, bias in value if (new := self._sequence(each)) is not None]
        return value

    def _ids(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.ids[index] for index in value if index in self.ids]
        return self.ids.get(value)

    def _sequence(self, sequence: Any) -> Any:
        """A list of ids, or of such lists; `None` if a token is gone, as it cannot occur."""
        if isinstance(sequence, list) and sequence and isinstance(sequence[0], list):
            every = [new for each in sequence if (new := self._sequence(each)) is not None]
            return every or None
        return [self.ids[index] for index in sequence] if all(index in self.ids for index in sequence) else None


def special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    """Ids with a role in a config (BOS, EOS, padding, forced, ...), whose tokens must stay.

    Args:
        config: from `read_settings`.
    """
    for key, value in config.items():
        if key == "forced_decoder_ids":
            yield from (index for _, index in value or () if index is not None)
        elif _ID.search(key):
            values = value if isinstance(value, list) else [value]
            yield from (index for index in values if isinstance(index, int) and not isinstance(index, bool))


class _Added(RootModel[dict[str, int]]):
    """Ids of added tokens, as old tokenizers keep them."""


def write_tokenizer(base: Path, folder: Path, smaller: Trimmed) -> None:
    """Write the smaller tokenizer and its generation settings over the base's."""
    renumbering = Renumbering(smaller.ids)
    _write(folder / "tokenizer.json", smaller.data)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (base / name).is_file():
            config = renumbering.config(read_settings(base / name))
            if isinstance(known := config.get("added_tokens_decoder"), dict):
                config["added_tokens_decoder"] = {
                    str(smaller.ids[int(index)]): token for index, token in known.items() if int(index) in smaller.ids
                }
            _write(folder / name, config)
    if (base / "added_tokens.json").is_file():
        known = as_model(read_object(base / "added_tokens.json"), _Added, str(base / "added_tokens.json")).root
        added = {token: smaller.ids[index] for token, index in known.items() if index in smaller.ids}
        _write(folder / "added_tokens.json", added)
    model = smaller.data["model"]
    if (base / "vocab.json").is_file():
        _write(folder / "vocab.json", model["vocab"])
    if (base / "merges.txt").is_file():
        lines = ["#version: 0.2", *(" ".join(pair_of(merge)) for merge in model["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for pattern in _STALE:
        for path in folder.glob(pattern):
            path.unlink()


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
