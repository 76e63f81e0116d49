"""Alignment against the direct formula, over all tokens at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.evaluation import reading
from expertprune.evaluation.alignment import LinearCKA
from expertprune.evaluation.measure import Measuring
from expertprune.spec.schema import Evaluate
from tests.tiny import WORDS, as_run, tiny_model, tiny_tokenizer

Floats = NDArray[np.float64]


def direct(x: Floats, y: Floats) -> float:
    """HSIC of centred Gram matrices, `[tokens, tokens]`: the paper's equations 2 to 4 rather than its equation 5."""
    centring = np.eye(len(x)) - 1 / len(x)
    mine, theirs = (centring @ states @ states.T @ centring for states in (x, y))
    return float((mine * theirs).sum() / np.sqrt((mine * mine).sum() * (theirs * theirs).sum()))


def streamed(x: Floats, y: Floats, sizes: list[int]) -> float:
    cka = LinearCKA()
    for mine, theirs in zip(torch.from_numpy(x).split(sizes), torch.from_numpy(y).split(sizes), strict=True):
        cka.add(mine, theirs)
    assert cka.tokens == len(x)
    return cka.value()


def test_streamed_cka_equals_the_direct_formula() -> None:
    """Of representations that have something in common, far from the origin, one of them with a massive channel."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 6)) + 5
    y = x @ generator.normal(size=(6, 8)) + generator.normal(size=(40, 8)) * 3
    y[:, 3] += 2000
    expected = direct(x, y)
    assert 0.1 < expected < 0.95
    for sizes in ([40], [1] * 40, [3, 30, 7]):
        assert streamed(x, y, sizes) == pytest.approx(expected, rel=1e-9)
    # What does not vary has none.
    assert np.isnan(LinearCKA().value())
    assert np.isnan(streamed(np.ones((5, 2)), np.arange(10.0).reshape(5, 2), [5]))


TEXTS = [
    Document(" ".join(np.random.default_rng(seed).choice(WORDS, size))) for seed, size in enumerate((3, 17, 9, 9, 1))
]


@pytest.mark.parametrize(
    ("name", "per_batch", "gone"), [("llama", 1, ()), ("gemma3", 1024, ()), ("llama", 1024, (0,)), ("llama", 30, (2,))]
)
def test_layers_and_final_states_are_the_models_own(
    name: str, per_batch: int, gone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against `output_hidden_states` of each document alone; the last of those is normed, so it is the final state.

    Where a layer is gone, the expert's states are those behind the layer before it.
    """
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", per_batch)
    base, tokenizer = tiny_model(name, seed=0), tiny_tokenizer()
    expert = tiny_model(name, seed=1, num_hidden_layers=3 - len(gone))
    documents = {
        "language/en": TEXTS,
        "task/qa": [],
        "general/domain/x": TEXTS[:2],
        "domain/y": [Document("heart")],
    }
    question = Question("heart", ("law", "blood"), 0)
    corpora = [Corpus(CorpusName.parse(name), (), tuple(found), (question,)) for name, found in documents.items()]
    measuring = Measuring(as_run(base), tokenizer, corpora, Evaluate(max_tokens=12))
    plain, aligned = (measuring.against(as_run(expert), align=align, gone=gone) for align in (False, True))
    assert list(aligned.alignment) == ["language en", "general domain/x"]  # the others have nothing to compare
    found = aligned.alignment["language en"]
    assert aligned.model_copy(update={"alignment": {}}) == plain

    def hidden(model: Any) -> list[Floats]:
        parts = []
        for document in TEXTS:
            ids = torch.tensor([tokenizer(document.text)["input_ids"][:12]])
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            parts.append([layer[0, 1:].double().numpy() for layer in states])
        return [np.concatenate(layers) for layers in zip(*parts, strict=True)]

    mine, theirs = hidden(base), hidden(expert)
    behind = [sum(layer not in gone for layer in range(number)) for number in range(1, 4)]  # so many layers
    expected = [
        direct(mine[i], theirs[j]) for i, j in enumerate(behind, 1) if i < len(mine) - 1 and j < len(theirs) - 1
    ]
    assert len(expected) == (1 if gone == (2,) else 2)
    assert found.layers[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert len(found.layers) == 3
    assert all(0 < value < 0.99 for value in found.layers)
    x, y = mine[-1], theirs[-1]
    cosines = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-4)
    assert (found.documents, found.tokens) == (4, 2 + 11 + 8 + 8), "one document predicts nothing"
