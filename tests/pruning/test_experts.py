"""Experts of a mixture from routing to plan: statistics against a slow reference, planted experts, budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import expertprune
from expertprune.artifacts.profile import FORWARD
from expertprune.composition.scoring import corpus_score, unit_statistics
from expertprune.errors import PlanError, SpecError
from expertprune.profiling.forward import forward_pass
from expertprune.profiling.store import measure
from expertprune.relevance import UnitStatistics, criteria
from expertprune.spec.reading import parse_spec
from expertprune.units import Structure
from tests.masks import LENGTHS, tiny_of, token_lists
from tests.oracle import load, read_json
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
    found = forward_pass(tiny_of(model).text(token_lists(), tokens_per_batch))
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
    about = {"digest": "d", "corpus": "c", "tokens": 17, "layers": [vars(shape) for shape in of.shapes]}
    profile = measure(of.text(texts), FORWARD, path, about)
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


def test_criteria_of_experts() -> None:
    impact = torch.tensor([[4.0, 9.0]])
    seen = UnitStatistics(
        rms=impact.sqrt(), impact=impact, output_l1=torch.ones(2), output_l2=torch.ones(2),
        weight_norm=torch.tensor([3.0, 5.0]), layer=0, seed=0,
        frequency=torch.tensor([[0.25, 0.75]]), routed_norm=torch.tensor([[2.0, 1.0]]),
    )  # fmt: skip
    assert criteria["reap"].score(seen).tolist() == [[2.0, 1.0]]
    assert criteria["frequency"].score(seen).tolist() == [[0.25, 0.75]]
    assert criteria["impact"].score(seen).tolist() == [[4.0, 9.0]]
    assert criteria["magnitude"].score(seen).tolist() == [[3.0, 5.0]]
    assert {name for name, each in criteria.items() if "experts" in each.structures} == {
        "fisher", "frequency", "impact", "magnitude", "random", "reap", "taylor",
    }  # fmt: skip


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


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("mixtral", {"budget": {"experts": 5}}, PlanError, "the router chooses 2 for each token.*at most 4 can be"),
    ("mixtral", {"budget": {"experts": 0.9}}, PlanError, "5 of 6 routed experts cannot be removed"),
    ("mixtral", {"budget": {"experts": 0.05}}, PlanError, "less than half a routed expert and removes nothing"),
    ("mixtral", {"budget": {"ffn": 0.25, "multiple_of": 4}}, PlanError, "multiple_of: 4 is no multiple of 8"),
    ("mixtral", {"budget": {"ffn": 5, "multiple_of": 8}}, PlanError, "budget.ffn: 5 neurons cannot be removed"),
    ("mixtral", {"compose": {"allocation": "global"}}, PlanError, "compose.allocation: uniform"),
    (
        "mixtral",
        {"relevance": "activation"},
        SpecError,
        r"relevance\.criterion: activation does not score experts; criteria that do: fisher, frequency, impact.*; "
        r"relevance\.experts can name one for whole experts alone",
    ),
    (
        "mixtral",
        {"relevance": "regional", "budget": {"kv_groups": 1}},
        SpecError,
        "regional needs the regional pass, which is not made through experts; take fisher, or impact",
    ),
    (
        "mixtral",
        {"relevance": {"criterion": "impact", "experts": "regional"}},
        SpecError,
        r"relevance\.experts: regional does not score experts",
    ),
    ("mixtral", {"relevance": {"experts": "reep"}}, SpecError, "'reep'.*reap"),
    ("mixtral", {"relevance": "reap", "budget": {"kv_groups": 1}}, SpecError, "reap does not score kv_groups"),
    (
        "mixtral",
        {"budget": {"retention": {"expert": 0.9}}},
        PlanError,
        "give budget.experts, budget.ffn or budget.parameters",
    ),
    (
        "llama",
        {"relevance": {"criterion": "impact", "experts": "reap"}, "budget": {"ffn": 0.25, "multiple_of": 4}},
        SpecError,
        r"relevance\.experts: layers of family 'llama' have no experts; leave this key",
    ),
    ("llama", {}, PlanError, r"budget\.experts: layers of family 'llama' have none"),
]


@pytest.mark.parametrize(("family", "changes", "error", "words"), REFUSED, ids=str)
def test_a_budget_that_experts_cannot_meet(
    family: str, changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family)
    with pytest.raises(error, match=words):
        expertprune.validate(planted_spec(folder, tmp_path, ["medical"], "impact", **changes))
