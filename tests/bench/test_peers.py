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
from bench.peers.nystrom import TEMPERATURE, shared
from bench.peers.residual_slicing import slice_to
from expertprune.corpora.batches import Batch, make_batches
from tests.tiny import WIDTHS, tiny_model

FFN, LAYERS, HIDDEN = WIDTHS["intermediate_size"], WIDTHS["num_hidden_layers"], WIDTHS["hidden_size"]
FRACTION, WANTED = 0.25, 8  # of 32 neurons
NEURON = 3 * HIDDEN  # a gate row, an up row, a down column
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


TEXT = make_text()
DOCUMENTS = [batch.ids[row, :n] for batch in TEXT for row, n in enumerate(batch.lengths)]


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = DOCUMENTS[-1]) -> torch.Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


def inputs_of_modules(model: Any, modules: list[Any]) -> list[Floats]:
    """The inputs of each module, `[tokens, channels]`, document by document."""
    seen: dict[Any, list[Floats]] = {module: [] for module in modules}
    handles = [
        module.register_forward_pre_hook(lambda m, x: seen[m].append(x[0][0].double().numpy())) for module in seen
    ]
    for ids in DOCUMENTS:
        logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return [np.concatenate(seen[module]) for module in modules]


def inputs_of(model: Any, path: str = "mlp.down_proj") -> list[Floats]:
    """The inputs of a submodule of each layer."""
    return inputs_of_modules(model, [layer.get_submodule(path) for layer in model.model.layers])


def states_of(model: Any) -> list[Floats]:
    """The hidden states before each layer, and behind the last."""
    return inputs_of_modules(model, [*(layer.input_layernorm for layer in model.model.layers), model.model.norm])


def distance(x: Floats, y: Floats) -> float:
    """One minus the mean cosine over tokens."""
    return float(1 - ((x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))).mean())


def influences(model: Any) -> Floats:
    return np.array([distance(*pair) for pair in itertools.pairwise(states_of(model))])


def parameters(model: Any) -> int:
    """Parameters of the model in memory, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


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


def gone_from(kept: list[int]) -> list[int]:
    return [j for j in range(FFN) if j not in kept]


def silence(model: Any, layer: int, units: list[int]) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[:, units] = 0


def check_layer(
    after: Any, reference: Any, layer: int, kept: list[int], fit: Floats | None = None, bias: Floats | None = None
) -> None:
    """A layer's FFN has the reference's tensors at the kept neurons; the reference then writes what it writes.

    `fit`, `[kept, ffn]`, is what the kept neurons take over from all, and `bias` what the projection has new.
    """
    new, old = after.model.layers[layer].mlp, reference.model.layers[layer].mlp
    for mine, theirs in ((new.gate_proj, old.gate_proj), (new.up_proj, old.up_proj)):
        for parameter, whole in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(parameter, whole[kept])
    assert (new.down_proj.in_features, new.gate_proj.out_features) == (len(kept), len(kept))
    close = {"rtol": 1e-5, "atol": 1e-6} if fit is None else {"rtol": 2e-3, "atol": 1e-5}
    if fit is None:
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, kept])
    else:
        np.testing.assert_allclose(new.down_proj.weight.numpy(), down(reference, layer) @ fit.T, **close)
    if bias is not None:
        np.testing.assert_allclose(new.down_proj.bias.numpy(), bias, **close)
    elif old.down_proj.bias is not None:
        assert torch.equal(new.down_proj.bias, old.down_proj.bias)
    else:
        assert new.down_proj.bias is None
    silence(reference, layer, gone_from(kept))
    with torch.no_grad():
        old.down_proj.weight[:, kept] = new.down_proj.weight
    old.down_proj.bias = new.down_proj.bias


def ridge_fit(inputs: Floats, kept: list[int]) -> Floats:
    """The transposed map of the least `‖X − X_k Bᵀ‖² + λ‖B‖²`, by rows added to the system."""
    few = inputs[:, kept]
    rows = np.sqrt(RIDGE * (few**2).sum() / len(kept)) * np.eye(len(kept))
    wanted = np.concatenate([inputs, np.zeros((len(kept), FFN))])
    return np.linalg.lstsq(np.concatenate([few, rows]), wanted, rcond=None)[0]


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


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return -torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].sum()


def taylor(model: Any) -> list[Floats]:
    """`Σ |w · ∂L/∂w|` neuron by neuron, from one backward pass of the whole loss."""
    model = copy.deepcopy(model).requires_grad_(True)
    for ids in DOCUMENTS:
        loss_of(model, ids).backward()
    scores = []
    for layer in model.model.layers:
        found = (layer.mlp.down_proj.weight * layer.mlp.down_proj.weight.grad).abs().sum(0)
        for parameter in (*layer.mlp.gate_proj.parameters(), *layer.mlp.up_proj.parameters()):
            found = found + (parameter * parameter.grad).abs().reshape(FFN, -1).sum(1)
        scores.append(found.detach().double().numpy())
    return scores


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        ("magnitude", "biases, tied"),
        ("llm_pruner_taylor", "biases, tied"),
        ("wanda_sp", "biases, tied"),
        ("wanda_sp_least_squares", "four norms"),
        ("slimgpt", "biases, tied"),
    ],
)
def test_each_layer_loses_the_least_on_the_prefix_that_is_cut(method: str, variant: str) -> None:
    before = make(variant)
    reference, gradients = copy.deepcopy(before), taylor(before)
    pruned, _ = peers.METHODS[method](copy.deepcopy(before), TEXT, FRACTION, 0)
    assert not any(p.requires_grad or p.grad is not None for p in pruned.parameters())
    found = kept_units(before, pruned)
    # 2 + (x − 2) log(l + 1) / log 3 for l = 0, 1, 2 is 2, 0.369 · 2 + 0.631 x, x: together 24, so x is 13.03.
    for layer, rising in enumerate((2, 9, 13)):
        inputs, weight, mlp = inputs_of(reference)[layer], down(before, layer), before.model.layers[layer].mlp
        if method == "slimgpt":
            kept = greedily(inputs, weight, rising)
        elif method == "magnitude":
            rows = [*mlp.gate_proj.parameters(), *mlp.up_proj.parameters(), mlp.down_proj.weight.T]
            norms = torch.cat([each.reshape(FFN, -1) for each in rows], 1).double().norm(dim=1)
            kept = without(norms.numpy(), WANTED)
        elif method == "llm_pruner_taylor":
            kept = without(gradients[layer], WANTED)
        else:
            kept = without(np.abs(weight).sum(0) * np.sqrt((inputs**2).sum(0)), WANTED)
        assert found[layer] == kept
        repaired = method in ("wanda_sp_least_squares", "slimgpt")
        check_layer(pruned, reference, layer, kept, ridge_fit(inputs, kept) if repaired else None)
    torch.testing.assert_close(logits_of(pruned), logits_of(reference), rtol=0, atol=1e-5)


def test_random_follows_its_seed_and_nothing_else() -> None:
    before, chosen = make(), []
    for seed, per_batch in [(0, 40), (0, 1), (1, 40)]:
        pruned, _ = peers.random(copy.deepcopy(before), make_text(per_batch), FRACTION, seed)
        chosen.append(kept_units(before, pruned))
    assert chosen[0] == chosen[1] != chosen[2]


def fluctuation(inputs: Floats, weight: Floats, power: int = 1) -> Floats:
    """Variance over single tokens by the size of the weights, standardized."""
    raw = (inputs.var(0) * (weight**2).sum(0)) ** power
    return (raw - raw.mean()) / raw.std(ddof=1)


@pytest.mark.parametrize(
    ("variant", "with_heads"), [("four norms", False), ("biases, tied", False), ("plain", True), ("biases, tied", True)]
)
def test_flap_ranks_all_layers_together_and_gives_the_mean_back(variant: str, with_heads: bool) -> None:
    before = make(variant)
    with torch.no_grad():  # quiet heads: a group of two in layer 1, one head of a group in layer 2
        before.model.layers[1].self_attn.o_proj.weight[:, :8] *= 0.01
        before.model.layers[2].self_attn.o_proj.weight[:, 12:16] *= 0.01
    pruned, removed = peers.flap(copy.deepcopy(before), TEXT, 0.5, heads=with_heads)
    heads, groups, width, biased = 6, 3, 4, variant == "biases, tied"
    neuron, head, kv = NEURON + 2 * biased, 2 * width * HIDDEN + width * biased, 2 * width * (HIDDEN + biased)
    ranking, hidden, attended = [], inputs_of(before), inputs_of(before, "self_attn.o_proj")
    for layer in range(LAYERS):
        scores = fluctuation(hidden[layer], down(before, layer))
        ranking += [(scores[j], layer, "neuron", j) for j in range(FFN)]
        weight = before.model.layers[layer].self_attn.o_proj.weight.double().numpy()
        by_head = fluctuation(attended[layer], weight, 2).reshape(heads, width).mean(1)
        ranking += [(by_head[h], layer, "head", h) for h in range(heads) if with_heads]
    ranking.sort()
    removed_after, left = [0], {(layer, g): heads // groups for layer in range(LAYERS) for g in range(groups)}
    for _, layer, kind, unit in ranking:
        cost = neuron
        if kind == "head":
            left[layer, unit // 2] -= 1
            cost = head + (kv if left[layer, unit // 2] == 0 else 0)
        removed_after.append(removed_after[-1] + cost)
    target = FFN // 2 * LAYERS * neuron
    number = min(range(len(removed_after)), key=lambda n: abs(removed_after[n] - target))
    gone = {(kind, layer, unit) for _, layer, kind, unit in ranking[:number]}
    if with_heads:
        assert {("head", 1, 0), ("head", 1, 1), ("head", 2, 3)} <= gone
    expected = [[j for j in range(FFN) if ("neuron", layer, j) not in gone] for layer in range(LAYERS)]
    assert kept_units(before, pruned) == expected
    assert len({len(units) for units in expected}) > 1  # else a uniform cut would pass
    new_biases, reference = 0, copy.deepcopy(before)
    for layer, kept in enumerate(expected):
        mean, lost = hidden[layer].mean(0), gone_from(kept)
        old = before.model.layers[layer].mlp.down_proj.bias
        bias = down(before, layer)[:, lost] @ mean[lost] + (0 if old is None else old.double().numpy())
        check_layer(pruned, reference, layer, kept, bias=bias)
        old, new = before.model.layers[layer].self_attn.o_proj, pruned.model.layers[layer].self_attn.o_proj
        channels = [h * width + c for h in range(heads) if ("head", layer, h) in gone for c in range(width)]
        weight = old.weight.clone()
        weight[:, channels] = 0
        assert torch.equal(new.weight, weight)
        if channels:
            bias = old.weight.double().numpy()[:, channels] @ attended[layer].mean(0)[channels]
            bias = bias + (old.bias.double().numpy() if biased else 0)
            np.testing.assert_allclose(new.bias.numpy(), bias, rtol=1e-5, atol=1e-6)
        else:
            assert (new.bias is None) != biased
        new_biases += HIDDEN * (1 + bool(channels)) * (not biased)
    assert removed == removed_after[number] - new_biases


@pytest.mark.parametrize("variant", ["four norms", "biases, tied"])
def test_flap_with_least_squares_fits_about_the_means(variant: str) -> None:
    before = make(variant)
    with torch.no_grad():  # one giant neuron: the others lie close below their layer's mean
        before.model.layers[1].mlp.down_proj.weight[:, 5] *= 1000
    reference = copy.deepcopy(before)
    selected, _ = peers.flap(copy.deepcopy(before), TEXT, FRACTION / 2)
    pruned, _ = peers.flap_least_squares(copy.deepcopy(before), TEXT, FRACTION / 2)
    expected = kept_units(before, selected)
    assert kept_units(before, pruned) == expected
    for layer, kept in enumerate(expected):
        if len(kept) == FFN:
            check_layer(pruned, reference, layer, kept)
            continue
        inputs, weight = inputs_of(reference)[layer], down(before, layer)
        mean = inputs.mean(0)
        fit, old = ridge_fit(inputs - mean, kept), before.model.layers[layer].mlp.down_proj.bias
        bias = weight @ (mean - mean[kept] @ fit) + (0 if old is None else old.double().numpy())
        check_layer(pruned, reference, layer, kept, fit, bias)
    assert expected[1] == list(range(FFN))
    torch.testing.assert_close(logits_of(pruned), logits_of(reference), rtol=0, atol=1e-3)


def test_modegpt_keeps_the_highest_leverage_and_repairs_by_nystrom() -> None:
    before = make("biases, tied")
    pruned, _ = peers.modegpt(copy.deepcopy(before), TEXT, FRACTION)
    found = kept_units(before, pruned)
    for layer, inputs in enumerate(inputs_of(before)):
        _, values, axes = np.linalg.svd(inputs, full_matrices=False)
        shares = values**2 / (values**2 + (inputs**2).sum() / FFN)
        kept = found[layer]
        assert kept == without((axes**2 * shares[:, None]).sum(0), FFN - len(kept))
        # Nyström: the best output from the kept neurons, `min ‖X W − X_k V‖`, without a ridge.
        weight = np.linalg.lstsq(inputs[:, kept], inputs @ down(before, layer).T, rcond=None)[0].T
        new = pruned.model.layers[layer].mlp.down_proj
        np.testing.assert_allclose(new.weight.numpy(), weight, rtol=1e-2, atol=2e-4)
        assert torch.equal(new.bias, before.model.layers[layer].mlp.down_proj.bias)
    lost = [FFN - len(kept) for kept in found]
    assert sum(lost) == WANTED * LAYERS
    weights = np.exp(-influences(before) / TEMPERATURE)
    np.testing.assert_allclose(lost, WANTED * LAYERS * weights / weights.sum(), rtol=0, atol=1)
    # exp(0) : exp(-1) : exp(-9) of 36 are 26.3, 9.7 and 0: the first may lose 0.95 of 20, the others share 17.
    assert shared(TEMPERATURE * torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64), 12, 20) == [19, 17, 0]


def test_llm_pruner_takes_the_better_of_all_and_inner_layers() -> None:
    """Nine layers lose 8 of 32 each, or layers 4, 5 and 6 lose 24 each."""
    cuts = {"all": [8] * 9, "inner": [0, 0, 0, 0, 24, 24, 24, 0, 0]}
    better = []
    for seed in (0, 4):
        before, loss = make(seed=seed, num_hidden_layers=9), {}
        scores = taylor(before)
        kept = {name: [without(*pair) for pair in zip(scores, cut, strict=True)] for name, cut in cuts.items()}
        for name, layers in kept.items():
            silenced = copy.deepcopy(before)
            for layer, units in enumerate(layers):
                silence(silenced, layer, gone_from(units))
            loss[name] = sum(loss_of(silenced, ids) for ids in DOCUMENTS)
        better.append(min(cuts, key=lambda name: float(loss[name])))
        pruned, _ = peers.llm_pruner_taylor(copy.deepcopy(before), TEXT, FRACTION)
        assert kept_units(before, pruned) == kept[better[-1]]
    assert better == ["all", "inner"]  # else always taking the same would pass


def test_replaceme_puts_a_linear_map_in_place_of_the_nearest_layers() -> None:
    layers, number, lost = 6, 2, 15
    before = make("biases, tied", num_hidden_layers=layers)
    states = states_of(before)
    size = parameters(before.model.layers[0])
    assert round(layers * lost * (NEURON + 2) / size) == number
    pruned, removed = peers.replaceme(copy.deepcopy(before), TEXT, lost / FFN)
    first = min(range(1, layers - number + 1), key=lambda place: distance(states[place], states[place + number]))
    assert removed == number * size
    gone = [not list(layer.parameters()) for layer in pruned.model.layers]
    assert gone == [first <= i < first + number for i in range(layers)]
    old, new = (each.model.layers[first - 1].mlp.down_proj for each in (before, pruned))
    written = inputs_of(before)[first - 1] @ down(before, first - 1).T + old.bias.double().numpy()
    rows = np.sqrt(MAP_RIDGE * (written**2).sum() / HIDDEN) * np.eye(HIDDEN)
    wanted = np.concatenate([states[first + number] - (states[first] - written), np.zeros((HIDDEN, HIDDEN))])
    mapping = np.linalg.lstsq(np.concatenate([written, rows]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(new.weight.numpy(), mapping @ down(before, first - 1), rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(new.bias.numpy(), mapping @ old.bias.double().numpy(), rtol=1e-2, atol=1e-4)


def test_shortgpt_removes_the_layers_of_least_influence() -> None:
    layers, lost = 6, 26
    before = make("four norms", num_hidden_layers=layers)
    influence, size = influences(before), parameters(before.model.layers[0])
    number = round(layers * lost * NEURON / size)
    assert 1 < number < layers
    pruned, removed = peers.shortgpt(copy.deepcopy(before), TEXT, lost / FFN)
    gone = sorted(range(layers), key=lambda index: influence[index])[:number]
    assert removed == number * size
    assert [not list(layer.parameters()) for layer in pruned.model.layers] == [i in gone for i in range(layers)]
    # a stock model of the layers that are left computes the same
    config, stay = copy.deepcopy(before.config), [i for i in range(layers) if i not in gone]
    config.num_hidden_layers, config.layer_types = len(stay), [config.layer_types[i] for i in stay]
    short = type(before)(config).eval()
    short.load_state_dict(before.state_dict(), strict=False)
    for new, old in zip(short.model.layers, stay, strict=True):
        new.load_state_dict(before.model.layers[old].state_dict())
    torch.testing.assert_close(logits_of(pruned), logits_of(short), rtol=0, atol=1e-5)


@torch.no_grad()
def slow_slicegpt(model: Any, width: int) -> Floats:
    """Logits of the last document, with the stream projected in the original basis wherever it changes its basis."""
    layers = model.model.layers

    def project(streams: list[Floats], keep: int) -> list[Floats]:
        values, vectors = np.linalg.eigh(sum(x.T @ x for x in streams))
        axes = vectors[:, np.argsort(-values)[:keep]]
        return [x @ axes @ axes.T for x in streams]

    def normed(stream: Floats, norm: Any) -> Floats:
        scale = np.sqrt((stream**2).sum(1, keepdims=True) / HIDDEN + norm.variance_epsilon)
        return np.asarray(stream / scale * norm.weight.double().numpy())

    streams = project([model.model.embed_tokens.weight[ids].double().numpy() for ids in DOCUMENTS], width)
    for layer in layers:
        for block, norm in ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)):
            following = []
            for stream in streams:
                x = torch.tensor(normed(stream, norm))[None].float()
                if block is layer.mlp:
                    out = block(x)
                else:
                    places = torch.arange(len(stream))[None]
                    out = block(hidden_states=x, position_embeddings=model.model.rotary_emb(x, places))[0]
                following.append(stream + out[0].double().numpy())
            streams = project(following, HIDDEN if block is layers[-1].mlp else width)
    return normed(streams[-1], model.model.norm) @ model.lm_head.weight.double().numpy().T


def test_slicegpt_projects_the_stream_onto_its_principal_axes() -> None:
    model = make("biases, tied")
    expected = slow_slicegpt(model, 17)
    slice_to(model, TEXT, 17)
    assert model.model.embed_tokens.weight.shape == (64, 17)
    assert model.model.layers[1].mlp.gate_proj.weight.shape == (FFN, 17)
    np.testing.assert_allclose(logits_of(model).numpy(), expected, rtol=0, atol=1e-4)


def test_slicegpt_takes_the_width_nearest_to_the_wanted_parameters() -> None:
    before, target, found = make(), FFN // 2 * LAYERS * NEURON, {}
    pruned, removed = peers.slicegpt(copy.deepcopy(before), TEXT, 0.5)
    best = pruned.model.embed_tokens.weight.shape[1]
    for width in (best - 1, best, best + 1):
        sliced = copy.deepcopy(before)
        slice_to(sliced, TEXT, width)
        found[width] = parameters(before) - parameters(sliced)
    assert min(found, key=lambda width: abs(found[width] - target)) == best
    assert removed == found[best]


@pytest.mark.parametrize("method", ["replaceme", "slicegpt"])
def test_a_norm_behind_each_block_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="a norm stands behind"):
        peers.METHODS[method](make("four norms"), TEXT, FRACTION, 0)


@pytest.mark.parametrize("method", list(peers.METHODS))
def test_what_is_left_adds_up_with_what_is_removed(method: str) -> None:
    """And the base comes back where nothing is wanted."""
    model = make("biases, tied")
    before, logits = parameters(model), logits_of(model)
    if method != "slicegpt":
        model, removed = peers.METHODS[method](model, TEXT, 0.0, 0)
        assert removed == 0
        assert torch.equal(logits_of(model), logits)
    pruned, removed = peers.METHODS[method](model, TEXT, FRACTION, 0)
    assert before - parameters(pruned) == removed
