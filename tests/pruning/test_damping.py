"""The damping that is chosen is the one that held-out text wants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertprune.corpora.batches import make_batches
from expertprune.pruning.damping import DAMPINGS, Halves
from expertprune.pruning.solve import Moments, Rows
from tests.pruning.test_repair import slow_least_squares

CPU = torch.device("cpu")
INPUTS, OUTPUTS = 12, 5


def new(kind: type[Moments] | type[Rows]) -> Moments | Rows:
    return Rows() if kind is Rows else Moments.zeros(INPUTS, OUTPUTS, CPU)


def halves_of(kind: type[Moments] | type[Rows], *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Halves:
    halves = Halves(new(kind), new(kind), OUTPUTS, CPU)
    for half, part in zip((halves.first, halves.second), parts, strict=True):
        half.add(*(torch.tensor(each, dtype=torch.float32) for each in part))
    return halves


def tokens_of(count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs with much in common, residuals that they explain up to noise, and weights of tokens."""
    mixing, rows = np.random.default_rng(0), np.random.default_rng(seed)
    inputs = rows.normal(size=(count, INPUTS)) @ mixing.normal(size=(INPUTS, INPUTS))
    truth = mixing.normal(size=(OUTPUTS, INPUTS))
    residual = inputs @ truth.T + noise * rows.normal(size=(count, OUTPUTS))
    return inputs, residual, rows.uniform(0.5, 2, size=count)


@pytest.mark.parametrize("kind", [Moments, Rows])
@pytest.mark.parametrize("noise", [0.1, 10, 40, 1000])
def test_it_leaves_least_of_the_residual_of_either_half(kind: type[Moments] | type[Rows], noise: float) -> None:
    parts = [tokens_of(40, noise, seed) for seed in (1, 2)]
    losses = []
    for damping in DAMPINGS:
        loss = 0.0
        for fitted, (inputs, residual, weight) in (parts, parts[::-1]):
            left = residual - inputs @ slow_least_squares(*fitted, damping).T
            loss += float((weight[:, None] * (left**2 - residual**2)).sum())
        losses.append(loss)
    halves = halves_of(kind, *parts)
    damping = halves.best_damping()
    best = min(losses)
    assert losses[DAMPINGS.index(damping)] <= best + 0.02 * abs(best)  # compared on mixtures of the outputs
    together = [np.concatenate(each) for each in zip(*parts, strict=True)]
    found = halves.solved(damping).numpy()
    np.testing.assert_allclose(found, slow_least_squares(*together, damping), rtol=2e-3, atol=1e-3)


def test_noise_wants_the_largest_and_a_plain_relation_the_smallest() -> None:
    assert halves_of(Moments, tokens_of(200, 0, 1), tokens_of(200, 0, 2)).best_damping() == DAMPINGS[0]
    assert halves_of(Moments, tokens_of(20, 1e4, 1), tokens_of(20, 1e4, 2)).best_damping() == DAMPINGS[-1]


@pytest.mark.parametrize("kind", [Moments, Rows])
def test_one_document_says_nothing_of_others_and_changes_least(kind: type[Moments] | type[Rows]) -> None:
    nothing = tokens_of(0, 0, 3)
    assert halves_of(kind, tokens_of(30, 0, 1), nothing).best_damping() == DAMPINGS[-1]


def test_every_second_document_is_in_one_half_without_padding() -> None:
    """Documents of 2, 3 and 5 tokens; the input of a token is its id."""
    (batch,) = make_batches([[2, 3], [4, 5, 6], [7, 8, 9, 10, 11]], 64)
    real = torch.cat([batch.ids[row, :length] for row, length in enumerate(batch.lengths)]).float()
    halves = Halves(Rows(), Rows(), 1, CPU)
    halves.add(real[:, None], 2 * real[:, None], torch.ones(len(real)), batch)
    assert torch.cat(halves.first.inputs).flatten().tolist() == [2, 3, 7, 8, 9, 10, 11]
    assert torch.cat(halves.second.inputs).flatten().tolist() == [4, 5, 6]
    assert torch.cat(halves.second.residuals).flatten().tolist() == [8, 10, 12]
