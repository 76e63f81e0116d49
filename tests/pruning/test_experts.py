"""Experts of a mixture from routing to plan: statistics against a slow reference, planted experts, budgets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

import expertprune
from expertprune.arch import families
from expertprune.artifacts.plan import StructureBudget
from expertprune.artifacts.profile import FORWARD
from expertprune.composition.scoring import corpus_score, unit_statistics
from expertprune.corpora.batches import Tokens, make_batches
from expertprune.errors import ExpertpruneError, PlanError, SpecError
from expertprune.models.passes import TextRun
from expertprune.profiling.store import measure
from expertprune.relevance import criteria
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.units import Structure
from tests.calling import call
from tests.masks import LENGTHS, measured, tiny_of, token_lists
from tests.oracle import load, read_json
from tests.profiles import made_up_about
from tests.tiny import WORDS, save_tiny, tiny_model

EXPERTS, CHOSEN = 6, 2
Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def routing_of(model: Any, layer: int, ids: list[int]) -> tuple[Array, Array, Array]:
    """By hand, of one document alone: router weight `[tokens, experts]`, 0 where not chosen, and `‖E_e(x)‖` likewise."""
    seen = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.gate.register_forward_hook(lambda _, arguments, __: seen.append(numbers(arguments[0])))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    hidden = seen[0].reshape(len(ids), -1)
    logits = hidden @ numbers(mlp.gate.weight).T
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    weights = np.zeros_like(chances)
    for token, row in enumerate(chances):
        largest = np.argsort(-row)[:CHOSEN]
        weights[token, largest] = row[largest]
    if getattr(model.config, "norm_topk_prob", True):
        weights /= weights.sum(1, keepdims=True)
    gate_up, down = numbers(mlp.experts.gate_up_proj), numbers(mlp.experts.down_proj)
    norms = np.zeros_like(weights)
    for expert in range(EXPERTS):
        gate, up = np.split(hidden @ gate_up[expert].T, 2, axis=1)
        norms[:, expert] = np.linalg.norm((silu(gate) * up) @ down[expert].T, axis=1)
    return weights, norms, hidden


@pytest.mark.parametrize(("name", "tokens_per_batch"), [("mixtral", 1), ("olmoe", 30), ("qwen2_moe", 1000)])
def test_routing_statistics_are_those_of_each_document_alone(name: str, tokens_per_batch: int) -> None:
    model = tiny_model(name)
    found = measured(tiny_of(model).text(token_lists(), tokens_per_batch), "forward")
    for layer in range(3):
        for number, ids in enumerate(token_lists()):
            weights, norms, _ = routing_of(model, layer, ids)
            chosen, written = weights > 0, weights * norms
            frequency = chosen.mean(0)
            assert frequency.sum() == pytest.approx(CHOSEN)
            for key, expected in (
                ("frequency", frequency),
                ("routed", chosen.sum(0)),
                ("norm_sum", written.sum(0)),
                ("impact", (written**2).mean(0)),
            ):
                np.testing.assert_allclose(
                    numbers(found[f"experts.{layer}.{key}"])[number], expected, rtol=1e-4, atol=1e-6
                )
        mlp = model.model.layers[layer].mlp
        owned = [
            np.sqrt(sum((numbers(part[e]) ** 2).sum() for part in (mlp.gate.weight, *mlp.experts.parameters())))
            for e in range(EXPERTS)
        ]
        np.testing.assert_allclose(numbers(found[f"experts.{layer}.weight_norm"]), owned, rtol=1e-5)
    assert found["heads.0.impact"].shape == (len(LENGTHS), 6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_reap_is_the_mean_over_all_tokens_of_the_corpus_that_are_routed_to_an_expert(name: str, tmp_path: Path) -> None:
    """`S_j = mean_{x in X_j} g_j(x) ‖E_j(x)‖` (arXiv:2510.13999), also where one document alone needs an expert."""
    of, texts = tiny_of(tiny_model(name)), token_lists((4, 2, 6, 2, 3), seed=1)
    path = tmp_path / "p.safetensors"
    profile = measure(of.text(texts), [FORWARD], path, made_up_about(tokens=17, layers=of.shapes))
    scores, largest, quantile = (
        [
            corpus_score(criteria["reap"], unit_statistics(profile, Structure.EXPERTS, layer, 0), how).double().numpy()
            for layer in range(3)
        ]
        for how in ("mean", "max", 0.5)
    )
    alone = 0
    for layer in range(3):
        written, served, means = [], np.zeros(EXPERTS), np.zeros((len(texts), EXPERTS))
        for number, ids in enumerate(texts):
            weights, norms, _ = routing_of(of.model, layer, ids)
            written.append(np.where(weights > 0, weights * norms, np.nan))
            served += (weights > 0).any(0)
            for expert in np.flatnonzero((weights > 0).any(0)):
                means[number, expert] = np.nanmean(written[-1][:, expert])
        total, count = np.nansum(np.concatenate(written), 0), (~np.isnan(np.concatenate(written))).sum(0)
        np.testing.assert_allclose(scores[layer], total / np.maximum(count, 1), rtol=1e-5)
        np.testing.assert_allclose(largest[layer], means.max(0), rtol=1e-5)
        np.testing.assert_allclose(quantile[layer], np.median(means, 0), rtol=1e-5)
        alone += int((served == 1).sum())
    assert alone > 0


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 4.0])
def test_reap_is_the_mean_of_weighted_tokens(prompt_weight: float, tmp_path: Path) -> None:
    """Every third token is an answer's; a document's tokens at an expert may weigh less than one together."""
    of, texts = tiny_of(tiny_model("mixtral")), token_lists((4, 2, 6, 2, 3), seed=1)
    tokens = [Tokens(tuple(ids), tuple(place % 3 == 1 for place in range(len(ids)))) for ids in texts]
    text = TextRun(of.model, of.family, of.shapes, make_batches(tokens, 30, prompt_weight=prompt_weight))
    profile = measure(text, [FORWARD], tmp_path / "p.safetensors", made_up_about(tokens=17, layers=of.shapes))
    weighed = np.concatenate([np.where(each.answers, 1.0, prompt_weight) for each in tokens])[:, None]
    for layer in range(3):
        routings = [routing_of(of.model, layer, ids) for ids in texts]
        weights, norms = (np.concatenate([each[part] for each in routings]) for part in (0, 1))
        counts = weighed * (weights > 0)
        expected = (counts * weights * norms).sum(0) / np.maximum(counts.sum(0), 1e-9)
        statistics = unit_statistics(profile, Structure.EXPERTS, layer, 0)
        np.testing.assert_allclose(numbers(corpus_score(criteria["reap"], statistics, "mean")), expected, rtol=1e-5)


# --- planted experts --------------------------------------------------------------------------------------------------

# Six experts: two for each of two groups of words, and two that no word of theirs calls.
ROLES = {"medical": (4, 1), "law": (0, 3), "nobody": (2, 5)}
FIRST = 3  # ids before the words: <s>, </s>, <unk>


def planted(folder: Path, name: str) -> Path:
    """The router sends each word to the two experts of its group; all experts write much.

    The direction of a group is orthogonal to that of the others, and attention writes nothing, so what a token is stays
    what it was embedded as, up to what experts add in other directions.
    """
    save_tiny(folder, name, tie_word_embeddings=False, num_hidden_layers=2)
    model = load(folder)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    directions = torch.zeros(3, width)
    directions[0, 0], directions[1, 1], directions[2, 2] = 1, 1, 1
    words = model.model.embed_tokens.weight
    words.copy_(0.05 * torch.randn(words.shape, generator=generator))
    words[:, :3] = 0
    for token in range(64):
        words[token] += 2 * directions[0 if token % 2 else 1]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1)
        gate = layer.mlp.gate.weight
        gate.zero_()
        for role, experts in enumerate(ROLES.values()):
            for place, expert in enumerate(experts):
                gate[expert] = (3 - 0.5 * place) * directions[role]
        layer.mlp.experts.down_proj[:, :3] = 0  # experts write in other directions than those that route
        if hasattr(layer.mlp, "shared_expert"):
            layer.mlp.shared_expert.down_proj.weight[:3] = 0
    model.save_pretrained(folder)
    return folder


def corpus(path: Path, odd: bool, seed: int) -> str:
    """Sentences of words with odd ids, which are medical, or with even ones."""
    vocabulary = [*WORDS, *(f"w{i}" for i in range(64 - FIRST - len(WORDS)))]
    mine = [word for number, word in enumerate(vocabulary, FIRST) if number % 2 == odd]
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(12):
            picked = torch.randint(0, len(mine), (15,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(mine[i] for i in picked)}) + "\n")
    return str(path)


def planted_spec(folder: Path, tmp_path: Path, domains: list[str], criterion: str, **others: Any) -> Any:
    sources = {
        "medical": {"path": corpus(tmp_path / "medical.jsonl", True, 1)},
        "law": {"path": corpus(tmp_path / "law.jsonl", False, 2)},
    }
    data = {
        "name": "planted",
        "base": str(folder),
        "dimensions": {"domain": domains},
        "general": [],
        "corpora": {"sources": sources},
        "relevance": {"criterion": criterion},
        "budget": {"experts": 2},
        "compose": {"allocation": "uniform"},
        "evaluate": {"enabled": False},
        **others,
    }
    return parse_spec(data, "spec", tmp_path)


@pytest.mark.parametrize(
    ("name", "criterion"), [("mixtral", "reap"), ("qwen2_moe", "frequency"), ("mixtral", "impact")]
)
def test_the_composer_finds_the_planted_experts(name: str, criterion: str, tmp_path: Path) -> None:
    folder = planted(tmp_path / "base", name)
    for domains, budget in ((["medical"], 4), (["law"], 4), (["medical", "law"], 2)):
        spec = planted_spec(folder, tmp_path, domains, criterion, budget={"experts": budget})
        plan = expertprune.compose(spec)
        expected = sorted(expert for domain in domains for expert in ROLES[domain])
        assert [list(layer.kept.experts) for layer in plan.layers] == [expected, expected]


def test_an_expert_of_experts_is_built_with_its_heads_repaired(tmp_path: Path) -> None:
    folder = planted(tmp_path / "base", "mixtral")
    spec = planted_spec(
        folder, tmp_path, ["medical"], "impact", budget={"experts": 0.34, "kv_groups": 1}, evaluate={"enabled": True}
    )
    spec = spec.model_copy(update={"general": []})
    sources = {name: source.model_copy(update={"evaluation": [corpus(tmp_path / f"{name}.evaluation.jsonl", odd, 7)]})
               for (name, source), odd in zip(spec.corpora.sources.items(), (True, False), strict=True)}  # fmt: skip
    spec = spec.model_copy(update={"corpora": spec.corpora.model_copy(update={"sources": sources})})
    out = expertprune.build(spec, tmp_path / "expert")
    about = read_json(out / "expertprune.json")
    assert about["plan"]["budget"]["experts"] == {"requested": 0.34, "of": 6, "kept": 4, "removed": 2}
    assert about["plan"]["budget"]["ffn"] == {"requested": 0, "of": 32, "kept": 32, "removed": 0}
    config = read_json(out / "config.json")
    assert (config["num_local_experts"], config["num_key_value_heads"], config["num_attention_heads"]) == (4, 2, 4)
    expert = load(out)
    assert sum(parameter.numel() for parameter in expert.parameters()) == about["parameters"]["after"]
    retention = about["evaluation"]["corpora"]["domain/medical"]["metrics"]["bits_per_byte"]["retention"]
    assert retention == pytest.approx(1, abs=0.02)  # neither the experts of others nor attention did anything there


# --- what is refused --------------------------------------------------------------------------------------------------


# What a spec over a mixture says; the last two are about a dense model.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"budget": {"experts": 5}}, PlanError, "the router chooses 2 for each token.*at most 4 can be"),
    ({"budget": {"experts": 0.9}}, PlanError, "5 of 6 routed experts cannot be removed"),
    ({"budget": {"experts": 0.05}}, PlanError, "less than half a routed expert and removes nothing"),
    ({"budget": {"ffn": 0.25, "multiple_of": 4}}, PlanError, "multiple_of: 4 is no multiple of 8"),
    ({"budget": {"ffn": 5, "multiple_of": 8}}, PlanError, "budget.ffn: 5 neurons cannot be removed"),
    ({"compose": {"allocation": "global"}}, PlanError, "compose.allocation: uniform"),
    ({"relevance": "activation"}, SpecError, r"criterion: activation does not score experts; criteria that do: fisher, "
     r"frequency, impact.*; relevance\.experts can name one for whole routed experts alone"),
    ({"relevance": "regional", "budget": {"kv_groups": 1}}, SpecError,
     "regional needs the regional pass, which is not made through routed experts; take fisher, or impact"),
    ({"relevance": {"criterion": "impact", "experts": "regional"}}, SpecError, "experts: regional does not score experts"),
    ({"relevance": {"experts": "reep"}}, SpecError, "'reep'.*reap"),
    ({"relevance": "reap", "budget": {"kv_groups": 1}}, SpecError, "reap does not score kv_groups"),
    ({"budget": {"retention": {"expert": 0.9}}}, PlanError, "give budget.experts, budget.ffn or budget.parameters"),
    ({"family": "llama", "relevance": {"criterion": "impact", "experts": "reap"}, "budget": {"ffn": 0.25, "multiple_of": 4}},
     SpecError, r"relevance\.experts: layers of family 'llama' have no routed experts; leave this key"),
    ({"family": "llama"}, PlanError, r"budget\.experts: layers of family 'llama' have none"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=str)
def test_a_budget_that_experts_cannot_meet(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    others = {key: value for key, value in changes.items() if key != "family"}
    folder = save_tiny(tmp_path / "base", changes.get("family", "mixtral"))
    with pytest.raises(error, match=words):
        expertprune.validate(planted_spec(folder, tmp_path, ["medical"], "impact", **others))


# --- neurons inside experts -------------------------------------------------------------------------------------- ---

FAMILIES = [name for name, family in families().items() if family.experts is not None]
WIDTH = {"mixtral": 32, "olmoe": 32, "qwen2_moe": 16, "qwen3_moe": 16}


def stored_half(found: dict[str, Tensor], name: str) -> Array:
    return numbers(found[name]) * float(found[f"{name}.scale"])


def weighted_neurons(model: Any, layer: int, ids: list[int]) -> Array:
    """By hand, of one document: router weight times activation, `[tokens, experts * neurons]`, 0 where not chosen."""
    weights, _, hidden = routing_of(model, layer, ids)
    gate_up = numbers(model.model.layers[layer].mlp.experts.gate_up_proj)
    parts = []
    for expert in range(EXPERTS):
        gate, up = np.split(hidden @ gate_up[expert].T, 2, axis=1)
        parts.append(weights[:, expert, None] * silu(gate) * up)
    return np.concatenate(parts, 1)


@pytest.mark.parametrize(("name", "tokens_per_batch"), [("mixtral", 1), ("olmoe", 30), ("qwen3_moe", 1000)])
def test_statistics_of_neurons_are_those_of_each_document_alone(name: str, tokens_per_batch: int) -> None:
    model = tiny_model(name)
    found = measured(tiny_of(model).text(token_lists(), tokens_per_batch), "forward")
    for layer in range(3):
        every = [weighted_neurons(model, layer, ids) for ids in token_lists()]
        for number, values in enumerate(every):
            expected = np.sqrt((values**2).mean(0))
            mine = stored_half(found, f"ffn.{layer}.rms")[number]
            np.testing.assert_allclose(mine, expected, rtol=2e-3, atol=1e-3 * expected.max())
        together = np.concatenate(every)
        np.testing.assert_allclose(numbers(found[f"ffn.{layer}.sum"]), together.sum(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            numbers(found[f"ffn.{layer}.square_sum"]), (together**2).sum(0), rtol=1e-3, atol=1e-6
        )
        experts = model.model.layers[layer].mlp.experts
        gate_up, down = numbers(experts.gate_up_proj), numbers(experts.down_proj)
        for unit in (0, 5, WIDTH[name], EXPERTS * WIDTH[name] - 1):
            e, j = divmod(unit, WIDTH[name])
            column = down[e][:, j]
            owned = (column**2).sum() + (gate_up[e][j] ** 2).sum() + (gate_up[e][WIDTH[name] + j] ** 2).sum()
            assert float(found[f"ffn.{layer}.output_l1"][unit]) == pytest.approx(np.abs(column).sum(), rel=1e-5)
            assert float(found[f"ffn.{layer}.output_l2"][unit]) == pytest.approx(np.sqrt((column**2).sum()), rel=1e-5)
            assert float(found[f"ffn.{layer}.weight_norm"][unit]) == pytest.approx(np.sqrt(owned), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_masks_are_those_of_one_backward_pass_through_the_whole_model(name: str) -> None:
    """A mask `m` on a column makes it `m w`, so `∂L/∂m = w · ∂L/∂w` at 1."""
    model = tiny_model(name).requires_grad_(False)
    found = measured(tiny_of(model).text(token_lists()), "language_model")
    of = tiny_of(model)
    layers = [(index, layer) for index, layer in enumerate(model.model.layers) if of.shapes[index].experts]
    assert layers
    weights = {
        index: (layer.mlp.experts.down_proj, layer.self_attn.o_proj.weight if of.family.has_attention else None)
        for index, layer in layers
    }
    for weight in (each for pair in weights.values() for each in pair if each is not None):
        weight.requires_grad_(True)
    for number, ids in enumerate(token_lists()):
        model.zero_grad()
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
        for layer, (down, heads) in weights.items():
            product = down * down.grad  # of the hidden axis, only the sum counts
            neurons = numbers(product.sum(2 if model.model.layers[layer].mlp.experts.is_transposed else 1)).ravel()
            expected = {"ffn": neurons, "experts": neurons.reshape(EXPERTS, -1).sum(1)}
            if heads is not None:
                expected["heads"] = numbers((heads * heads.grad).sum(0)).reshape(6, -1).sum(1)
            for key, values in expected.items():
                mine = stored_half(found, f"{key}.{layer}.value")[number]
                np.testing.assert_allclose(mine, values, rtol=3e-3, atol=2e-3 * np.abs(values).max())
    assert found[f"ffn.{layers[0][0]}.value"].shape == (len(LENGTHS), EXPERTS * of.shapes[layers[0][0]].ffn)


@pytest.mark.parametrize(("name", "tokens_per_batch"), [("mixtral", 1), ("olmoe", 30), ("qwen3_moe", 1000)])
def test_norms_of_gradients_are_those_of_a_mask_for_each_segment(
    name: str, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On token `t`, the derivative is the neuron's activation times its column's product with `∂L/∂output_t`."""
    monkeypatch.setattr("expertprune.profiling.gradients.SEGMENT", 4)
    model = tiny_model(name).requires_grad_(False)
    found = measured(tiny_of(model).text(token_lists(), tokens_per_batch), "language_model")
    model.requires_grad_(True)
    outputs: list[torch.Tensor] = []

    def note(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:  # not where the routing is looked up
            output.retain_grad()
            outputs.append(output)

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(note)
    for number, ids in enumerate(token_lists()):
        outputs.clear()
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).backward()
        gradients = [numbers(output.grad).reshape(len(ids), -1) for output in outputs]
        for index, gradient in enumerate(gradients):
            down = numbers(model.model.layers[index].mlp.experts.down_proj)
            by_token = weighted_neurons(model, index, ids) * np.concatenate([gradient @ each for each in down], 1)
            segments = np.stack([by_token[first : first + 4].sum(0) for first in range(0, len(ids), 4)])
            experts = segments.reshape(len(segments), EXPERTS, -1).sum(2)
            for key, each in (("ffn", segments), ("experts", experts)):
                expected = np.sqrt((each**2).sum(0))
                mine = stored_half(found, f"{key}.{index}.norm")[number]
                np.testing.assert_allclose(mine, expected, rtol=3e-3, atol=2e-3 * expected.max())


# --- plans of neurons ----------------------------------------------------------------------------------------------


def spec_of(folder: Path, tmp_path: Path, budget: dict[str, Any], **others: Any) -> Spec:
    """A spec as short as a user may write it: neither criterion nor allocation."""
    spec = planted_spec(folder, tmp_path, ["medical", "law"], "impact", budget={"multiple_of": 8, **budget})
    data = spec.document()
    data["relevance"], data["compose"] = others.get("relevance", {}), others.get("compose", {})
    return Spec.model_validate(data)


@pytest.mark.parametrize("criterion", ["impact", "fluctuation"])
def test_each_expert_keeps_its_own_best_neurons(criterion: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    relevance = {"criterion": criterion, "experts": "reap"}
    plan = expertprune.compose(spec_of(folder, tmp_path, {"ffn": 0.5, "experts": 2}, relevance=relevance))
    assert plan.budget["ffn"] == StructureBudget(requested=0.5, of=32, kept=16, removed=16)
    chosen = set()
    for layer in plan.kept:
        assert len(layer.experts) == 4
        assert [unit // 32 for unit in layer.ffn] == [expert for expert in layer.experts for _ in range(16)]
        chosen |= {tuple(unit % 32 for unit in layer.ffn if unit // 32 == expert) for expert in layer.experts}
    assert len(chosen) == 12, "every expert of every layer chooses for itself"
    before, after = plan.parameters.before, plan.parameters.after
    # of three layers: two experts of three matrices and a router's row, and 16 neurons of each of the four others
    assert before - after == 3 * (2 * (3 * 24 * 32 + 24) + 4 * 16 * 3 * 24)


def test_parameters_beside_experts_are_met_by_neurons(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    plan = expertprune.compose(spec_of(folder, tmp_path, {"experts": 1, "parameters": 0.4}))
    assert plan.budget["experts"].kept == 5
    before, after = plan.parameters.before, plan.parameters.after
    step = 3 * 5 * 8 * 3 * 24  # of three layers, five experts, eight neurons of three matrices
    assert before - after >= 0.4 * before > before - after - step
    assert (before - after - 3 * (3 * 24 * 32 + 24)) % step == 0


def test_experts_with_fewer_neurons_are_built_from_the_shortest_spec(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    spec = spec_of(folder, tmp_path, {"ffn": 0.25, "experts": 1, "kv_groups": 1})
    out = expertprune.build(spec, tmp_path / "expert", store=tmp_path / "store")
    config, about = read_json(out / "config.json"), read_json(out / "expertprune.json")
    assert (config["num_local_experts"], config["intermediate_size"], config["num_key_value_heads"]) == (5, 24, 2)
    relevance = about["spec"]["relevance"]
    assert (relevance["criterion"], relevance["experts"]) == ("fisher", "reap")
    assert about["spec"]["compose"]["allocation"] == "uniform"
    assert sum(parameter.numel() for parameter in load(out).parameters()) == about["parameters"]["after"]


# --- what a spec leaves out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "relevance", "expected"),
    [
        ({"experts": 2}, {}, ("reap", "reap")),
        ({"parameters": 0.2}, {}, ("reap", "reap")),
        ({"kv_groups": 1}, {}, ("fisher", "reap")),
        ({"experts": 2, "ffn": 8}, {}, ("fisher", "reap")),
        ({"experts": 2, "ffn": 8}, {"criterion": "activation", "experts": "frequency"}, ("activation", "frequency")),
        ({"experts": 2}, {"criterion": "fisher"}, ("fisher", "fisher")),
    ],
    ids=str,
)
def test_criterion_and_allocation_of_experts_may_be_left_out(
    budget: dict[str, Any], relevance: dict[str, str], expected: tuple[str, str], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    spec = spec_of(folder, tmp_path, budget, relevance=relevance)
    prepared = expertprune.validate(spec)
    assert (prepared.spec.relevance.criterion, prepared.spec.relevance.experts) == expected
    assert prepared.spec.compose.allocation == "uniform"
    assert spec.compose.allocation == "auto", "the caller's spec stays as it was"
    plan = expertprune.compose(spec)
    assert plan.spec["relevance"]["criterion"] == expected[0]
    assert plan.spec["relevance"]["experts"] == expected[1]
    again = expertprune.compose(Spec.model_validate(plan.spec))
    assert again.digest == plan.digest, "what was decided, written out, decides the same"


@pytest.mark.parametrize(
    ("family", "serve_with", "allocation"),
    [
        ("llama", None, "global"),
        ("qwen2", None, "global"),
        ("starcoder2", None, "uniform"),
        ("starcoder2", "transformers", "global"),
        ("llama", ["vllm", "gguf"], "global"),
        ("qwen2", ["vllm", "gguf"], "uniform"),
    ],
)
def test_what_serves_decides_the_allocation(
    family: str, serve_with: str | list[str] | None, allocation: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family)
    more = {} if serve_with is None else {"serve_with": serve_with}
    spec = Spec.model_validate(spec_of(folder, tmp_path, {"ffn": 0.25}).document() | more)
    prepared = expertprune.validate(spec)
    assert (prepared.spec.relevance.criterion, prepared.spec.relevance.experts) == ("fisher", None)
    assert prepared.spec.compose.allocation == allocation


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("glm4_moe", {"budget": {"experts": 1}}, "serve_with: models of family 'glm4_moe' cannot be written as GGUF"),
        ("qwen2", {"compose": {"allocation": "global"}}, "llama.cpp reads no layers of different widths"),
        ("qwen2", {"budget": {"ffn": 0.25, "kv_groups": 1}}, "budget.kv_groups: llama.cpp reads no model"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused_before_the_work(
    family: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family)
    document = spec_of(folder, tmp_path, {"ffn": 0.25}).document() | {"serve_with": "gguf"}
    with pytest.raises(ExpertpruneError, match=re.escape(said)):
        expertprune.validate(Spec.model_validate(document | changed))


def test_validate_and_inspect_say_what_was_decided(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "olmoe")
    spec = spec_of(folder, tmp_path, {"ffn": 8, "experts": 1})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.document()))
    told = call("validate", tmp_path / "spec.yaml").output
    assert "criterion fisher, experts reap, allocation uniform" in told
    expertprune.compose(spec).save(tmp_path / "plan.json")
    told = call("inspect", tmp_path / "plan.json").output
    for words in (r"criterion +│ fisher", r"criterion of routed experts +│ reap", r"allocation +│ uniform"):
        assert re.search(words, told), told


@pytest.mark.parametrize(
    ("name", "budget", "kept"),
    [
        ("deepseek_v3", {"experts": 0.34}, {"n_routed_experts": 4, "num_attention_heads": 6}),
        ("glm4_moe", {"experts": 1, "kv_groups": 1}, {"n_routed_experts": 5, "num_key_value_heads": 2}),
        ("gpt_oss", {"experts": 1, "ffn": 8, "kv_groups": 1}, {"num_local_experts": 5, "intermediate_size": 24}),
        ("qwen3_next", {"parameters": 0.2}, {"num_experts": 4}),
    ],
)
def test_models_whose_layers_are_of_different_kinds_are_built(
    name: str, budget: dict[str, Any], kept: dict[str, int], tmp_path: Path
) -> None:
    """Profiled, composed, repaired, written and explained, from a spec that names a budget alone."""
    folder = save_tiny(tmp_path / "base", name)
    out = expertprune.build(spec_of(folder, tmp_path, budget), tmp_path / "expert", store=tmp_path / "store")
    config, about = read_json(out / "config.json"), read_json(out / "expertprune.json")
    assert {key: config[key] for key in kept} == kept
    stored = sum(parameter.numel() for parameter in load(out).parameters())
    # the bias that corrects a router's choice is stored beside the parameters
    beside = sum(buffer.numel() for path, buffer in load(out).named_buffers() if path.endswith("correction_bias"))
    assert about["parameters"]["after"] == stored + beside
    assert call("inspect", out).output
