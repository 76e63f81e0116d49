"""Greedy removal against brute force: every removal tried, every least squares problem solved anew by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertprune.corpora.batches import make_batches
from expertprune.profiling.removals import removal_pass
from expertprune.relevance.obs import DAMPING, greedy_removal
from tests.masks import projection_inputs, tiny, token_lists

Array = NDArray[np.float64]


def brute_force(weight: Array, inputs: Array, width: int, damping: float = DAMPING) -> tuple[list[int], list[float]]:
    """The order of removals and what each costs; `weight` is `[outputs, channels]`, `inputs` is `[tokens, channels]`.

    The columns that are left are fitted to the dense output on the tokens, and (damping, as further rows) to the dense
    columns themselves; a removal costs what it adds to the squared error, per token.
    """
    tokens, channels = inputs.shape
    strength = damping * np.mean(np.square(inputs).sum(0) / tokens)
    rows = np.concatenate([inputs / np.sqrt(tokens), np.sqrt(strength) * np.eye(channels)])
    wanted = rows @ weight.T

    def error(units: list[int]) -> float:
        left = [unit * width + offset for unit in units for offset in range(width)]
        solved = np.linalg.lstsq(rows[:, left], wanted, rcond=None)[0]
        return float(np.square(rows[:, left] @ solved - wanted).sum())

    units, order, costs, now = list(range(channels // width)), [], [], 0.0
    while units:
        tried = [error([other for other in units if other != unit]) for unit in units]
        best = int(np.argmin(tried))
        costs.append(tried[best] - now)
        now = tried[best]
        order.append(units.pop(best))
    return order, costs


def assert_removed_alike(scores: torch.Tensor, order: list[int], costs: list[float], relative: float = 1e-4) -> None:
    """Scores are the costs along the order, each no smaller than the one before."""
    expected = np.empty(len(order))
    expected[order] = np.maximum.accumulate(costs)
    np.testing.assert_allclose(scores.double().numpy(), expected, rtol=relative)
    along = scores.double().numpy()[order]
    assert (np.diff(along) >= -relative * along[1:]).all()


def moments(inputs: Array) -> torch.Tensor:
    return torch.tensor(inputs.T @ inputs / len(inputs), dtype=torch.float32)


def correlated(tokens: int, channels: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(tokens, channels)) @ random.normal(size=(channels, channels))
    return mixed * np.exp(random.normal(size=channels))


# name, inputs: enough tokens; fewer tokens than channels; one channel a thousand times louder; silent channels
INPUTS = {
    "many": correlated(50, 12),
    "few": correlated(5, 12),
    "massive": correlated(50, 12) * np.where(np.arange(12) == 4, 1e3, 1),
    "silent": correlated(50, 12) * (np.arange(12) % 4 > 0),
}


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("which", INPUTS)
def test_removals_equal_brute_force(which: str, width: int) -> None:
    inputs, weight = INPUTS[which], np.random.default_rng(9).normal(size=(7, 12))
    order, costs = brute_force(weight, inputs, width)
    scores = greedy_removal(torch.tensor(weight, dtype=torch.float32), moments(inputs), width)
    assert scores.shape == (12 // width,)
    assert_removed_alike(scores, order, costs)


@pytest.mark.parametrize("pending", [1, 4, 5, 100])
def test_the_matrices_may_be_brought_up_to_date_as_seldom_as_one_likes(
    monkeypatch: pytest.MonkeyPatch, pending: int
) -> None:
    monkeypatch.setattr("expertprune.relevance.obs.PENDING", pending)
    inputs, weight = INPUTS["many"], np.random.default_rng(9).normal(size=(7, 12))
    scores = greedy_removal(torch.tensor(weight, dtype=torch.float32), moments(inputs), 1)
    assert_removed_alike(scores, *brute_force(weight, inputs, 1))


def test_a_channel_that_another_repeats_goes_first_at_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertprune.relevance.obs.DAMPING", 1e-6)
    inputs, weight = correlated(50, 12), np.random.default_rng(9).normal(size=(7, 12))
    inputs[:, 8] = inputs[:, 3]
    scores = greedy_removal(torch.tensor(weight, dtype=torch.float32), moments(inputs), 1)
    first = int(scores.argmin())
    assert first in (3, 8)
    # the other takes the weights of both: damping alone makes that cost anything, at most 2 λ ‖w‖²
    strength = 1e-6 * np.mean(np.square(inputs).mean(0))
    assert 0 <= float(scores[first]) <= 2.1 * strength * float(np.square(weight[:, first]).sum())


def test_the_rest_is_scored_as_if_the_repeated_channel_had_been_merged() -> None:
    """Columns that are re-solved, unlike those that merely stay: a channel twice as loud stands for both."""
    inputs, weight = correlated(50, 12), np.random.default_rng(9).normal(size=(7, 12))
    inputs[:, 8] = inputs[:, 3]
    order, costs = brute_force(weight, inputs, 1)
    assert_removed_alike(greedy_removal(torch.tensor(weight, dtype=torch.float32), moments(inputs), 1), order, costs)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    scores = greedy_removal(torch.ones(7, 12), torch.zeros(12, 12), 1)
    assert bool(scores.isfinite().all())
    assert float(scores.max()) < 1e-30


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
def test_a_models_removals_equal_brute_force_however_batches_are_cut(tokens_per_batch: int) -> None:
    of, documents = tiny("llama", intermediate_size=10, num_hidden_layers=2), token_lists()
    batches = make_batches(documents, tokens_per_batch, pad=63)
    found = removal_pass(of.model, of.family, of.shapes, batches)
    seen = [projection_inputs(of, ids) for ids in documents]
    for index, layer in enumerate(of.model.model.layers):
        for name, block, module, width in (
            ("ffn", "ffn", layer.mlp.down_proj, 1),
            ("heads", "heads", layer.self_attn.o_proj, 4),
            ("groups", "heads", layer.self_attn.o_proj, 8),
        ):
            inputs = np.concatenate([each[f"{block}.{index}"] for each in seen])
            order, costs = brute_force(module.weight.detach().double().numpy(), inputs, width)
            assert_removed_alike(found[f"{name}.{index}.value"], order, costs)
