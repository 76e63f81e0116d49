"""The passes beyond the forward one against autograd on explicit masks, through the whole model's own forward pass."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertprune.arch import families
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
    regional_gradients,
    segment_norms,
    tiny,
    token_lists,
)
from tests.patching import everywhere

WITH_FFN = sorted(name for name, family in families().items() if family.has_ffn)  # experts have no backward pass
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in WITH_FFN),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
]
EACH_MODEL = pytest.mark.parametrize(
    ("family", "changes"), MODELS, ids=["-".join([family, *list(changes)[:1]]) for family, changes in MODELS]
)
BATCHED = [1, 30, 10_000]


@pytest.fixture(autouse=True)
def _not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay in float32, so that they compare closer than half precision allows."""
    everywhere(monkeypatch, "expertprune.artifacts.profile.halved", lambda name, values: {name: values})


@pytest.fixture
def no_graphs_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for the graphs of all layers, so layers are run again."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)


def gradients(
    of: Tiny, documents: list[list[int]], tokens_per_batch: int = 30, loss: str = "language_model", seed: int = 0
) -> dict[str, Tensor]:
    return measured(of.text(documents, tokens_per_batch), loss, seed)


def with_groups(found: dict[str, Tensor], of: Tiny) -> dict[str, Tensor]:
    """`ffn.0.value` as `ffn.0`, and KV groups as the sums of their heads, head by head; no losses."""
    result = {name.removesuffix(".value"): tensor for name, tensor in found.items() if name.endswith(".value")}
    for layer, shape in enumerate(of.shapes):
        heads = result[f"heads.{layer}"]
        groups = torch.zeros(heads.shape[0], shape.kv_heads)
        for head in range(shape.query_heads):
            groups[:, head // shape.heads_per_group] += heads[:, head]
        result[f"groups.{layer}"] = groups
    return result


@pytest.mark.parametrize("kept", [True, False], ids=["graphs-kept", "run-again"])
@pytest.mark.parametrize("loss", ["language_model", "kl"])
def test_the_loss_is_that_of_each_documents_own_tokens(loss: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 0 if kept else 1 << 60)
    of, documents = tiny("llama"), token_lists()
    expected = torch.stack([cross_entropy(of.model, ids).detach() for ids in documents])
    for tokens_per_batch in BATCHED:
        assert_near(gradients(of, documents, tokens_per_batch, loss)["loss"], expected, 1e-5)


# --- the whole model ------------------------------------------------------------------------------------------------


@EACH_MODEL
@pytest.mark.parametrize("kept", [True, False], ids=["graphs-kept", "run-again"])
def test_gradients_equal_autograd_on_explicit_masks_however_batches_are_cut(
    family: str, changes: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 0 if kept else 1 << 60)
    of, documents = tiny(family, **changes), token_lists()
    expected = mask_gradients(of, documents)
    for tokens_per_batch in BATCHED:
        found = with_groups(gradients(of, documents, tokens_per_batch), of)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert_near(found[name], values, 1e-5, f"{name}, {tokens_per_batch} tokens in a batch")


@EACH_MODEL
@pytest.mark.parametrize("kept", [True, False], ids=["graphs-kept", "run-again"])
def test_norms_equal_autograd_on_a_mask_for_each_segment(
    family: str, changes: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 0 if kept else 1 << 60)
    monkeypatch.setattr("expertprune.profiling.gradients.SEGMENT", 4)
    of, documents = tiny(family, **changes), token_lists()
    expected = segment_norms(of, documents, 4)
    for tokens_per_batch in BATCHED:
        found = gradients(of, documents, tokens_per_batch)
        assert {name for name in found if name.endswith(".norm")} == {f"{name}.norm" for name in expected}
        for name, values in expected.items():
            assert_near(found[f"{name}.norm"], values, 1e-5, f"{name}, {tokens_per_batch} tokens in a batch")


@pytest.mark.parametrize("loss", ["language_model", "kl"])
def test_a_few_positions_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    of, seen = tiny("llama"), []
    whole = gradients(of, token_lists(), loss=loss)
    of.model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0] * logits.shape[1]))
    for positions, tokens_per_batch in ((1, 30), (3, 1), (12, 30)):
        monkeypatch.setattr(passes, "LOGITS", 64 * positions)
        seen.clear()
        cut = gradients(of, token_lists(), tokens_per_batch, loss=loss)
        assert max(seen) <= max(positions, len(LENGTHS))  # one of each document at least
        for name, values in whole.items():
            assert_near(cut[name], values, 1e-5, name)


def of_masks(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the documents' losses, which are no gradients."""
    return {name: values for name, values in found.items() if name != "loss"}


def test_half_precision_keeps_gradients_that_are_small() -> None:
    """A loud residual stream and a quiet head: a gradient of the mean loss is near 1e-8, and 6e-8 is the smallest number."""

    def quiet(dtype: torch.dtype) -> dict[str, Tensor]:
        of = tiny("llama")
        with torch.no_grad():
            of.model.model.embed_tokens.weight.mul_(5000)
            of.model.model.norm.weight.mul_(1e-3)
        of.model.half().to(dtype)  # the same weights in both
        return of_masks(gradients(of, token_lists((100, 60)), 1000))

    exact, half = quiet(torch.float32), quiet(torch.float16)
    for name, values in exact.items():
        assert 0 < float(values.abs().max()) < 1e-3, name
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


# --- against the model's own predictions ----------------------------------------------------------------------------


def test_drawn_targets_follow_from_the_seed_and_the_document_alone() -> None:
    of = tiny("llama")
    first, second, single, other = (
        of_masks(gradients(of, token_lists(), tokens_per_batch, loss="kl", seed=seed))
        for tokens_per_batch, seed in ((30, 5), (30, 5), (1, 5), (30, 6))
    )
    for name, values in first.items():
        assert torch.equal(second[name], values), name
        assert_near(single[name], values, 1e-5, name)
        changed = (other[name] - values).abs().amax(1) > 1e-3 * values.abs().max()
        assert bool(changed[torch.tensor(LENGTHS) > 4].all()), name


def exact_fisher(of: Tiny, ids: list[int]) -> Tensor:
    """`1/T Σ_t Σ_y p(y | x_<t) (∂ log p(y | x_<t) / ∂m)²`, every token of the vocabulary in its turn, all masks in a row."""
    exact = of.double()
    masks = Masks(exact, range(len(of.shapes)))
    total = torch.zeros(sum(leaf.numel() for leaf in masks.leaves), dtype=torch.float64)
    with masks.hooked():
        logs = exact.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        for position in logs:
            for log in position:
                each = torch.autograd.grad(log, masks.leaves, retain_graph=True)
                total += float(log.detach().exp()) * torch.cat([gradient.flatten() for gradient in each]).square()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_squared_gradients_of_drawn_targets_have_the_fisher_information_as_their_mean(family: str) -> None:
    """One document many times over, each copy with targets of its own: `T g²` averages to the information.

    Within five standard errors of that average, of each unit; they are a few hundredths of it.
    """
    of, ids, copies = tiny(family), token_lists((5,))[0], 4000
    fisher = exact_fisher(of, ids)
    found = with_groups(gradients(of, [ids] * copies, 10_000, loss="kl"), of)
    drawn = torch.cat([found[name].double() for name in Masks(of, range(len(of.shapes))).names()], 1)
    squares = drawn.square() * (len(ids) - 1)
    error = squares.std(0) / copies**0.5
    assert float((error / fisher).max()) < 0.1
    assert bool(((squares.mean(0) - fisher).abs() < 5 * error).all())
    assert bool((drawn.mean(0).abs() < 5 * drawn.std(0) / copies**0.5).all())  # the expected gradient is zero


# --- each layer alone -----------------------------------------------------------------------------------------------


@EACH_MODEL
def test_regional_gradients_equal_those_of_the_whole_model_with_one_layer_masked(
    family: str, changes: dict[str, Any]
) -> None:
    of, documents = tiny(family, **changes), token_lists()
    expected = regional_gradients(of, documents)
    for tokens_per_batch in BATCHED:
        found = with_groups(measured(of.text(documents, tokens_per_batch), "regional"), of)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert_near(found[name], values, 1e-5, f"{name}, {tokens_per_batch} tokens in a batch")


# --- what is held, and what is left behind --------------------------------------------------------------------------


class Saved:
    """Counts the bytes that graphs hold, weights aside: those that live now, and the most that ever did."""

    def __init__(self, model: Any) -> None:
        self.weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.live = self.peak = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        counter = self

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                self.bytes = 0 if tensor.data_ptr() in counter.weights else tensor.numel() * tensor.element_size()
                counter.live += self.bytes
                counter.peak = max(counter.peak, counter.live)

            def __del__(self) -> None:
                counter.live -= self.bytes

        return torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)


def most_saved(of: Tiny, run: Callable[[], object]) -> int:
    saved = Saved(of.model)
    with saved.hooks():
        run()
    gc.collect()
    assert saved.live == 0
    return saved.peak


@pytest.mark.parametrize("which", ["language_model", "regional"])
@pytest.mark.usefixtures("no_graphs_kept")
def test_no_more_than_one_layers_graph_is_held(which: str) -> None:
    layers, documents = 12, token_lists((30,))
    of = tiny("llama", num_hidden_layers=layers)
    of.model.requires_grad_(False)
    masks = Masks(of, range(layers))

    def whole() -> None:
        with masks.hooked():
            torch.autograd.grad(cross_entropy(of.model, documents[0]), masks.leaves)

    def by_layer() -> None:
        text = of.text(documents, 100)
        measured(text, which)

    assert most_saved(of, by_layer) <= 2 * most_saved(of, whole) / layers


def test_a_pass_leaves_the_model_as_it_was() -> None:
    of = tiny("llama")
    state = {name: tensor.clone() for name, tensor in of.model.state_dict().items()}
    for which in ("kl", "regional", "forward"):
        measured(of.text(token_lists()), which)
        assert all(parameter.grad is None for parameter in of.model.parameters())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in of.model.modules())
        for name, tensor in of.model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


# --- the output head alone ------------------------------------------------------------------------------------------


def test_an_error_with_the_head_alone_puts_the_layers_back() -> None:
    of = tiny("llama")
    layers = of.model.model.layers
    with contextlib.suppress(RuntimeError), head_only(of.model, of.family, torch.zeros(1, 9, 24)):
        assert of.model.model.layers is not layers
        raise RuntimeError("in the middle")
    assert of.model.model.layers is layers
    assert len(layers) == len(of.shapes)
