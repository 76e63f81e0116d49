"""The same tokenizer with fewer tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from expertprune.errors import CheckpointError
from expertprune.tokenizing.vocabulary import TokenizerKind, Vocabulary, nested, pair_of


@dataclass(frozen=True)
class Trimmed:
    """A smaller `tokenizer.json`, and the new id by the old one. Both ascend in `ids`."""

    data: dict[str, Any]
    ids: dict[int, int]


def trimmed(vocabulary: Vocabulary, kept: Iterable[int]) -> Trimmed:
    """A tokenizer of the kept tokens, the added tokens (but not placeholders), and all that these
    need.

    For BPE, a merge stays if its two pieces and its result are kept. Merges keep the base's order.
    So text whose base tokens are all kept gives the same tokens: the base's next merge is still
    there, and none comes before it. For Unigram the scores stay, so the best segmentation into kept
    pieces is still the best.

    New ids are dense and in the base's order.

    Raises:
        CheckpointError: the smaller tokenizer would number its tokens otherwise.
    """
    wanted = vocabulary.closed({*kept, *(set(vocabulary.added.values()) - vocabulary.placeholders)})
    ids = {index: new for new, index in enumerate(sorted(wanted))}
    data = copy.copy(vocabulary.data)
    data["model"] = _model(vocabulary, ids)
    data["added_tokens"] = [
        {**token, "id": ids[vocabulary.added[token["content"]]]}
        for token in sorted(data.get("added_tokens") or (), key=lambda token: vocabulary.added[token["content"]])
        if vocabulary.added[token["content"]] in ids
    ]
    if data.get("padding"):
        data["padding"] = {**data["padding"], "pad_id": ids[data["padding"]["pad_id"]]}
    data["post_processor"] = _post_processor(data.get("post_processor"), ids)
    _check(data, {vocabulary.by_id[index]: new for index, new in ids.items()})
    return Trimmed(data, ids)


def _model(vocabulary: Vocabulary, ids: dict[int, int]) -> dict[str, Any]:
    model = dict(vocabulary.model)
    if vocabulary.kind is TokenizerKind.UNIGRAM:
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["unk_id"]]
        return model
    kept = {token: ids[index] for token, index in sorted(vocabulary.tokens.items(), key=_second) if index in ids}
    model["vocab"] = kept
    model["merges"] = [
        merge
        for merge, (first, second) in ((merge, pair_of(merge)) for merge in model["merges"])
        if first in kept and second in kept and first + second in kept
    ]
    return model


def _second(item: tuple[str, int]) -> int:
    return item[1]


def _post_processor(part: Any, ids: dict[int, int]) -> Any:
    """The post-processor with new ids, nested ones included."""
    part = copy.deepcopy(part)
    for each in nested(part):
        for entry in (each.get("special_tokens") or {}).values():
            entry["ids"] = [ids[index] for index in entry["ids"]]
        for key in ("sep", "cls"):
            if key in each:
                each[key] = [each[key][0], ids[each[key][1]]]
    return part


def _check(data: dict[str, Any], expected: dict[str, int]) -> None:
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(json.dumps(data)).get_vocab(with_added_tokens=True)
    if found != expected:
        wrong = sorted({*found.items()} ^ {*expected.items()}, key=_second)[:3]
        raise CheckpointError(
            f"the tokenizer's ids cannot be made dense: added tokens stand before ordinary ones ({wrong})"
        )
