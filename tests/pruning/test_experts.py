"""Experts of a mixture from routing to plan: statistics against a slow reference, budgets, and what a spec leaves out."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import expertprune
from expertprune.artifacts.plan import StructureBudget
from expertprune.artifacts.profile import FORWARD
from expertprune.composition.scoring import corpus_score, unit_statistics
from expertprune.corpora.batches import Tokens, make_batches
from expertprune.errors import ExpertpruneError, PlanError, SpecError
from expertprune.models.passes import TextRun
from expertprune.profiling.gradients import SEGMENT
from expertprune.profiling.store import measure
from expertprune.relevance import criteria
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.units import Structure
from tests.calling import call
from tests.masks import LENGTHS, cross_entropy, measured, tiny_of, token_lists
from tests.oracle import load, read_json
from tests.patching import everywhere
from tests.profiles import made_up_about
from tests.pruning.routing import Array, gates_of, into_experts, neurons_of, numbers
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

EXPERTS, CHOSEN = 6, 2


def routing_of(model: Any, layer: int, ids: list[int]) -> tuple[Array, Array, Array]:
    """By hand, of one document alone: router weight `[tokens, experts]`, `‖E_e(x)‖` likewise, and neurons.

    The last are router weight times activation, `[tokens, experts * neurons]`, 0 where not chosen.
    """
    hidden = into_experts(model, layer, [ids])
    weights, down = gates_of(model, layer, hidden), numbers(model.model.layers[layer].mlp.experts.down_proj)
    neurons = [neurons_of(model, layer, hidden, expert) for expert in range(EXPERTS)]
    norms = np.stack([np.linalg.norm(each @ down[expert].T, axis=1) for expert, each in enumerate(neurons)], 1)
    return weights, norms, np.concatenate([each * weights[:, [e]] for e, each in enumerate(neurons)], 1)


def stored_half(found: dict[str, Tensor], name: str) -> Array:
    return numbers(found[name]) * float(found[f"{name}.scale"])


# Weights of the chosen experts are normalized in the first, not in the second.
@pytest.mark.parametrize(("name", "tokens_per_batch"), [("mixtral", 1), ("olmoe", 30)])
def test_statistics_are_those_of_each_document_alone(name: str, tokens_per_batch: int) -> None:
    model = tiny_model(name)
    found = measured(tiny_of(model).text(token_lists(), tokens_per_batch), "forward")
    assert found["heads.0.impact"].shape == (len(LENGTHS), 6)
    for layer in range(3):
        every = []
        for number, ids in enumerate(token_lists()):
            weights, norms, neurons = routing_of(model, layer, ids)
            every.append(neurons)
            chosen, written = weights > 0, weights * norms
            assert chosen.mean(0).sum() == pytest.approx(CHOSEN)
            for key, expected in (
                ("frequency", chosen.mean(0)),
                ("routed", chosen.sum(0)),
                ("norm_sum", written.sum(0)),
                ("impact", (written**2).mean(0)),
            ):
                mine = numbers(found[f"experts.{layer}.{key}"])[number]
                np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)
            rms = np.sqrt((neurons**2).mean(0))
            mine = stored_half(found, f"ffn.{layer}.rms")[number]
            np.testing.assert_allclose(mine, rms, rtol=2e-3, atol=1e-3 * rms.max())
        together = np.concatenate(every)
        sums, squares = (numbers(found[f"ffn.{layer}.{key}"]) for key in ("sum", "square_sum"))
        np.testing.assert_allclose(sums, together.sum(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(squares, (together**2).sum(0), rtol=1e-3, atol=1e-6)
        mlp = model.model.layers[layer].mlp
        router, gate_up, down = (numbers(each) for each in (mlp.gate.weight, *mlp.experts.parameters()))
        owned = np.sqrt(sum((part.reshape(EXPERTS, -1) ** 2).sum(1) for part in (router, gate_up, down)))
        np.testing.assert_allclose(numbers(found[f"experts.{layer}.weight_norm"]), owned, rtol=1e-5)
        columns, width = down.transpose(0, 2, 1).reshape(-1, 24), down.shape[2]
        rows = (gate_up**2).sum(2).reshape(EXPERTS, 2, width).sum(1).ravel()
        for key, expected in (
            ("output_l1", np.abs(columns).sum(1)),
            ("output_l2", np.sqrt((columns**2).sum(1))),
            ("weight_norm", np.sqrt((columns**2).sum(1) + rows)),
        ):
            np.testing.assert_allclose(numbers(found[f"ffn.{layer}.{key}"]), expected, rtol=1e-5)


def test_reap_is_the_mean_over_all_tokens_of_the_corpus_that_are_routed_to_an_expert(tmp_path: Path) -> None:
    """`S_j = mean_{x in X_j} g_j(x) ‖E_j(x)‖` (arXiv:2510.13999), also where one document alone needs an expert.

    Every third token is an answer's, the others weigh a quarter; a document's tokens at an expert may weigh less than one.
    """
    of, texts = tiny_of(tiny_model("qwen2_moe")), token_lists((4, 2, 6, 2, 3), seed=1)
    tokens = [Tokens(tuple(ids), tuple(place % 3 == 1 for place in range(len(ids)))) for ids in texts]
    text = TextRun(of.model, of.family, of.shapes, make_batches(tokens, 30, prompt_weight=0.25))
    profile = measure(text, [FORWARD], tmp_path / "p.safetensors", made_up_about(tokens=17, layers=of.shapes))
    alone = 0
    for layer in range(3):
        counts, sums = np.zeros((len(texts), EXPERTS)), np.zeros((len(texts), EXPERTS))
        for number, each in enumerate(tokens):
            weights, norms, _ = routing_of(of.model, layer, texts[number])
            weighed = np.where(each.answers, 1.0, 0.25)[:, None] * (weights > 0)
            counts[number], sums[number] = weighed.sum(0), (weighed * weights * norms).sum(0)
        means = sums / np.where(counts, counts, 1)
        statistics = unit_statistics(profile, Structure.EXPERTS, layer, 0)
        for how, expected in (
            ("mean", sums.sum(0) / np.where(counts.any(0), counts.sum(0), 1)),
            ("max", means.max(0)),
            (0.5, np.median(means, 0)),
        ):
            np.testing.assert_allclose(numbers(corpus_score(criteria["reap"], statistics, how)), expected, rtol=1e-5)
        alone += int(((counts > 0).sum(0) == 1).sum())
    assert alone > 0


# Shared experts, heads that are no units, weights that are transposed, and linear attention.
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_gradients_of_masks_are_those_of_one_backward_pass_through_the_whole_model(name: str) -> None:
    """A mask `m` on a column makes it `m w`, so `∂L/∂m = w · ∂L/∂w` at 1.

    A mask on a routed expert multiplies the router's weight of it, here on each token apart.
    """
    of = tiny_of(tiny_model(name).requires_grad_(False))
    found = measured(of.text(token_lists()), "language_model")
    layers = {index: layer for index, layer in enumerate(of.model.model.layers) if of.shapes[index].experts}
    down = {f"ffn.{index}": layer.mlp.experts.down_proj.requires_grad_(True) for index, layer in layers.items()}
    heads = {f"heads.{index}": layer.self_attn.o_proj.weight.requires_grad_(True)
             for index, layer in layers.items() if of.family.has_attention}  # fmt: skip
    axis = 2 if layers[1].mlp.experts.is_transposed else 1  # of the hidden size: only the sum along it counts
    masks: dict[int, Tensor] = {}
    for index, layer in layers.items():
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, given, index=index: (*given[:2], given[2] * masks[index].gather(1, given[1]))
        )
    for number, ids in enumerate(token_lists()):
        of.model.zero_grad()
        masks |= {index: torch.ones(len(ids), EXPERTS, requires_grad=True) for index in layers}
        cross_entropy(of.model, ids).backward()
        expected = {name: (weight * weight.grad).sum(axis).flatten() for name, weight in down.items()}
        expected |= {name: (weight * weight.grad).sum(0).view(6, -1).sum(1) for name, weight in heads.items()}
        expected = {f"{name}.value": each for name, each in expected.items()}
        for index, mask in masks.items():
            assert mask.grad is not None
            segments = torch.stack([part.sum(0) for part in mask.grad.split(SEGMENT)])
            expected[f"experts.{index}.value"] = segments.sum(0)
            expected[f"experts.{index}.norm"] = segments.square().sum(0).sqrt()
        for key, each in expected.items():
            mine, values = stored_half(found, key)[number], numbers(each)
            np.testing.assert_allclose(mine, values, rtol=3e-3, atol=2e-3 * np.abs(values).max())


@pytest.mark.parametrize(("name", "tokens_per_batch"), [("mixtral", 30), ("olmoe", 1000)])
def test_norms_of_gradients_are_of_masks_by_segment(
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
        cross_entropy(model, ids).backward()
        for index, output in enumerate(outputs):
            gradient = numbers(output.grad).reshape(len(ids), -1)
            down = numbers(model.model.layers[index].mlp.experts.down_proj)
            by_token = routing_of(model, index, ids)[2] * np.concatenate([gradient @ each for each in down], 1)
            segments = np.stack([by_token[first : first + 4].sum(0) for first in range(0, len(ids), 4)])
            experts = segments.reshape(len(segments), EXPERTS, -1).sum(2)
            for key, each in (("ffn", segments), ("experts", experts)):
                expected = np.sqrt((each**2).sum(0))
                mine = stored_half(found, f"{key}.{index}.norm")[number]
                np.testing.assert_allclose(mine, expected, rtol=3e-3, atol=2e-3 * expected.max())


# --- budgets, and what a spec leaves out ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, made once."""
    root = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda family: save_tiny(root / family, family))


SpecOf = Callable[..., Spec]


@pytest.fixture
def spec_of(spec_data: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path) -> SpecOf:
    """A spec as short as a user may write it, about one corpus."""

    def made(family: str, budget: dict[str, Any], **others: Any) -> Spec:
        short = {"base": str(bases(family)), "dimensions": {"domain": "medical"}, "general": [], "relevance": {},
                 "compose": {}, "evaluate": {"enabled": False}, "budget": {"multiple_of": 8, **budget}}  # fmt: skip
        return parse_spec({**spec_data, **short, **others}, "spec", tmp_path)

    return made


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_the_composer_keeps_the_experts_of_the_highest_score(
    criterion: str, spec_of: SpecOf, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = expertprune.compose(spec_of("mixtral", {"experts": 3}, relevance={"criterion": criterion}))
    lines = (tmp_path / "medical.jsonl").read_text().splitlines()
    texts, model = [tiny_tokenizer()(json.loads(line)["text"])["input_ids"] for line in lines], load(bases("mixtral"))
    for layer, kept in enumerate(plan.kept):
        routings = [routing_of(model, layer, ids) for ids in texts]
        frequency = np.mean([(weights > 0).mean(0) for weights, _, _ in routings], 0)
        weights, norms = (np.concatenate([each[part] for each in routings]) for part in (0, 1))
        reap = (weights * norms).sum(0) / (weights > 0).sum(0)
        best = np.argsort(-(reap if criterion == "reap" else frequency))[:3]
        assert list(kept.experts) == sorted(best)


@pytest.fixture
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF has no form for the tokenizers of tiny models."""
    everywhere(monkeypatch, "expertprune.models.gguf.writing.check_gguf", lambda checkpoint: None)


FFN, BOTH, GGUF = {"ffn": 0.25}, {"experts": 2, "ffn": 8}, {"serve_with": "gguf"}
# What a spec says over a mixture, or over the family that is named.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"budget": {"experts": 5}}, PlanError, "the router chooses 2 for each token.*at most 4 can be"),
    ({"family": "deepseek_v3", "budget": {"experts": 3}}, PlanError,
     r"2 for each token, each of its 2 groups keeps at least 2, and budget\.floor is 0\.1; at most 2 can be"),
    ({"budget": {"experts": 0.9}}, PlanError, "5 of 6 routed experts cannot be removed"),
    ({"family": "deepseek_v3", "budget": {"parameters": 0.9}}, PlanError,
     r"largest legal one is [0-9.]+; add budget\.layers or budget\.vocabulary$"),
    ({"budget": {"experts": 0.05}}, PlanError, "less than half a routed expert and removes nothing"),
    ({"budget": {"ffn": 0.25, "multiple_of": 4}}, PlanError, "multiple_of: 4 is no multiple of 8"),
    ({"budget": {"ffn": 5}}, PlanError, "budget.ffn: 5 neurons cannot be removed"),
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
    ({"family": "glm4_moe", **GGUF, "budget": {"experts": 1}}, ExpertpruneError,
     "serve_with: models of family 'glm4_moe' cannot be written as GGUF"),
    ({"family": "qwen2", **GGUF, "budget": FFN, "compose": {"allocation": "global"}}, ExpertpruneError,
     r"llama\.cpp reads no layers of different widths"),
    ({"family": "qwen2", **GGUF, "budget": {**FFN, "kv_groups": 1}}, ExpertpruneError,
     r"budget\.kv_groups: llama\.cpp reads no model"),
    ({"family": "llama"}, PlanError, r"budget\.experts: layers of family 'llama' have none"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=str)
def test_bad_specs_are_refused(
    changes: dict[str, Any], error: type[Exception], words: str, spec_of: SpecOf, any_tokenizer: None
) -> None:
    said = {"family": "mixtral", "budget": {"experts": 2}, "relevance": "impact", "compose": {"allocation": "uniform"}}
    with pytest.raises(error, match=words):
        expertprune.validate(spec_of(**{**said, **changes}))


# By budget and what else a spec says: the criterion, that of experts, and the allocation.
DECIDED: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, str | None, str]]] = [
    ("mixtral", {"parameters": 0.2}, {}, ("reap", "reap", "uniform")),
    ("mixtral", {"kv_groups": 1}, {}, ("fisher", "reap", "uniform")),
    ("mixtral", BOTH, {}, ("fisher", "reap", "uniform")),
    ("mixtral", BOTH, {"relevance": {"criterion": "activation", "experts": "frequency"}},
     ("activation", "frequency", "uniform")),
    ("mixtral", {"experts": 2}, {"relevance": {"criterion": "fisher"}}, ("fisher", "fisher", "uniform")),
    ("llama", FFN, {}, ("fisher", None, "global")),
    ("starcoder2", FFN, {}, ("fisher", None, "uniform")),
    ("starcoder2", FFN, {"serve_with": "transformers"}, ("fisher", None, "global")),
    ("llama", FFN, {"serve_with": ["vllm", "gguf"]}, ("fisher", None, "global")),
    ("qwen2", FFN, {"serve_with": ["vllm", "gguf"]}, ("fisher", None, "uniform")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "budget", "others", "expected"), DECIDED, ids=str)
def test_criterion_and_allocation_may_be_left_out(
    family: str, budget: dict[str, Any], others: dict[str, Any], expected: tuple[str, str | None, str], spec_of: SpecOf,
    any_tokenizer: None,
) -> None:  # fmt: skip
    spec = expertprune.validate(spec_of(family, budget, **others)).spec
    assert (spec.relevance.criterion, spec.relevance.experts, spec.compose.allocation) == expected


def test_what_was_decided_is_said_and_decides_the_same(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("mixtral", {"experts": 2})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.document()))
    assert "criterion reap, experts reap, allocation uniform" in call("validate", tmp_path / "spec.yaml").output
    plan = expertprune.compose(spec)
    assert spec.compose.allocation == "auto", "the caller's spec stays as it was"
    assert (plan.spec["relevance"]["criterion"], plan.spec["relevance"]["experts"]) == ("reap", "reap")
    assert expertprune.compose(Spec.model_validate(plan.spec)).digest == plan.digest
    plan.save(tmp_path / "plan.json")
    told = call("inspect", tmp_path / "plan.json").output
    for words in (r"criterion +│ reap", r"criterion of routed experts +│ reap", r"allocation +│ uniform"):
        assert re.search(words, told), told


def test_each_expert_keeps_its_own_best_neurons(spec_of: SpecOf) -> None:
    relevance = {"criterion": "impact", "experts": "reap"}
    plan = expertprune.compose(spec_of("mixtral", {"ffn": 0.5, "experts": 2}, relevance=relevance))
    assert plan.budget["ffn"] == StructureBudget(requested=0.5, of=32, kept=16, removed=16)
    chosen = set()
    for layer in plan.kept:
        assert len(layer.experts) == 4
        assert [unit // 32 for unit in layer.ffn] == [expert for expert in layer.experts for _ in range(16)]
        chosen |= {tuple(unit % 32 for unit in layer.ffn if unit // 32 == expert) for expert in layer.experts}
    assert len(chosen) == 12, "every expert of every layer chooses for itself"
    # of three layers: two experts of three matrices and a router's row, and 16 neurons of each of the four others
    gone = 3 * (2 * (3 * 24 * 32 + 24) + 4 * 16 * 3 * 24)
    assert plan.parameters.before - plan.parameters.after == gone


def test_parameters_beside_experts_are_met_by_neurons(spec_of: SpecOf) -> None:
    plan = expertprune.compose(spec_of("mixtral", {"experts": 1, "parameters": 0.4}))
    assert plan.budget["experts"].kept == 5
    before, gone = plan.parameters.before, plan.parameters.before - plan.parameters.after
    step = 3 * 5 * 8 * 3 * 24  # of three layers, five experts, eight neurons of three matrices
    assert gone >= 0.4 * before > gone - step
    expert = 3 * (3 * 24 * 32 + 24)  # of three layers, three matrices and a row of the router
    assert (gone - expert) % step == 0
    plan = expertprune.compose(spec_of("mixtral", {"parameters": 0.2}))  # alone, by whole experts
    count, gone = plan.budget["experts"].removed, plan.parameters.before - plan.parameters.after
    assert (plan.budget["ffn"].removed, gone) == (0, count * expert)
    assert gone >= 0.2 * before > gone - expert


@pytest.mark.parametrize(
    ("name", "budget", "kept"),
    [
        ("deepseek_v3", {"experts": 0.34}, {"n_routed_experts": 4, "num_attention_heads": 6}),
        ("gpt_oss", {"experts": 1, "ffn": 8, "kv_groups": 1}, {"num_local_experts": 5, "intermediate_size": 24}),
    ],
)
def test_models_whose_layers_are_of_different_kinds_are_built(
    name: str, budget: dict[str, Any], kept: dict[str, int], spec_of: SpecOf, tmp_path: Path
) -> None:
    """Profiled, composed, repaired, written and explained, from a spec that names a budget alone."""
    out = expertprune.build(spec_of(name, budget), tmp_path / "expert", store=tmp_path / "store")
    config, expert = read_json(out / "config.json"), load(out)
    assert {key: config[key] for key in kept} == kept
    stored = sum(parameter.numel() for parameter in expert.parameters())
    # the bias that corrects a router's choice is stored beside the parameters
    stored += sum(buffer.numel() for path, buffer in expert.named_buffers() if path.endswith("correction_bias"))
    assert read_json(out / "expertprune.json")["parameters"]["after"] == stored
    assert call("inspect", out).output
