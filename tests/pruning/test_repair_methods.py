"""The repair's methods, scopes and weights of tokens, each against a slow reference on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from expertprune.artifacts.plan import Plan
from expertprune.corpora.batches import make_batches
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.pruning.repair import _before_norm
from expertprune.units import KeptUnits
from tests.oracle import load, plan_of, pruned, random_units, resolved, stored_tensors
from tests.pruning.test_repair import (
    Watched,
    duplicate_neurons,
    random_documents,
    repair_input,
    repaired_weights,
    save_changed,
    slow_least_squares,
)
from tests.tiny import save_tiny

PATHS = {"ffn": "mlp.down_proj.weight", "attention": "self_attn.o_proj.weight"}
# Kept in each of three layers.
CUTS: dict[str, list[dict[str, int]]] = {
    "every layer": [{"ffn": 22, "kv_groups": 2}] * 3,
    "layers of their own widths": [{"ffn": 25, "kv_groups": 2}, {"ffn": 20}, {"kv_groups": 1}],
    "the second layer": [{}, {"ffn": 20}, {}],
    "heads of the second layer": [{}, {"heads_per_group": 1}, {}],
}
Array = NDArray[np.float64]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResolvedBase:
    root = tmp_path_factory.mktemp("methods")
    return resolved(save_tiny(root / "base", request.param, max_shard_size="20KB"), root / "store")


def plan(base: ResolvedBase, cut: str, seed: int = 3) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    widths = zip(base.layers, CUTS[cut], strict=True)
    return plan_of(base, [random_units(shape, generator, **kept) for shape, kept in widths])


def cut_blocks(cut: str, layer: int) -> list[str]:
    kept = CUTS[cut][layer]
    return (["attention"] if kept.keys() - {"ffn"} else []) + (["ffn"] if "ffn" in kept else [])


def gradient_energy(model: Any, documents: list[list[int]]) -> list[Array]:
    """Mean square of the gradient of the documents' mean losses at each layer's output, `[all tokens]` per layer.

    In the order of `Watched`: documents of one length run together.
    """
    layers: list[list[Array]] = [[] for _ in model.model.layers]
    for length in sorted({len(ids) for ids in documents}):
        ids = torch.tensor([each for each in documents if len(each) == length])
        outputs: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out))
            for layer in model.model.layers
        ]
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        for handle in handles:
            handle.remove()
        losses = [nn.functional.cross_entropy(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True)]
        for layer, gradient in enumerate(torch.autograd.grad(torch.stack(losses).sum(), outputs)):
            layers[layer].append(gradient.double().square().mean(2).flatten().numpy())
    return [np.concatenate(parts) for parts in layers]


def token_weights_of(how: str, layer: int, target: Tensor, dense_model: Any, documents: list[list[int]]) -> Array:
    if how == "stream":
        return (1 / target.square().mean(1)).numpy()
    if how == "equal":
        return np.ones(target.shape[0])
    return gradient_energy(dense_model, documents)[layer]


# --- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["stream", "equal", "fisher"])
@pytest.mark.parametrize("scope", ["cut", "all"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_repaired_weight_solves_its_ridge_in_the_stream_of_the_expert(
    cut: str, scope: str, tokens: str, base: ResolvedBase, tmp_path: Path
) -> None:
    """Run the written expert: each projection is the slow ridge's answer on what reaches it there."""
    documents = random_documents()
    chosen = plan(base, cut)
    settings = {"scope": scope, "tokens": tokens}
    folder = pruned(chosen, base, tmp_path / "expert", repair_input(base, documents=documents, **settings))
    before = load_model(pruned(chosen, base, tmp_path / "cut"), torch.float32, torch.device("cpu"))
    expert, dense_model = load_model(folder, torch.float32, torch.device("cpu")), load(base.folder)
    ours, dense = Watched(expert, documents), Watched(dense_model, documents)
    behind = False
    for layer in range(3):
        blocks = cut_blocks(cut, layer)
        if scope == "all" and (behind or "attention" in blocks):  # what comes behind a cut is repaired too
            blocks = ["attention", "ffn"]
        behind = behind or bool(blocks)
        for block, path in PATHS.items():
            name = f"model.layers.{layer}.{path}"
            sliced, repaired = before.get_parameter(name).double(), expert.get_parameter(name).double()
            if block not in blocks:
                assert torch.equal(sliced, repaired), name
                continue
            target, reached = dense.stream(layer, block).double(), ours.stream(layer, block).double()
            inputs = ours.inputs(layer, block).double()
            owed = target - (reached - inputs @ (repaired - sliced).T)  # with the columns as they were cut
            weight = token_weights_of(tokens, layer, target, dense_model, documents)
            change = slow_least_squares(inputs.numpy(), owed.numpy(), weight, 0.3)
            np.testing.assert_allclose(
                (repaired - sliced).numpy(), change, atol=3e-3 * np.abs(change).max(), err_msg=name
            )
            assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize("tokens", ["stream", "equal", "fisher"])
@pytest.mark.parametrize("method", ["least_squares", "obs"])
@pytest.mark.parametrize("scope", ["cut", "all"])
def test_with_all_units_kept_nothing_changes(method: str, scope: str, tokens: str, base: ResolvedBase) -> None:
    kept = [shape.all_kept for shape in base.layers]
    batches = make_batches(random_documents(), 256)
    assert repaired_weights(base, kept, batches, method=method, scope=scope, tokens=tokens) == {}


@pytest.mark.parametrize("changes", [{"method": "obs"}, {"scope": "all"}, {"tokens": "equal"}, {"tokens": "fisher"}])
def test_batches_and_padding_do_not_matter(changes: dict[str, str], base: ResolvedBase) -> None:
    documents, kept = random_documents(), plan(base, "layers of their own widths").kept
    alone = repaired_weights(base, kept, make_batches(documents, 1), **changes)
    assert alone
    for tokens, pad in ((100, 0), (100_000, 63)):
        together = repaired_weights(base, kept, make_batches(documents, tokens, pad), **changes)
        assert together.keys() == alone.keys()
        for name, weight in together.items():
            torch.testing.assert_close(weight, alone[name], atol=2e-4, rtol=2e-4)


# --- the optimal brain surgeon's update -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["stream", "equal", "fisher"])
@pytest.mark.parametrize("cut", CUTS)
def test_obs_is_least_squares_on_the_dense_layers_own_inputs(
    cut: str, tokens: str, base: ResolvedBase, tmp_path: Path
) -> None:
    """`W_S + argmin_Δ Σ w ‖W_D x_D − Δ x_S‖² + ridge`, on the inputs of the base, by NumPy's least squares."""
    documents = random_documents()
    chosen = plan(base, cut)
    folder = pruned(
        chosen, base, tmp_path / "expert", repair_input(base, documents=documents, method="obs", tokens=tokens)
    )
    dense_model = load(base.folder)
    dense, stored = Watched(dense_model, documents), stored_tensors(folder)
    for layer, kept in enumerate(chosen.kept):
        target = dense.stream(layer, "ffn").double()
        weight = token_weights_of(tokens, layer, target, dense_model, documents)
        for block, path in PATHS.items():
            columns = dense_model.get_parameter(f"model.layers.{layer}.{path}").double().numpy()
            heads = [4 * head + i for head in kept.query_heads for i in range(4)]
            staying = list(kept.ffn) if block == "ffn" else heads
            going = sorted(set(range(columns.shape[1])) - set(staying))
            inputs = dense.inputs(layer, block).double().numpy()
            change: Array | float = 0.0
            if going:
                owed = inputs[:, going] @ columns[:, going].T
                change = slow_least_squares(inputs[:, staying], owed, weight, 0.3)
                assert np.abs(change).max() > 1e-3
            found = stored[f"model.layers.{layer}.{path}"].double().numpy()
            np.testing.assert_allclose(found, columns[:, staying] + change, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["least_squares", "obs"])
@pytest.mark.parametrize("tokens", ["stream", "equal", "fisher"])
def test_neurons_that_others_can_stand_in_for_leave_without_loss(
    tokens: str, method: str, tmp_path: Path, store: Path
) -> None:
    base = resolved(save_changed(tmp_path / "base", duplicate_neurons), store)
    documents = random_documents(40)
    everything = [shape.all_kept for shape in base.layers]
    chosen = plan_of(base, [KeptUnits(tuple(range(16)), each.query_heads, each.kv_groups) for each in everything])
    dense = Watched(load(base.folder), documents).stream(2, "ffn")
    given = repair_input(base, 1e-5, documents, method=method, tokens=tokens)
    expert = Watched(load(pruned(chosen, base, tmp_path / "expert", given)), documents).stream(2, "ffn")
    plain = Watched(load(pruned(chosen, base, tmp_path / "plain")), documents).stream(2, "ffn")
    assert float((expert - dense).norm() / dense.norm()) < 2e-3
    assert float((plain - dense).norm() / dense.norm()) > 0.1


# --- output norms ---------------------------------------------------------------------------------------------------


def a_norm(gain: Tensor) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(gain.numel(), eps=0.0)
    norm.weight.data.copy_(gain)
    return norm.requires_grad_(False)


def test_what_is_owed_in_front_of_an_output_norm() -> None:
    """Where `γ² (v − c rms/γ)² + m (v − d)²` is least, its derivative is zero; a loud channel does what the stream lacks."""
    rng = np.random.default_rng(0)
    gain = np.array([0.5, 1.5, -1.0, 200.0, 0.8])
    own, dense, residual = (rng.normal(size=(9, 5)) for _ in range(3))
    joined = gain * own / np.sqrt((own**2).mean(1, keepdims=True))
    given = [torch.tensor(values, dtype=torch.float32) for values in (residual, joined, own, dense)]
    owed, rms = _before_norm(a_norm(torch.tensor(gain)), *given)
    expected = np.sqrt((dense**2).mean(1))
    np.testing.assert_allclose(rms.numpy(), expected, rtol=1e-5)
    value, wished = own + owed.double().numpy(), joined + residual
    typical = 1.0  # the median of 0.25, 2.25, 1, 40000 and 0.64
    slope = gain**2 * (value - wished * expected[:, None] / gain) + typical * (value - dense)
    np.testing.assert_allclose(slope / (gain**2 + typical), np.zeros((9, 5)), atol=1e-5)
    np.testing.assert_allclose((gain * value / expected[:, None])[:, 3], wished[:, 3], rtol=1e-3)


def test_a_block_that_gives_what_the_dense_one_does_owes_nothing() -> None:
    torch.manual_seed(0)
    norm, own = a_norm(1 + 0.1 * torch.randn(8)), torch.randn(5, 8)
    owed, _ = _before_norm(norm, torch.zeros(5, 8), norm(own), own, own)
    torch.testing.assert_close(owed, torch.zeros(5, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("quiet", [1e-6, -1e-6, 0.0])
def test_channels_that_the_norm_silences_stay_what_they_are(quiet: float) -> None:
    """They cannot tell in the stream, and as large as they would have to be, they would silence all others."""
    norm = a_norm(torch.tensor([1.0, quiet, 1.0, 1.0, 1.0]))
    own = torch.ones(1, 5)
    residual = torch.tensor([[0.5, 0.3, 0.0, 0.0, 0.0]])
    owed, _ = _before_norm(norm, residual, norm(own), own, own)
    torch.testing.assert_close(owed, torch.tensor([[0.25, 0.0, 0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)
