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
KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
@given(text=st.one_of(SEEN, PIECES, st.text(max_size=20)), part=st.floats(0, 0.5), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_text_of_kept_tokens_gives_the_same_tokens_and_any_text_comes_back(
    kind: str, text: str, part: float, seed: int
) -> None:
    """Whatever else is kept or gone; nothing here asks for intermediate tokens, which must come by themselves."""
    base, kept = tokenizer_of(kind), some_tokens(kind, part, seed) | must_of(kind)
    expected = base.encode(text)
    new, ids = smaller(kind, kept | set(expected.ids))
    found = new.encode(text)
    assert found.ids == [ids[index] for index in expected.ids]
    assert (found.tokens, found.offsets) == (expected.tokens, expected.offsets)
    new, ids = smaller(kind, kept)  # text in languages whose tokens were dropped, too
    encoded = new.encode(text).ids
    assert max(encoded, default=0) < len(ids)
    for special in (True, False):
        back = base.decode(expected.ids, skip_special_tokens=special)
        assert new.decode(encoded, skip_special_tokens=special) == back


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
    base, whole = tokenizer_of(kind), trimmed(vocabulary_of(kind), set(vocabulary_of(kind).by_id))
    assert whole.data == data_of(kind)
    assert all(old == new for old, new in whole.ids.items())
    new, ids = smaller(kind, some_tokens(kind, 0.1, 0) | must_of(kind))
    assert list(ids) == sorted(ids)
    assert sorted(ids.values()) == list(range(len(ids)))
    assert [new.id_to_token(index) for index in ids.values()] == [base.id_to_token(index) for index in ids]
    added, before = ({t.content for t in each.get_added_tokens_decoder().values()} for each in (new, base))
    assert added == before
    text = "a </s>12<s>" + ("<tool> 3<|turn|>" if "byte_level" in kind else "")
    found, expected = ([t for t in each.encode(text).tokens if t in added - {"<unk>"}] for each in (new, base))
    assert found == expected
    assert len(found) >= 3


REPEATED = [("a", "a"), ("a", "aa"), ("aa", "a"), ("aa", "aa"), ("aaa", "a")]
AROUND = [("a", "b"), ("c", "d"), ("b", "cd"), ("a", "bcd"), ("ab", "cd"), ("bc", "d"), ("b", "c")]
Case = tuple[list[tuple[str, str]], list[str], str, str]
MERGES: list[Case] = [  # what is asked for, what it needs and which merges stay
    # `bc` first, whose merge is better than that of `ab`; `a` + `bc` then, and never `ab` + `c`
    ([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")], ["abc"], "a b c bc abc", "b+c a+bc"),
    # from the left: `aaa` is `aa` + `a`, and `aaaa` is `aa` + `aa`
    (REPEATED, ["aaa"], "a aa aaa", "a+a a+aa aa+a"),
    (REPEATED, ["aaaa"], "a aa aaaa", "a+a aa+aa"),
    # it can be merged of `ab` and `c` only, and `bc` always comes first
    ([("b", "c"), ("a", "b"), ("ab", "c")], ["abc"], "abc", ""),
    # other merges of kept tokens stay: where no dropped token comes between, the base's way may be another
    (AROUND, ["bcd", "a", "bc"], "a b c d cd bcd bc", "c+d b+cd bc+d b+c"),
]


@pytest.mark.parametrize(("merges", "kept", "needed", "left"), MERGES, ids=str)
def test_a_token_needs_the_parts_that_its_own_text_goes_through(
    merges: list[tuple[str, str]], kept: list[str], needed: str, left: str
) -> None:
    names = dict.fromkeys([*sorted(set("".join(map("".join, merges)))), *(a + b for a, b in merges)])
    model = models.BPE(vocab={token: index for index, token in enumerate(names)}, merges=merges)
    vocabulary = Vocabulary(json.loads(Tokenizer(model).to_str()), "here")
    ids = {vocabulary.tokens[token] for token in kept}
    assert {vocabulary.by_id[each] for index in ids for each in vocabulary.needs(index)} == set(needed.split())
    result = trimmed(vocabulary, ids).data["model"]
    assert result["vocab"] == {token: index for index, token in enumerate(needed.split())}
    assert [f"{a}+{b}" for a, b in result["merges"]] == left.split()


def test_a_unigrams_unknown_score_stays_what_it_was() -> None:
    """An unknown character scores ten less than the worst piece; without that piece, segmentations would change."""
    pieces = [("<unk>", 0.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0), ("zz", -30.0), ("c", -5.0)]
    vocabulary = Vocabulary(json.loads(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str()), "here")
    alphabet = always_kept(vocabulary)["alphabet"]
    # the worst, which alone covers "z", and every single character
    assert {vocabulary.by_id[index] for index in alphabet} == {"zz", "a", "b", "c", "<unk>"}


def test_kinds_are_told_apart_and_others_refused_by_name() -> None:
    bpe, unigram = TokenizerKind.BYTE_LEVEL, TokenizerKind.UNIGRAM
    assert [vocabulary_of(kind).kind for kind in KINDS] == [bpe, bpe, TokenizerKind.SENTENCEPIECE, unigram, unigram]
    assert [kind for kind in KINDS if not vocabulary_of(kind).reaches_bytes] == ["unigram_without_bytes"]
    others: list[tuple[Any, str]] = [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    ]
    for model, named in others:
        with pytest.raises(CheckpointError, match=f"somewhere/tokenizer.json.*{named}"):
            Vocabulary(json.loads(Tokenizer(model).to_str()), "somewhere/tokenizer.json")


@KIND
def test_what_is_always_kept(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    kept = {vocabulary.by_id[index] for index in must_of(kind)}
    assert set(vocabulary.added) <= kept
    assert {token for token in vocabulary.tokens if token.strip("▁Ġ").isdigit()} <= kept
    assert {token for token in vocabulary.tokens if token and not token.strip("▁ĠĊĉ\n\t")} <= kept
    single = {token for token in vocabulary.tokens if len(token) == 1}
    if vocabulary.reaches_bytes:
        spelled = single if kind.startswith("byte") else {t for t in vocabulary.tokens if t.startswith("<0x")}
        assert len(spelled) == 256
        assert spelled <= kept
        assert kind.startswith("byte") or {token for token in single if token.isalpha()} - kept
    else:
        assert single | {"qu"} <= kept
    assert len(kept) < len(vocabulary.by_id) - 50
