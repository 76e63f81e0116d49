"""Smaller tokenizers: the same tokens wherever they are kept, every kept token reachable, every text still written."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from expertprune.errors import CheckpointError
from expertprune.tokenizing import TokenizerKind, Vocabulary, essential_ids, trimmed
from tests.vocabularies import KINDS, data_of, tokenizer_of, words


def always_kept(vocabulary: Vocabulary) -> dict[str, frozenset[int]]:
    """The ids that are kept without a chat template, by reason."""
    found = essential_ids(vocabulary, Path("nowhere"), SimpleNamespace(chat_template=None))
    return {reason: frozenset(ids) for reason, ids in found.items()}


@functools.cache
def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary(data_of(kind), "tokenizer.json")


@functools.cache
def must_of(kind: str) -> frozenset[int]:
    return frozenset().union(*always_kept(vocabulary_of(kind)).values())


def smaller(kind: str, kept: set[int]) -> tuple[Tokenizer, dict[int, int]]:
    result = trimmed(vocabulary_of(kind), kept)
    return Tokenizer.from_str(json.dumps(result.data)), result.ids


def some_tokens(kind: str, part: float, seed: int) -> set[int]:
    ids = sorted(vocabulary_of(kind).by_id)
    return set(random.Random(seed).sample(ids, int(part * len(ids))))


# words of the training text as they are, joined, cut and mixed, beside any text at all
SEEN = st.lists(st.sampled_from(words()), min_size=1, max_size=8).map(" ".join)
PIECES = st.lists(st.sampled_from([w[:n] for w in words() for n in (1, 2, 3)] + list(" \n\t0123")), max_size=20).map(
    "".join
)
WRITTEN = st.one_of(SEEN, PIECES, st.text(max_size=20))
KIND = pytest.mark.parametrize("kind", KINDS)


def test_kinds_are_told_apart() -> None:
    bpe, unigram = TokenizerKind.BYTE_LEVEL, TokenizerKind.UNIGRAM
    assert [vocabulary_of(kind).kind for kind in KINDS] == [bpe, bpe, TokenizerKind.SENTENCEPIECE, unigram, unigram]
    assert [kind for kind in KINDS if not vocabulary_of(kind).reaches_bytes] == ["unigram_without_bytes"]


@KIND
@given(text=WRITTEN, part=st.floats(0, 0.5), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_text_of_kept_tokens_gives_the_same_tokens(kind: str, text: str, part: float, seed: int) -> None:
    """Whatever else is kept or gone; nothing here asks for intermediate tokens, which must come by themselves."""
    base = tokenizer_of(kind).encode(text)
    new, ids = smaller(kind, some_tokens(kind, part, seed) | set(base.ids) | must_of(kind))
    found = new.encode(text)
    assert found.ids == [ids[index] for index in base.ids]
    assert found.tokens == base.tokens
    assert found.offsets == base.offsets


@KIND
@given(text=WRITTEN, part=st.floats(0, 0.3), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_any_text_comes_back_as_from_the_base(kind: str, text: str, part: float, seed: int) -> None:
    """Text in languages whose tokens were dropped, too."""
    base = tokenizer_of(kind)
    new, ids = smaller(kind, some_tokens(kind, part, seed) | must_of(kind))
    for special in (True, False):
        found = new.decode(new.encode(text).ids, skip_special_tokens=special)
        assert found == base.decode(base.encode(text).ids, skip_special_tokens=special)
    assert max(new.encode(text).ids, default=0) < len(ids)


@KIND
def test_every_kept_token_stays_reachable(kind: str) -> None:
    """A token that the base's model makes of its own text is made of it again: by the library's word, not by ours."""
    base, reachable = tokenizer_of(kind).model, 0
    for seed in range(3):
        kept = some_tokens(kind, 0.2, seed)
        new, _ = smaller(kind, kept)
        for token in sorted(vocabulary_of(kind).by_id[index] for index in kept):
            if [each.value for each in base.tokenize(token)] == [token]:
                reachable += 1
                assert [each.value for each in new.model.tokenize(token)] == [token]
    assert reachable > 60


@KIND
def test_ids_are_dense_in_the_bases_order_and_special_tokens_keep_their_place(kind: str) -> None:
    base = tokenizer_of(kind)
    new, ids = smaller(kind, some_tokens(kind, 0.1, 0) | must_of(kind))
    assert list(ids) == sorted(ids)
    assert sorted(ids.values()) == list(range(len(ids)))
    assert [new.id_to_token(index) for index in ids.values()] == [base.id_to_token(index) for index in ids]
    added, before = ({t.content for t in each.get_added_tokens_decoder().values()} for each in (new, base))
    assert added == before
    text = "a </s>12<s>" + ("<tool> 3<|turn|>" if "byte_level" in kind else "")
    named = added - {"<unk>"}
    found, expected = ([token for token in each.encode(text).tokens if token in named] for each in (new, base))
    assert found == expected
    assert len(found) >= 3


@KIND
def test_keeping_everything_changes_nothing(kind: str) -> None:
    result = trimmed(vocabulary_of(kind), set(vocabulary_of(kind).by_id))
    assert result.data == data_of(kind)
    assert all(old == new for old, new in result.ids.items())


def bpe(vocabulary: list[str], merges: list[tuple[str, str]]) -> Vocabulary:
    tokens = {token: i for i, token in enumerate(vocabulary)}
    return Vocabulary(json.loads(Tokenizer(models.BPE(vocab=tokens, merges=merges)).to_str()), "here")


def needed(vocabulary: Vocabulary, token: str) -> set[str]:
    return {vocabulary.by_id[index] for index in vocabulary.needs(vocabulary.tokens[token])}


def test_a_token_needs_the_parts_that_its_own_text_goes_through() -> None:
    """`abc` by `bc` first, whose merge is better than that of `ab`; `a` + `bc` then, and never `ab` + `c`."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    vocabulary = bpe(["a", "b", "c", "d", "ab", "bc", "abc"], merges)
    assert needed(vocabulary, "abc") == {"a", "b", "c", "bc", "abc"}
    assert needed(vocabulary, "ab") == {"a", "b", "ab"}
    assert needed(vocabulary, "d") == {"d"}
    result = trimmed(vocabulary, [vocabulary.tokens["abc"]])
    assert result.data["model"]["merges"] == [["b", "c"], ["a", "bc"]]
    assert result.data["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}


def test_repeated_characters_are_merged_from_the_left() -> None:
    """`aaa` is `aa` + `a`, so `a` + `aa` is never taken; with `aaaa` it is `aa` + `aa`."""
    merges = [("a", "a"), ("a", "aa"), ("aa", "a"), ("aa", "aa"), ("aaa", "a")]
    vocabulary = bpe(["a", "aa", "aaa", "aaaa"], merges)
    assert needed(vocabulary, "aaa") == {"a", "aa", "aaa"}
    assert needed(vocabulary, "aaaa") == {"a", "aa", "aaaa"}
    kept = trimmed(vocabulary, [vocabulary.tokens["aaaa"]]).data["model"]
    assert kept["merges"] == [["a", "a"], ["aa", "aa"]]


def test_a_token_that_its_text_does_not_become_needs_itself_alone() -> None:
    """`abc` can be merged of `ab` and `c` only, and `bc` always comes first."""
    vocabulary = bpe(["a", "b", "c", "ab", "bc", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")])
    assert needed(vocabulary, "abc") == {"abc"}


def test_other_merges_of_kept_tokens_stay_too() -> None:
    """Where a dropped token no longer comes between, what is left may be merged in ways that the base never took."""
    merges = [("a", "b"), ("c", "d"), ("b", "cd"), ("a", "bcd"), ("ab", "cd"), ("bc", "d"), ("b", "c")]
    vocabulary = bpe(["a", "b", "c", "d", "ab", "cd", "bcd", "bc", "abcd"], merges)
    kept = trimmed(vocabulary, [vocabulary.tokens["bcd"], vocabulary.tokens["a"], vocabulary.tokens["bc"]])
    assert kept.data["model"]["merges"] == [["c", "d"], ["b", "cd"], ["bc", "d"], ["b", "c"]]


def test_a_unigrams_unknown_score_stays_what_it_was() -> None:
    """An unknown character scores ten less than the worst piece; without that piece, segmentations would change."""
    pieces = [("<unk>", 0.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0), ("zz", -30.0), ("c", -5.0)]
    data = json.loads(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str())
    vocabulary = Vocabulary(data, "here")
    alphabet = always_kept(vocabulary)["alphabet"]
    # the worst, which alone covers "z", and every single character
    assert {vocabulary.by_id[index] for index in alphabet} == {"zz", "a", "b", "c"} | {"<unk>"}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    ],
)
def test_other_kinds_are_refused_by_name(model: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere/tokenizer.json.*{named}"):
        Vocabulary(json.loads(Tokenizer(model).to_str()), "somewhere/tokenizer.json")


@KIND
def test_what_is_always_kept(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    kept = {vocabulary.by_id[index] for index in must_of(kind)}
    assert set(vocabulary.added) <= kept
    assert {token for token in vocabulary.tokens if token.strip("▁Ġ").isdigit()} <= kept
    assert {token for token in vocabulary.tokens if token and not token.strip("▁ĠĊĉ\n\t")} <= kept
    if vocabulary.reaches_bytes:
        spelled = [t for t in vocabulary.tokens if t.startswith("<0x") or (kind.startswith("byte") and len(t) == 1)]
        assert len(spelled) == 256
        assert set(spelled) <= kept
        letters = {token for token in vocabulary.tokens if len(token) == 1 and token.isalpha()}
        assert kind.startswith("byte") or letters - kept
    else:
        assert {token for token in vocabulary.tokens if len(token) == 1} <= kept
        assert "qu" in kept
    assert len(kept) < len(vocabulary.by_id) - 50
