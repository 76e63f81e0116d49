"""Corpora weigh as the spec says, whatever their number of tokens."""

from __future__ import annotations

import pytest

from expertprune.corpora.batches import CalibrationText, Tokens, each_once, make_batches
from expertprune.corpora.shares import shared_out


def text_of(*windows: Tokens) -> CalibrationText:
    return CalibrationText([], list(windows), make_batches(windows, 64, prompt_weight=0.5))


def weights_of(texts: list[CalibrationText], shares: list[float]) -> dict[tuple[int, ...], float]:
    """The weight of each window: the sum over its tokens."""
    batches = shared_out(texts, each_once(texts), shares)
    found = {}
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            assert not batch.weights[row, length:].any()
            found[tuple(batch.ids[row, :length].tolist())] = float(batch.weights[row].sum())
    assert len(found) == sum(len(batch.lengths) for batch in batches)
    return found


def test_a_corpus_of_few_tokens_has_its_share() -> None:
    """48 tokens beside 512, each half of 560 tokens."""
    own = text_of(*(Tokens((1, number)) for number in range(24)))
    general = text_of(*(Tokens((2, number)) for number in range(256)))
    found = weights_of([own, general], [0.5, 0.5])
    assert sum(weight for ids, weight in found.items() if ids[0] == 1) == pytest.approx(280)
    assert sum(weight for ids, weight in found.items() if ids[0] == 2) == pytest.approx(280)
    assert found[1, 7] == pytest.approx(280 / 24)


def test_corpora_of_equal_weight_and_share_are_pooled_as_they_are() -> None:
    """Batches keep the weight of each token: 1, or half of it where it is no answer's."""
    chat = Tokens((5, 6, 7, 8), (False, False, True, True))  # weighs 3 of 4
    found = weights_of([text_of(Tokens((1, 2, 3))), text_of(chat)], [0.5, 0.5])
    assert found == {(1, 2, 3): pytest.approx(3), (5, 6, 7, 8): pytest.approx(3)}


def test_a_window_of_two_corpora_runs_once_for_both() -> None:
    """Weights 6 and 4; the shared window has 2 of each corpus."""
    shared = Tokens((9, 9))
    found = weights_of([text_of(Tokens((1, 1, 1, 1)), shared), text_of(shared, Tokens((3, 3)))], [0.75, 0.25])
    assert found == {
        (1, 1, 1, 1): pytest.approx(0.75 * 10 * 4 / 6),
        (9, 9): pytest.approx(0.75 * 10 * 2 / 6 + 0.25 * 10 * 2 / 4),
        (3, 3): pytest.approx(0.25 * 10 * 2 / 4),
    }


def test_parts_of_a_batch_keep_the_scales_of_their_rows() -> None:
    texts = [text_of(Tokens((1, 1)), Tokens((2, 2))), text_of(Tokens((1, 1)))]
    (batch,) = shared_out(texts, each_once(texts), [0.5, 0.5])
    assert batch.of_rows([1]).weights.tolist() == [[0.75, 0.75]]  # 0.5 * 6 / 4
    assert batch.of_rows([0]).weights.tolist() == [[2.25, 2.25]]  # and 0.5 * 6 / 2
