"""The passes beyond the forward one against autograd on explicit masks, through the whole model's own forward pass."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertprune.models import passes
from expertprune.models.layers import head_only
from expertprune.profiling import traversal
from expertprune.profiling.gradients import rescaled
from tests.masks import (
    LENGTHS,
    Masks,
    Tiny,
    assert_near,
    cross_entropy,
    mask_gradients,
    measured,
    segment_norms,
    tiny,
    token_lists,
)

pytestmark = pytest.mark.usefixtures("not_halved")

BIASED = {"attention_bias": True, "mlp_bias": True}


def keep_graphs(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Whether there is room for the graphs of all layers; without it, layers are run again."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 0 if kept else 1 << 60)


def gradients(
    of: Tiny, documents: list[list[int]], tokens_per_batch: int = 30, loss: str = "language_model", seed: int = 0
) -> dict[str, Tensor]:
    return measured(of.text(documents, tokens_per_batch), loss, seed)


def losses(of: Tiny) -> Tensor:
    return torch.stack([cross_entropy(of.model, ids).detach() for ids in token_lists()])


@pytest.mark.parametrize(
    ("family", "changes", "kept"),
    [
        ("llama", BIASED, True),
        ("llama", BIASED, False),
        ("gemma2", {}, True),  # eager attention, logits capped
        ("gemma3_text", {}, False),  # a window and a rotation of its own in some layers
        ("phi3", {}, True),  # fused projections
        ("starcoder2", {}, False),  # no gate
    ],
)
def test_losses_gradients_and_norms_equal_autograd_on_explicit_masks_however_batches_are_cut(
    family: str, changes: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of KV groups are the sums of their heads', and are not stored; their norms are."""
    keep_graphs(monkeypatch, kept)
    monkeypatch.setattr("expertprune.profiling.gradients.SEGMENT", 4)
    of, documents = tiny(family, **changes), token_lists()
    expected = {f"{name}.norm": values for name, values in segment_norms(of, documents, 4).items()}
    for name, values in mask_gradients(of, documents).items():
        expected |= {} if name.startswith("groups") else {f"{name}.value": values}
    expected["loss"] = losses(of)
    for tokens_per_batch in (1, 30):
        found = gradients(of, documents, tokens_per_batch)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert_near(found[name], values, 1e-5, f"{name}, {tokens_per_batch} tokens in a batch")


def test_a_few_positions_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    of, seen = tiny("llama"), []
    whole = gradients(of, token_lists(), loss="kl")
    of.model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0] * logits.shape[1]))
    for positions, tokens_per_batch in ((1, 30), (3, 1), (12, 30)):
        monkeypatch.setattr(passes, "LOGITS", 64 * positions)
        seen.clear()
        cut = gradients(of, token_lists(), tokens_per_batch, loss="kl")
        assert max(seen) <= max(positions, len(LENGTHS))  # one of each document at least
        for name, values in whole.items():
            assert_near(cut[name], values, 1e-5, name)


def test_half_precision_keeps_gradients_that_are_small() -> None:
    """A loud residual stream and a quiet head: a gradient of the mean loss is near 1e-8, and 6e-8 is the smallest number."""

    def quiet(dtype: torch.dtype) -> dict[str, Tensor]:
        of = tiny("llama")
        with torch.no_grad():
            of.model.model.embed_tokens.weight.mul_(5000)
            of.model.model.norm.weight.mul_(1e-3)
        of.model.half().to(dtype)  # the same weights in both
        return gradients(of, token_lists((100, 60)), 1000)

    exact, half = quiet(torch.float32), quiet(torch.float16)
    for name, values in exact.items():
        assert 0 < float(values.abs().max()) < (10 if name == "loss" else 1e-3), name
        assert float((half[name] - values).norm()) < 0.01 * float(values.norm()), name


@pytest.mark.parametrize("largest", [3e-39, 6e-8, 0.7, 65504.0, 1e30])
def test_rescaling_is_exact_and_brings_the_largest_gradient_into_the_range_of_half_precision(largest: float) -> None:
    """A gradient without a largest number is left as it is."""
    for value in (0.0, torch.inf, torch.nan):
        scaled, scale = rescaled(torch.tensor([value, 0.0]), torch.tensor(8.0, dtype=torch.float64))
        assert scale == 8.0
    gradient = torch.tensor([largest, -largest / 3, 0.0])
    scaled, scale = rescaled(gradient, torch.tensor(8.0, dtype=torch.float64))
    assert np.frexp(scale)[0] == 0.5  # a power of two
    assert torch.equal(scaled.double() / (scale / 8), gradient.double())
    if largest > 1e-30:
        assert 32 < float(scaled.abs().max()) <= 64


def test_drawn_targets_follow_from_the_seed_and_the_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of the text's own tokens all the same."""
    of, found = tiny("llama"), []
    for kept, tokens_per_batch, seed in ((True, 30, 5), (True, 30, 5), (False, 1, 5), (False, 30, 6)):
        keep_graphs(monkeypatch, kept)
        found.append(gradients(of, token_lists(), tokens_per_batch, loss="kl", seed=seed))
        assert_near(found[-1].pop("loss"), losses(of), 1e-5)
    first, second, single, other = found
    for name, values in first.items():
        assert torch.equal(second[name], values), name
        assert_near(single[name], values, 1e-5, name)
        changed = (other[name] - values).abs().amax(1) > 1e-3 * values.abs().max()
        assert bool(changed[torch.tensor(LENGTHS) > 4].all()), name


def test_squared_gradients_of_drawn_targets_have_the_fisher_information_as_their_mean() -> None:
    """One document many times over, each copy with targets of its own: `T g²` averages to the information.

    That is `1/T Σ_t Σ_y p(y | x_<t) (∂ log p(y | x_<t) / ∂m)²`, every token of the vocabulary in its turn. Within five
    standard errors of that average, of each unit; they are a few hundredths of it.
    """
    of, ids, copies = tiny("llama", num_hidden_layers=2), token_lists((4,))[0], 3000
    exact = of.double()
    masks = Masks(exact, range(2))
    leaves, total = [*masks.ffn.values(), *masks.heads.values()], torch.zeros(2 * (32 + 6), dtype=torch.float64)
    with masks.hooked():
        logs = exact.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        for log in logs.flatten():
            each = torch.autograd.grad(log, leaves, retain_graph=True)
            total += float(log.detach().exp()) * torch.cat(each).square()
    fisher = total / (len(ids) - 1)
    found = gradients(of, [ids] * copies, 10_000, loss="kl")
    drawn = torch.cat([found[f"{name}.{layer}.value"] for name in ("ffn", "heads") for layer in range(2)], 1).double()
    squares = drawn.square() * (len(ids) - 1)
    error = squares.std(0) / copies**0.5
    assert float((error / fisher).max()) < 0.1
    assert bool(((squares.mean(0) - fisher).abs() < 5 * error).all())
    assert bool((drawn.mean(0).abs() < 5 * drawn.std(0) / copies**0.5).all())  # the expected gradient is zero


class Held:
    """A tensor of a graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def most_saved(of: Tiny, run: Callable[[], object]) -> int:
    """The most bytes that graphs held at any time, weights aside."""
    weights = {parameter.data_ptr() for parameter in of.model.parameters()}
    live, sizes = weakref.WeakSet[Held](), list[int]()

    def held(tensor: Tensor) -> Held:
        one = Held(tensor)
        live.add(one)
        sizes.append(sum(each.tensor.nbytes for each in live if each.tensor.data_ptr() not in weights))
        return one

    with torch.autograd.graph.saved_tensors_hooks(held, lambda each: each.tensor):
        run()
    gc.collect()
    assert not live
    return max(sizes)


def test_no_more_than_one_layers_graph_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_graphs(monkeypatch, False)
    layers, documents = 5, token_lists((30,))
    of = tiny("llama", num_hidden_layers=layers)
    of.model.requires_grad_(False)
    masks = Masks(of, range(layers))

    def whole() -> None:
        with masks.hooked():
            torch.autograd.grad(cross_entropy(of.model, documents[0]), masks.leaves)

    most = 2 * most_saved(of, whole) / layers
    for which in ("language_model", "regional"):
        assert most_saved(of, lambda which=which: measured(of.text(documents, 100), which)) <= most  # type: ignore[misc]


def test_a_pass_leaves_the_model_as_it_was() -> None:
    of = tiny("llama")
    layers, state = of.model.model.layers, {name: tensor.clone() for name, tensor in of.model.state_dict().items()}
    with contextlib.suppress(RuntimeError), head_only(of.model, of.family, torch.zeros(1, 9, 24)):
        assert of.model.model.layers is not layers
        raise RuntimeError("in the middle")
    for which in ("kl", "regional", "forward"):
        measured(of.text(token_lists()), which)
        assert of.model.model.layers is layers
        assert all(parameter.grad is None for parameter in of.model.parameters())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in of.model.modules())
        for name, tensor in of.model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
