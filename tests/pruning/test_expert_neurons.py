"""Neurons inside experts from statistics to plan, and what a spec for a mixture of experts may leave out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import expertprune
from expertprune.arch import families, family_of
from expertprune.artifacts.plan import StructureBudget
from expertprune.profiling.forward import forward_pass
from expertprune.profiling.gradients import gradient_pass
from expertprune.spec.schema import Spec
from tests.calling import call
from tests.masks import LENGTHS, tiny_of, token_lists
from tests.oracle import load, read_json
from tests.pruning.test_experts import EXPERTS, Array, numbers, planted_spec, routing_of, silu
from tests.tiny import save_tiny, tiny_model

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
    found = forward_pass(tiny_of(model).text(token_lists(), tokens_per_batch))
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
    found = gradient_pass(tiny_of(model).text(token_lists()), "language_model")
    layers = model.model.layers
    weights = [(layer.mlp.experts.down_proj, layer.self_attn.o_proj.weight) for layer in layers]
    for weight in (each for pair in weights for each in pair):
        weight.requires_grad_(True)
    for number, ids in enumerate(token_lists()):
        model.zero_grad()
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
        for layer, (down, heads) in enumerate(weights):
            neurons = numbers((down * down.grad).sum(1)).ravel()
            of_experts = neurons.reshape(EXPERTS, -1).sum(1)
            of_heads = numbers((heads * heads.grad).sum(0)).reshape(6, -1).sum(1)
            for key, expected in (("ffn", neurons), ("experts", of_experts), ("heads", of_heads)):
                mine = stored_half(found, f"{key}.{layer}.value")[number]
                np.testing.assert_allclose(mine, expected, rtol=3e-3, atol=2e-3 * np.abs(expected).max())
    assert found["ffn.0.value"].shape == (len(LENGTHS), EXPERTS * WIDTH[name])


# --- plans ------------------------------------------------------------------------------------------------------------


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


def test_planted_neurons_are_found(tmp_path: Path) -> None:
    """Neurons that write nothing go first, other ones in each expert."""
    folder = save_tiny(tmp_path / "base", "qwen3_moe")
    model = load(folder)
    expected = []
    for number, layer in enumerate(model.model.layers):
        useless = [(np.arange(8) * 3 + expert + number) % 16 for expert in range(EXPERTS)]
        for expert, neurons in enumerate(useless):
            layer.mlp.experts.down_proj[expert][:, neurons] = 0
        expected.append({expert * 16 + int(neuron) for expert, each in enumerate(useless) for neuron in each})
    model.save_pretrained(folder)
    for relevance in ({}, {"criterion": "impact"}, {"criterion": "activation"}):
        plan = expertprune.compose(spec_of(folder, tmp_path, {"ffn": 0.5}, relevance=relevance))
        assert [set(range(EXPERTS * 16)) - set(layer.ffn) for layer in plan.kept] == expected


def test_parameters_beside_experts_are_met_by_neurons(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    plan = expertprune.compose(spec_of(folder, tmp_path, {"experts": 1, "parameters": 0.4}))
    assert plan.budget["experts"].kept == 5
    before, after = plan.parameters.before, plan.parameters.after
    step = 3 * 5 * 8 * 3 * 24  # of three layers, five experts, eight neurons of three matrices
    assert before - after >= 0.4 * before > before - after - step
    assert (before - after - 3 * (3 * 24 * 32 + 24)) % step == 0


def test_experts_with_fewer_neurons_are_built_from_the_shortest_spec(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "base", "mixtral")
    spec = spec_of(folder, tmp_path, {"ffn": 0.25, "experts": 1, "kv_groups": 1})
    out = expertprune.build(spec, tmp_path / "expert", store=tmp_path / "store")
    assert "neurons of routed experts are cut without repair" in caplog.text
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
    ("family", "allocation"), [("llama", "global"), ("qwen2", "global"), ("starcoder2", "uniform")]
)
def test_criterion_and_allocation_of_dense_models(family: str, allocation: str, tmp_path: Path) -> None:
    assert bool(family_of(family).vllm_single_layers) == (allocation == "global")
    folder = save_tiny(tmp_path / "base", family)
    prepared = expertprune.validate(spec_of(folder, tmp_path, {"ffn": 0.25}))
    assert (prepared.spec.relevance.criterion, prepared.spec.relevance.experts) == ("fisher", None)
    assert prepared.spec.compose.allocation == allocation


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
