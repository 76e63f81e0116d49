"""Peer methods on tiny models, each against a slow reference in NumPy, document by document."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench import peers
from bench.peers.least_squares import RIDGE
from bench.peers.linear_map import RIDGE as MAP_RIDGE
from bench.peers.nystrom import MOST, TEMPERATURE, shared
from bench.peers.residual_slicing import slice_to
from bench.peers.rising import rising
from expertprune.corpora.batches import Batch, make_batches
from tests.tiny import WIDTHS, tiny_model

FFN, LAYERS, HIDDEN = WIDTHS["intermediate_size"], WIDTHS["num_hidden_layers"], WIDTHS["hidden_size"]
FRACTION, WANTED = 0.25, 8  # of 32 neurons
NEURON = 3 * HIDDEN  # a gate row, an up row, a down column
VARIANTS = ["biases, tied", "four norms"]
Floats = NDArray[np.float64]


def make(variant: str = "plain", seed: int = 0, **changes: Any) -> Any:
    if variant == "four norms":
        return tiny_model("gemma3", seed, layer_types=None, **changes).requires_grad_(False)
    if variant == "biases, tied":
        changes = {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True, **changes}
    return tiny_model("llama", seed, **changes).requires_grad_(False)


def make_text(per_batch: int = 40) -> list[Batch]:
    """Five documents of unlike lengths: with 40 tokens a batch, some are padded."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 64, (n,), generator=generator).tolist() for n in (9, 14, 20, 13, 7)]
    return make_batches(texts, per_batch)


def documents(batches: list[Batch]) -> list[torch.Tensor]:
    return [batch.ids[row, :n] for batch in batches for row, n in enumerate(batch.lengths)]


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = documents(make_text())[-1] if ids is None else ids
    return model(input_ids=ids[None], use_cache=False).logits[0]


def inputs_of(model: Any, batches: list[Batch], path: str) -> list[Floats]:
    """The inputs of each layer's submodule, `[tokens, channels]`, document by document."""
    return inputs_of_modules(model, batches, [layer.get_submodule(path) for layer in model.model.layers])


def inputs_of_modules(model: Any, batches: list[Batch], modules: list[Any]) -> list[Floats]:
    seen: dict[Any, list[Floats]] = {module: [] for module in modules}
    handles = [
        module.register_forward_pre_hook(lambda m, x: seen[m].append(x[0][0].double().numpy())) for module in seen
    ]
    for ids in documents(batches):
        logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return [np.concatenate(seen[module]) for module in modules]


def states_of(model: Any, batches: list[Batch]) -> list[Floats]:
    """The hidden states before each layer, and behind the last."""
    norms = [layer.input_layernorm for layer in model.model.layers]
    return inputs_of_modules(model, batches, [*norms, model.model.norm])


def influences(model: Any, batches: list[Batch]) -> Floats:
    """One minus the mean cosine of each layer's input and output over tokens, `[layers]`."""
    states = states_of(model, batches)
    pairs = itertools.pairwise(states)
    return np.array([1 - ((x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))).mean() for x, y in pairs])


def down(model: Any, layer: int) -> Floats:
    return model.model.layers[layer].mlp.down_proj.weight.detach().double().numpy()


def kept_units(before: Any, after: Any) -> list[list[int]]:
    """Which neurons each layer kept, found by their gate rows."""
    result = []
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        rows = old.mlp.gate_proj.weight[None] == new.mlp.gate_proj.weight[:, None]
        result.append(rows.all(-1).nonzero()[:, 1].tolist())
        assert len(result[-1]) == len(new.mlp.gate_proj.weight)
    return result


def without(scores: Floats, count: int) -> list[int]:
    """Positions, ascending, of all but the `count` smallest of one layer's scores."""
    return sorted(sorted(range(len(scores)), key=lambda j: scores[j])[count:])


def silence(model: Any, layer: int, units: list[int]) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[:, units] = 0


def check_sliced(before: Any, after: Any, kept: list[list[int]]) -> None:
    """The FFN's tensors are the old ones at the kept neurons, and the model runs as silenced."""
    old = copy.deepcopy(before)
    for index, units in enumerate(kept):
        was, now = before.model.layers[index].mlp, after.model.layers[index].mlp
        assert torch.equal(now.gate_proj.weight, was.gate_proj.weight[units])
        assert torch.equal(now.up_proj.weight, was.up_proj.weight[units])
        assert torch.equal(now.down_proj.weight, was.down_proj.weight[:, units])
        assert (now.down_proj.in_features, now.gate_proj.out_features) == (len(units), len(units))
        if was.gate_proj.bias is not None:
            assert torch.equal(now.gate_proj.bias, was.gate_proj.bias[units])
            assert torch.equal(now.up_proj.bias, was.up_proj.bias[units])
        silence(old, index, [j for j in range(FFN) if j not in units])
        if now.down_proj.bias is not None:
            old.model.layers[index].mlp.down_proj.bias = now.down_proj.bias
    torch.testing.assert_close(logits_of(after), logits_of(old), rtol=0, atol=1e-5)


def removed_by(variant: str, neurons: int) -> int:
    return neurons * (NEURON + (2 if variant == "biases, tied" else 0))


# --- the yardsticks -------------------------------------------------------------------------------


def test_magnitude_drops_the_smallest_norms() -> None:
    model = make("biases, tied")
    before = copy.deepcopy(model)
    pruned, removed = peers.magnitude(model, make_text(), FRACTION)
    expected = []
    for layer in before.model.layers:
        gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
        rows = [gate.weight, up.weight, layer.mlp.down_proj.weight.T, gate.bias[:, None], up.bias[:, None]]
        expected.append(without(torch.cat(rows, 1).double().norm(dim=1).numpy(), WANTED))
    assert pruned is model
    assert kept_units(before, pruned) == expected
    assert removed == removed_by("biases, tied", WANTED * LAYERS)
    check_sliced(before, pruned, expected)


def test_random_follows_its_seed_and_nothing_else() -> None:
    chosen = {}
    for seed, per_batch in [(0, 40), (0, 1), (1, 40)]:
        model = make()
        before = copy.deepcopy(model)
        pruned, removed = peers.random(model, make_text(per_batch), FRACTION, seed)
        chosen[seed, per_batch] = kept_units(before, pruned)
        assert removed == WANTED * LAYERS * NEURON
        assert [len(units) for units in chosen[seed, per_batch]] == [FFN - WANTED] * LAYERS
    assert chosen[0, 40] == chosen[0, 1] != chosen[1, 40]
    assert chosen[0, 40][0] != chosen[0, 40][1]


# --- Wanda-sp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_wanda_sp_scores_each_layer_on_the_cut_prefix(variant: str) -> None:
    model, batches = make(variant), make_text()
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    pruned, removed = peers.wanda_sp(model, batches, FRACTION)
    expected = []
    for layer in range(LAYERS):
        inputs, weight = inputs_of(reference, batches, "mlp.down_proj")[layer], down(before, layer)
        scores = np.abs(weight).sum(0) * np.sqrt((inputs**2).sum(0))
        expected.append(without(scores, WANTED))
        silence(reference, layer, [j for j in range(FFN) if j not in expected[-1]])
    assert kept_units(before, pruned) == expected
    assert removed == removed_by(variant, WANTED * LAYERS)
    check_sliced(before, pruned, expected)


# --- FLAP -----------------------------------------------------------------------------------------


def flap_scores(model: Any, batches: list[Batch]) -> tuple[list[Floats], list[Floats]]:
    """Standardized fluctuation and mean of each layer's neurons over single tokens."""
    scores, means = [], []
    for layer, inputs in enumerate(inputs_of(model, batches, "mlp.down_proj")):
        means.append(inputs.mean(0))
        raw = inputs.var(0) * (down(model, layer) ** 2).sum(0)
        scores.append((raw - raw.mean()) / raw.std(ddof=1))
    return scores, means


@pytest.mark.parametrize("variant", VARIANTS)
def test_flap_ranks_all_layers_together_and_gives_the_mean_back(variant: str) -> None:
    model, batches = make(variant), make_text()
    before = copy.deepcopy(model)
    pruned, removed = peers.flap(model, batches, FRACTION)
    scores, means = flap_scores(before, batches)
    ranking = sorted((scores[layer][j], layer, j) for layer in range(LAYERS) for j in range(FFN))
    dropped = [(layer, j) for _, layer, j in ranking[: WANTED * LAYERS]]
    expected = [[j for j in range(FFN) if (layer, j) not in dropped] for layer in range(LAYERS)]
    assert kept_units(before, pruned) == expected
    assert len({len(units) for units in expected}) > 1  # else a uniform cut would pass
    new_biases = 0
    for layer in range(LAYERS):
        gone = [j for j in range(FFN) if j not in expected[layer]]
        bias = down(before, layer)[:, gone] @ means[layer][gone]
        old, new = before.model.layers[layer].mlp.down_proj, pruned.model.layers[layer].mlp.down_proj
        if old.bias is not None:
            bias = bias + old.bias.double().numpy()
        else:
            new_biases += HIDDEN
        np.testing.assert_allclose(new.bias.numpy(), bias, rtol=1e-5, atol=1e-6)
    assert removed == removed_by(variant, WANTED * LAYERS) - new_biases
    check_sliced(before, pruned, expected)


def test_flap_leaves_a_layer_alone_that_loses_nothing() -> None:
    model, batches = make(), make_text()
    with torch.no_grad():  # one giant neuron: the others lie close below their layer's mean
        model.model.layers[1].mlp.down_proj.weight[:, 5] *= 1000
    before = copy.deepcopy(model)
    pruned, removed = peers.flap(model, batches, 1 / FFN)  # three neurons of the whole model
    kept = kept_units(before, pruned)
    assert kept[1] == list(range(FFN))
    assert pruned.model.layers[1].mlp.down_proj.bias is None
    touched = sum(len(units) < FFN for units in kept)
    assert removed == 3 * NEURON - touched * HIDDEN


@pytest.mark.parametrize("variant", ["plain", "biases, tied"])
def test_flap_with_heads_cuts_nearest_to_the_wanted_parameters(variant: str) -> None:
    model, batches = make(variant), make_text()
    with torch.no_grad():  # quiet heads: a group of two in layer 1, one head of a group in layer 2
        model.model.layers[1].self_attn.o_proj.weight[:, :8] *= 0.01
        model.model.layers[2].self_attn.o_proj.weight[:, 12:16] *= 0.01
    before = copy.deepcopy(model)
    pruned, removed = peers.flap(model, batches, 0.5, heads=True)
    scores, _ = flap_scores(before, batches)
    heads, groups, width = 6, 3, 4
    biased = variant == "biases, tied"
    neuron, head, kv = NEURON + 2 * biased, 2 * width * HIDDEN + width * biased, 2 * width * (HIDDEN + biased)
    ranking = [(scores[layer][j], layer, "neuron", j) for layer in range(LAYERS) for j in range(FFN)]
    means = []
    for layer, inputs in enumerate(inputs_of(before, batches, "self_attn.o_proj")):
        weight = before.model.layers[layer].self_attn.o_proj.weight.double().numpy()
        raw = (inputs.var(0) * (weight**2).sum(0)) ** 2
        means.append(inputs.mean(0))
        z = (raw - raw.mean()) / raw.std(ddof=1)
        ranking += [(z[h * width : (h + 1) * width].mean(), layer, "head", h) for h in range(heads)]
    ranking.sort()
    removed_after, left = [0], {(layer, g): heads // groups for layer in range(LAYERS) for g in range(groups)}
    for _, layer, kind, unit in ranking:
        cost = neuron
        if kind == "head":
            left[layer, unit // 2] -= 1
            cost = head + (kv if left[layer, unit // 2] == 0 else 0)
        removed_after.append(removed_after[-1] + cost)
    target = FFN // 2 * LAYERS * neuron
    count = min(range(len(removed_after)), key=lambda n: abs(removed_after[n] - target))
    gone_heads = [(layer, unit) for _, layer, kind, unit in ranking[:count] if kind == "head"]
    assert {(1, 0), (1, 1), (2, 3)} <= set(gone_heads)
    dropped = [(layer, unit) for _, layer, kind, unit in ranking[:count] if kind == "neuron"]
    expected = [[j for j in range(FFN) if (layer, j) not in dropped] for layer in range(LAYERS)]
    assert kept_units(before, pruned) == expected
    biases = 0
    for layer in range(LAYERS):
        old, new = before.model.layers[layer].self_attn.o_proj, pruned.model.layers[layer].self_attn.o_proj
        channels = [h * width + c for of, h in sorted(gone_heads) if of == layer for c in range(width)]
        weight = old.weight.clone()
        weight[:, channels] = 0
        assert torch.equal(new.weight, weight)
        if channels:
            bias = old.weight.double().numpy()[:, channels] @ means[layer][channels]
            bias = bias + (old.bias.double().numpy() if biased else 0)
            np.testing.assert_allclose(new.bias.numpy(), bias, rtol=1e-5, atol=1e-6)
        biases += HIDDEN * (bool(channels) + (len(expected[layer]) < FFN)) * (not biased)
    assert removed == removed_after[count] - biases


# --- least squares behind a selector --------------------------------------------------------------


def ridge_fit(inputs: Floats, kept: list[int], ridge: float) -> Floats:
    """The transposed map of the least `‖X − X_k Bᵀ‖² + λ‖B‖²`, by rows added to the system."""
    few = inputs[:, kept]
    rows = np.sqrt(ridge * (few**2).sum() / len(kept)) * np.eye(len(kept))
    wanted = np.concatenate([inputs, np.zeros((len(kept), FFN))])
    return np.linalg.lstsq(np.concatenate([few, rows]), wanted, rcond=None)[0]


def check_replaced(after: Any, reference: Any, layer: int, kept: list[int], weight: Floats, bias: Any) -> None:
    """A layer's FFN has this output projection, which the reference then has too."""
    new, old = after.model.layers[layer].mlp, reference.model.layers[layer].mlp
    np.testing.assert_allclose(new.down_proj.weight.numpy(), weight, rtol=2e-3, atol=1e-5)
    assert torch.equal(new.up_proj.weight, old.up_proj.weight[kept])
    silence(reference, layer, list(range(FFN)))
    with torch.no_grad():
        old.down_proj.weight[:, kept] = torch.tensor(weight, dtype=torch.float32)
    if bias is None:
        assert new.down_proj.bias is None
    else:
        np.testing.assert_allclose(new.down_proj.bias.numpy(), bias, rtol=2e-3, atol=1e-5)
        old.down_proj.bias = torch.nn.Parameter(torch.tensor(bias, dtype=torch.float32), requires_grad=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wanda_sp_with_least_squares_fits_each_layer_on_the_replaced_prefix(variant: str) -> None:
    model, batches = make(variant), make_text()
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    pruned, removed = peers.wanda_sp_least_squares(model, batches, FRACTION)
    found = kept_units(before, pruned)
    for layer in range(LAYERS):
        inputs, weight = inputs_of(reference, batches, "mlp.down_proj")[layer], down(before, layer)
        kept = without(np.abs(weight).sum(0) * np.sqrt((inputs**2).sum(0)), WANTED)
        assert found[layer] == kept
        old = before.model.layers[layer].mlp.down_proj.bias
        bias = None if old is None else old.double().numpy()
        check_replaced(pruned, reference, layer, kept, weight @ ridge_fit(inputs, kept, RIDGE).T, bias)
    assert removed == removed_by(variant, WANTED * LAYERS)
    torch.testing.assert_close(logits_of(pruned), logits_of(reference), rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flap_with_least_squares_fits_about_the_means(variant: str) -> None:
    model, batches = make(variant), make_text()
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    selected, removed_by_flap = peers.flap(copy.deepcopy(model), batches, FRACTION)
    expected = kept_units(before, selected)
    pruned, removed = peers.flap_least_squares(model, batches, FRACTION)
    assert kept_units(before, pruned) == expected
    assert removed == removed_by_flap
    for layer, kept in enumerate(expected):
        inputs, weight = inputs_of(reference, batches, "mlp.down_proj")[layer], down(before, layer)
        mean = inputs.mean(0)
        # A layer that loses nothing stays as it is.
        fit = ridge_fit(inputs - mean, kept, RIDGE) if len(kept) < FFN else np.eye(FFN)
        old = before.model.layers[layer].mlp.down_proj.bias
        bias = weight @ (mean - mean[kept] @ fit) + (0 if old is None else old.double().numpy())
        bias = bias if old is not None or len(kept) < FFN else None
        check_replaced(pruned, reference, layer, kept, weight @ fit.T, bias)
    torch.testing.assert_close(logits_of(pruned), logits_of(reference), rtol=0, atol=1e-3)


# --- MoDeGPT --------------------------------------------------------------------------------------


def test_modegpt_keeps_the_highest_leverage_and_repairs_by_nystrom() -> None:
    model, batches = make("biases, tied"), make_text()
    before = copy.deepcopy(model)
    pruned, removed = peers.modegpt(model, batches, FRACTION)
    found = kept_units(before, pruned)
    for layer, inputs in enumerate(inputs_of(before, batches, "mlp.down_proj")):
        _, values, axes = np.linalg.svd(inputs, full_matrices=False)
        shares = values**2 / (values**2 + (inputs**2).sum() / FFN)
        scores = (axes**2 * shares[:, None]).sum(0)
        kept = found[layer]
        assert kept == without(scores, FFN - len(kept))
        # Nyström: the best output from the kept neurons, `min ‖X W − X_k V‖`, without a ridge.
        weight = np.linalg.lstsq(inputs[:, kept], inputs @ down(before, layer).T, rcond=None)[0].T
        new = pruned.model.layers[layer].mlp.down_proj
        np.testing.assert_allclose(new.weight.numpy(), weight, rtol=1e-2, atol=2e-4)
        assert torch.equal(new.bias, before.model.layers[layer].mlp.down_proj.bias)
    assert FFN * LAYERS - sum(map(len, found)) == WANTED * LAYERS
    assert removed == removed_by("biases, tied", WANTED * LAYERS)
    lost = [FFN - len(kept) for kept in found]
    np.testing.assert_allclose(lost, softmax_shares(influences(before, batches)), rtol=0, atol=1)


def softmax_shares(influence: Floats) -> Floats:
    weights = np.exp(-influence / TEMPERATURE)
    return np.asarray(WANTED * len(influence) * weights / weights.sum())


def test_modegpt_shares_what_a_full_layer_cannot_lose() -> None:
    # exp(0) : exp(-1) : exp(-9) of 36 would be 26.3, 9.7 and 0: the first may lose 0.95 of 20.
    influence = TEMPERATURE * torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    assert int(MOST * 20) == 19
    # The other two share 17 as 1 : exp(-8).
    assert shared(influence, 12, 20) == [19, 17, 0]


# --- SlimGPT --------------------------------------------------------------------------------------


def greedily(inputs: Floats, weight: Floats, count: int) -> list[int]:
    """Takes `count` neurons one by one, each time the one without which least squares is worst off least."""
    rows = np.concatenate([inputs, np.sqrt(RIDGE * (inputs**2).sum() / FFN) * np.eye(FFN)])
    wanted, kept = rows @ weight.T, list(range(FFN))

    def error(units: list[int]) -> float:
        fit = np.linalg.lstsq(rows[:, units], wanted, rcond=None)[0]
        return float(((wanted - rows[:, units] @ fit) ** 2).sum())

    for _ in range(count):
        kept.remove(min(kept, key=lambda j: error([k for k in kept if k != j])))
    return kept


def test_slimgpt_takes_the_least_error_at_ratios_that_rise() -> None:
    model, batches = make("biases, tied"), make_text()
    before, reference = copy.deepcopy(model), copy.deepcopy(model)
    pruned, removed = peers.slimgpt(model, batches, FRACTION)
    found = kept_units(before, pruned)
    # 2 + (x − 2) log(l + 1) / log 3 for l = 0, 1, 2 is 2, 0.369 · 2 + 0.631 x, x: together 24, so x is 13.03.
    for layer, lost in enumerate((2, 9, 13)):
        inputs, weight = inputs_of(reference, batches, "mlp.down_proj")[layer], down(before, layer)
        assert found[layer] == greedily(inputs, weight, lost)
        old = before.model.layers[layer].mlp.down_proj.bias.double().numpy()
        check_replaced(pruned, reference, layer, found[layer], weight @ ridge_fit(inputs, found[layer], RIDGE).T, old)
    assert removed == removed_by("biases, tied", WANTED * LAYERS)
    # The published example: 20% of LLaMA-7B's 11,008 neurons in 32 layers, from 0.0625 to 0.25.
    lost_by = rising(round(0.2 * 11008), 11008, 32)
    assert lost_by[0] == 0.0625 * 11008
    assert lost_by[-1] / 11008 == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(ValueError, match="leave the last layer nothing"):
        rising(24, 32, 3)


# --- ReplaceMe ------------------------------------------------------------------------------------


def test_replaceme_puts_a_linear_map_in_place_of_the_nearest_layers() -> None:
    layers, number = 6, 2
    model, batches = make("biases, tied", num_hidden_layers=layers), make_text()
    before = copy.deepcopy(model)
    states = states_of(before, batches)

    def distance(first: int) -> float:
        x, z = states[first], states[first + number]
        return float(1 - ((x * z).sum(1) / np.sqrt((x**2).sum(1) * (z**2).sum(1))).mean())

    size = sum(p.numel() for p in before.model.layers[0].parameters())
    fraction = 15 / 32
    assert round(layers * removed_by("biases, tied", 15) / size) == number
    pruned, removed = peers.replaceme(model, batches, fraction)
    first = min(range(1, layers - number + 1), key=distance)
    assert removed == number * size
    gone = [not list(layer.parameters()) for layer in pruned.model.layers]
    assert gone == [first <= i < first + number for i in range(layers)]
    old, new = (each.model.layers[first - 1].mlp.down_proj for each in (before, pruned))
    written = inputs_of(before, batches, "mlp.down_proj")[first - 1] @ down(before, first - 1).T
    written = written + old.bias.double().numpy()
    rows = np.sqrt(MAP_RIDGE * (written**2).sum() / HIDDEN) * np.eye(HIDDEN)
    wanted = states[first + number] - (states[first] - written)
    map_ = np.linalg.lstsq(
        np.concatenate([written, rows]), np.concatenate([wanted, np.zeros((HIDDEN, HIDDEN))]), rcond=None
    )[0].T
    np.testing.assert_allclose(new.weight.numpy(), map_ @ down(before, first - 1), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(new.bias.numpy(), map_ @ old.bias.double().numpy(), rtol=1e-2, atol=1e-4)


def test_replaceme_refuses_a_norm_behind_the_block() -> None:
    with pytest.raises(ValueError, match="a norm stands behind it"):
        peers.replaceme(make("four norms"), make_text(), FRACTION)


# --- LLM-Pruner -----------------------------------------------------------------------------------


def loss_of(model: Any, batches: list[Batch]) -> torch.Tensor:
    total = torch.zeros(())
    for ids in documents(batches):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total - torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].sum()
    return total


def taylor(model: Any, batches: list[Batch]) -> list[Floats]:
    """`Σ |w · ∂L/∂w|` neuron by neuron, from one backward pass of the whole loss."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_of(model, batches).backward()
    scores = []
    for layer in model.model.layers:
        gate, up, back = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj.weight
        found = (back * back.grad).abs().sum(0)
        for weight in (gate.weight, up.weight):
            found = found + (weight * weight.grad).abs().sum(1)
        for bias in [bias for bias in (gate.bias, up.bias) if bias is not None]:
            found = found + (bias * bias.grad).abs()
        scores.append(found.detach().double().numpy())
    return scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_llm_pruner_sums_the_taylor_terms_of_a_neurons_weights(variant: str) -> None:
    model, batches = make(variant), make_text()
    before = copy.deepcopy(model)
    expected = [without(scores, WANTED) for scores in taylor(model, batches)]
    pruned, removed = peers.llm_pruner_taylor(model, batches, FRACTION)
    # With three layers none is an inner one, so all are cut alike.
    assert kept_units(before, pruned) == expected
    assert removed == removed_by(variant, WANTED * LAYERS)
    assert not any(p.requires_grad or p.grad is not None for p in pruned.parameters())
    check_sliced(before, pruned, expected)


def test_llm_pruner_takes_the_better_of_all_and_inner_layers() -> None:
    batches, chosen = make_text(), []
    for seed in (0, 4):
        model = make(seed=seed, num_hidden_layers=9)
        before = copy.deepcopy(model)
        scores = taylor(model, batches)
        # Nine layers lose 8 of 32 each, or layers 4, 5 and 6 lose 24 each.
        cuts = {"all": [8] * 9, "inner": [0, 0, 0, 0, 24, 24, 24, 0, 0]}
        kept, loss = {}, {}
        for name, counts in cuts.items():
            kept[name] = [without(*pair) for pair in zip(scores, counts, strict=True)]
            silenced = copy.deepcopy(before)
            for layer, units in enumerate(kept[name]):
                silence(silenced, layer, [j for j in range(FFN) if j not in units])
            loss[name] = float(loss_of(silenced, batches))
        chosen.append(min(cuts, key=loss.__getitem__))
        pruned, removed = peers.llm_pruner_taylor(model, batches, FRACTION)
        assert kept_units(before, pruned) == kept[chosen[-1]]
        assert removed == 72 * NEURON
    assert chosen == ["all", "inner"]  # else always taking the same would pass


# --- ShortGPT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_shortgpt_removes_the_layers_of_least_influence(variant: str) -> None:
    layers = 6
    model, batches = make(variant, num_hidden_layers=layers), make_text()
    before = copy.deepcopy(model)
    influence = influences(before, batches)
    size = sum(p.numel() for p in before.model.layers[0].parameters())
    target = layers * removed_by(variant, 26)  # of 32 neurons
    count = round(target / size)
    assert 1 < count < layers
    pruned, removed = peers.shortgpt(model, batches, 26 / 32)
    gone = sorted(range(layers), key=lambda index: influence[index])[:count]
    assert removed == count * size
    assert [not list(layer.parameters()) for layer in pruned.model.layers] == [i in gone for i in range(layers)]
    # a stock model of the layers that are left computes the same
    config = copy.deepcopy(before.config)
    config.num_hidden_layers = layers - count
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for i, kind in enumerate(config.layer_types) if i not in gone]
    short = type(before)(config).eval()
    short.load_state_dict(before.state_dict(), strict=False)
    for new, old in zip(short.model.layers, [i for i in range(layers) if i not in gone], strict=True):
        new.load_state_dict(before.model.layers[old].state_dict())
    torch.testing.assert_close(logits_of(pruned), logits_of(short), rtol=0, atol=1e-5)


# --- SliceGPT -------------------------------------------------------------------------------------


def count(model: Any) -> int:
    """Parameters of the model in memory, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def slow_slicegpt(model: Any, batches: list[Batch], width: int) -> Floats:
    """Logits of the last document by the paper's construction, projected in the original basis.

    Slicing in a rotated basis is projecting the stream onto the kept axes wherever it changes its
    basis, and taking the norm of the projected stream over the original width: nothing needs to be
    rotated to say so.
    """
    texts = documents(batches)
    layers = model.model.layers

    def project(streams: list[Floats], keep: int) -> list[Floats]:
        values, vectors = np.linalg.eigh(sum(x.T @ x for x in streams))
        axes = vectors[:, np.argsort(-values)[:keep]]
        return [x @ axes @ axes.T for x in streams]

    streams = [model.model.embed_tokens.weight[ids].double().numpy() for ids in texts]
    streams = project(streams, width)
    for layer in layers:
        for block, norm in ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)):
            following = []
            for stream in streams:
                scale = np.sqrt((stream**2).sum(1, keepdims=True) / HIDDEN + norm.variance_epsilon)
                x = torch.tensor(stream / scale * norm.weight.double().numpy())[None].float()
                if block is layer.mlp:
                    out = block(x)
                else:
                    places = torch.arange(len(stream))[None]
                    out = block(hidden_states=x, position_embeddings=model.model.rotary_emb(x, places))[0]
                following.append(stream + out[0].double().numpy())
            streams = project(following, HIDDEN if block is layers[-1].mlp else width)
    norm = model.model.norm
    last = streams[-1] / np.sqrt((streams[-1] ** 2).sum(1, keepdims=True) / HIDDEN + norm.variance_epsilon)
    return (last * norm.weight.double().numpy()) @ model.lm_head.weight.double().numpy().T


@pytest.mark.parametrize("variant", ["plain", "biases, tied"])
def test_slicegpt_projects_the_stream_onto_its_principal_axes(variant: str) -> None:
    model, batches = make(variant), make_text()
    expected = slow_slicegpt(model, batches, 17)
    slice_to(model, batches, 17)
    assert model.model.embed_tokens.weight.shape == (64, 17)
    assert model.model.layers[1].mlp.gate_proj.weight.shape == (FFN, 17)
    np.testing.assert_allclose(logits_of(model).numpy(), expected, rtol=0, atol=1e-4)


def test_slicegpt_takes_the_width_nearest_to_the_wanted_parameters() -> None:
    vocabulary, attention, target = 64, 24 * 24 * 2 + 24 * 12 * 2, FFN // 2 * LAYERS * NEURON
    model = make()  # untied
    before = count(model)
    pruned, removed = peers.slicegpt(model, make_text(), 0.5)
    found = {}
    for width in range(1, HIDDEN + 1):
        # The layers with their norms, the last norm, and the embedding.
        found[width] = LAYERS * (attention + NEURON * FFN + 2 * HIDDEN) + HIDDEN + vocabulary * (HIDDEN - width)
        found[width] -= LAYERS * ((attention + NEURON * FFN) // HIDDEN * width + 2 * width * width)
        found[width] -= (HIDDEN - width) * (FFN + width)  # the last layer writes the whole stream
    best = min(found, key=lambda width: abs(found[width] - target))
    assert pruned.model.embed_tokens.weight.shape[1] == best
    assert removed == found[best] == before - count(pruned)


def test_slicegpt_refuses_a_norm_behind_the_block() -> None:
    with pytest.raises(ValueError, match="a norm stands behind each block"):
        peers.slicegpt(make("four norms"), make_text(), FRACTION)


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in peers.METHODS if name != "slicegpt"])
def test_nothing_wanted_gives_the_base_back(method: str) -> None:
    model = make()
    before = logits_of(model)
    pruned, removed = peers.METHODS[method](model, make_text(), 0.0, 0)
    assert removed == 0
    assert torch.equal(logits_of(pruned), before)


@pytest.mark.parametrize("method", list(peers.METHODS))
def test_what_is_left_adds_up_with_what_is_removed(method: str) -> None:
    model = make("biases, tied")
    before = count(model)
    pruned, removed = peers.METHODS[method](model, make_text(), FRACTION, 0)
    assert before - count(pruned) == removed
