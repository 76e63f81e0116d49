"""Adapters cut along: the expert with the cut adapter computes what the masked base computes with the whole one, in PEFT."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expertprune
from expertprune.artifacts.plan import LayerPlan, Plan, VocabularyPlan
from expertprune.composition.rows import essentials
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.inventory import vocabulary_rows
from expertprune.models.loading import load_model
from expertprune.units import GONE, KeptRows
from tests.adapters import CONFIG, LINEAR, WEIGHTS, expert_of, trained, with_adapter
from tests.calling import call, call_json
from tests.oracle import (
    assert_same,
    contents,
    exact,
    logits_of,
    masked,
    masked_logits,
    plan_of,
    random_plan,
    random_units,
    read_json,
    resolved,
)
from tests.tiny import save_tiny
from tests.vocabularies import save_worded

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = {"ffn": 13, "heads_per_group": 1, "kv_groups": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}


def own_widths(base: ResolvedBase) -> Plan:
    generator = torch.Generator().manual_seed(3)
    widths: list[dict[str, int]] = [{"ffn": 19}, {}, {"ffn": 7, "heads_per_group": 1}]
    return plan_of(
        base, [random_units(shape, generator, **kept) for shape, kept in zip(base.layers, widths, strict=True)]
    )


MakePlan = Callable[[ResolvedBase], Plan]
CASES: dict[str, tuple[dict[str, Any], dict[str, int] | MakePlan, dict[str, Any]]] = {
    "all modules, with ranks and scales of their own": (
        {"family": "llama", **BIASES}, ALL,
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 2}, "use_rslora": True,
         "alpha_pattern": {"down_proj": 9}, "lora_bias": True},
    ),
    "some layers": (
        {"family": "llama"}, ALL, {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": [0, 2]},
    ),
    "layers of their own widths": ({"family": "llama"}, own_widths, {"target_modules": r".*\.(q|up|down)_proj"}),
    "norms behind the blocks": ({"family": "gemma3"}, ALL, {"target_modules": "all-linear"}),
    "another config for fewer heads": ({"family": "qwen2"}, ALL, {"target_modules": LINEAR}),
    "fused projections": (
        {"family": "phi3"}, ALL, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
    "no gate": ({"family": "starcoder2"}, ALL, {"target_modules": [*ATTENTION, "c_fc", "c_proj"]}),
    "DoRA where rows go": (
        {"family": "llama", **BIASES}, ALL, {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True},
    ),
    "weights of its own": (
        {"family": "llama", **BIASES}, ALL, {"target_modules": ["up_proj"], "modules_to_save": ["q_proj", "o_proj", "norm"]},
    ),
    "heads of its own on tied embeddings": (
        {"family": "llama", "tie_word_embeddings": True}, {"ffn": 20}, {"target_modules": ["lm_head", "down_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cut_adapter_and_expert_equal_the_masked_base_with_the_adapter(case: str, tmp_path: Path, store: Path) -> None:
    changes, cut, config = CASES[case]
    base = resolved(save_tiny(tmp_path / "base", **changes), store)
    plan = cut(base) if callable(cut) else random_plan(base, 2, **cut)
    adapter = trained(base.folder, tmp_path / "adapter", **config)
    expert = expert_of(plan, base, tmp_path / "expert")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    model = with_adapter(exact(base.folder), adapter)
    with masked(model.get_base_model(), plan):
        expected = logits_of(model)
    small = load_model(expert, torch.float64, torch.device("cpu"))
    without = logits_of(small)
    assert_same(logits_of(with_adapter(small, tmp_path / "cut")), expected)
    assert (without - expected).abs().max() > 0.1, "the adapter must do something"
    unchanged = read_json(adapter / CONFIG) | {"base_model_name_or_path": "expert", "revision": None}
    assert read_json(tmp_path / "cut" / CONFIG) == unchanged


# --- routed experts -------------------------------------------------------------------------------------------------

STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "router and attention too": (
        "qwen3_moe", {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*STACKED, "mlp.gate.weight"]},
    ),
    "one of the two": ("qwen3_moe", {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "gates and values alternate": ("gpt_oss", {"target_modules": ["v_proj"], "target_parameters": STACKED}),
    "stored under other names": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": STACKED}),
}  # fmt: skip


def merged(base: Path, adapter: Path) -> Any:
    """The base with the adapter in its weights: masks of routed experts then hold for both."""
    return with_adapter(exact(base), adapter).merge_and_unload()


@pytest.mark.parametrize("case", ROUTED)
def test_lora_of_routed_experts_is_cut_along(case: str, tmp_path: Path, store: Path) -> None:
    family, config = ROUTED[case]
    base = resolved(save_tiny(tmp_path / "base", family), store)
    plan = random_plan(base, 5, experts=4, ffn=11, heads_per_group=1)
    adapter = trained(base.folder, tmp_path / "adapter", r=3, **config)
    expert = expert_of(plan, base, tmp_path / "expert")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    small = exact(expert)
    without, expected = logits_of(small), masked_logits(merged(base.folder, adapter), plan)
    assert_same(logits_of(with_adapter(small, tmp_path / "cut")), expected)
    assert (without - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", ("mlp.experts", "gate_proj", "up_proj", "down_proj")),
        ("mixtral", ("block_sparse_moe.experts", "w1", "w3", "w2")),
    ],
)
def test_lora_of_single_routed_experts_is_renumbered(
    family: str, names: tuple[str, ...], tmp_path: Path, store: Path
) -> None:
    """As PEFT wrote them before transformers stacked routed experts; PEFT reads them still, and stacks them."""
    base = resolved(save_tiny(tmp_path / "base", family), store)
    plan = random_plan(base, 5, experts=4, ffn=11)
    adapter = trained(base.folder, tmp_path / "adapter", r=3, target_modules=["q_proj"])
    module, gate, up, down = names
    ffn, generator = base.layers[0].ffn, torch.Generator().manual_seed(7)
    tensors = load_file(adapter / WEIGHTS)
    for layer in range(3):
        for number in range(6):
            for name in (gate, up, down):
                inputs, outputs = (ffn, 24) if name == down else (24, ffn)
                path = f"base_model.model.model.layers.{layer}.{module}.{number}.{name}"
                tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(3, inputs, generator=generator).double()
                tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(outputs, 3, generator=generator).double()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    config = read_json(adapter / CONFIG) | {"target_modules": ["q_proj", gate, up, down]}
    (adapter / CONFIG).write_text(json.dumps(config))
    expert = expert_of(plan, base, tmp_path / "expert")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    small = exact(expert)
    without, expected = logits_of(small), masked_logits(merged(base.folder, adapter), plan)
    assert_same(logits_of(with_adapter(small, tmp_path / "cut")), expected)
    assert (without - expected).abs().max() > 1, "PEFT must have read the routed experts' part"
    config["target_modules"] = ["q_proj", f"{module}.3.{down}"]
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{module}.3.{down}' names a routed expert by a number that changes"):
        expertprune.cut_adapter(adapter, expert, tmp_path / "again")


# --- the vocabulary, and experts of experts -----------------------------------------------------------------------------


PADDING = (3, 5)


def with_rows(plan: Plan, base: ResolvedBase) -> Plan:
    """The plan with every third token, and what these need."""
    must = essentials(base)
    kept = tuple(sorted(must.vocabulary.closed({*range(0, 400, 3)} | must.ids)))
    rows = KeptRows(vocabulary_rows(base.checkpoint, base.family), kept, PADDING)
    return replace(plan, vocabulary=VocabularyPlan(rows, base.tokenizer_digest))


def rows_of(plan: Plan) -> tuple[int, ...]:
    assert plan.vocabulary is not None
    return plan.vocabulary.rows.kept


def test_lora_of_the_vocabulary_loses_rows(tmp_path: Path, store: Path) -> None:
    """PEFT stores the embedding and the head themselves beside such LoRA, so they are cut too."""
    base = resolved(save_worded(tmp_path / "base", tie_word_embeddings=False), store)
    plan = with_rows(random_plan(base, 1, ffn=20), base)
    kept = rows_of(plan)
    adapter = trained(
        base.folder, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "up_proj", "down_proj"]
    )
    expert = expert_of(plan, base, tmp_path / "expert")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    stored = load_file(tmp_path / "cut" / WEIGHTS)
    assert stored["base_model.model.model.embed_tokens.base_layer.weight"].shape == (len(kept) + 2, 24)
    model = with_adapter(exact(base.folder), adapter)
    ids = torch.tensor([kept[3:15], kept[80:92]])
    with masked(model.get_base_model(), plan):
        expected = logits_of(model, ids)[..., [*kept, *PADDING]]
    new: Tensor = torch.tensor([[*range(3, 15)], [*range(80, 92)]])
    assert_same(logits_of(with_adapter(exact(expert), tmp_path / "cut"), new), expected)


def test_tokens_that_are_named_by_id_need_the_whole_vocabulary(tmp_path: Path, store: Path) -> None:
    base = resolved(save_worded(tmp_path / "base"), store)
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["v_proj"], trainable_token_indices=[4, 9])
    plan = random_plan(base, 1, ffn=20)
    whole = expert_of(plan, base, tmp_path / "whole")
    expertprune.cut_adapter(adapter, whole, tmp_path / "cut")
    model = with_adapter(exact(base.folder), adapter)
    with masked(model.get_base_model(), plan):
        expected = logits_of(model)
    assert_same(logits_of(with_adapter(exact(whole), tmp_path / "cut")), expected)
    fewer = expert_of(with_rows(plan, base), base, tmp_path / "fewer")
    with pytest.raises(CheckpointError, match="trainable_token_indices names tokens by ids"):
        expertprune.cut_adapter(adapter, fewer, tmp_path / "again")


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Plan]]:
    """The folder of a base, of an expert of it, `first`, and of an expert of that one, `second`; and the two plans."""
    folder = tmp_path_factory.mktemp("twice")
    base = resolved(save_worded(folder / "base", tie_word_embeddings=False), folder / "store")
    plans = [with_rows(random_plan(base, 1, ffn=24, kv_groups=2), base)]
    first = resolved(expert_of(plans[0], base, folder / "first"), folder / "store")
    plans.append(random_plan(first, 2, ffn=11, heads_per_group=1))
    expert_of(plans[1], first, folder / "second")
    return folder, plans


def test_an_adapter_of_the_first_base_is_cut_along_all_plans(twice: tuple[Path, list[Plan]], tmp_path: Path) -> None:
    """Along both at once as along one after the other; and an adapter of the first expert along the second plan alone."""
    folder, plans = twice
    adapter = trained(folder / "base", tmp_path / "adapter", target_modules=[*LINEAR, "lm_head"])
    cut = expertprune.cut_adapter(adapter, folder / "second", tmp_path / "both")
    assert (cut.plans, cut.base, cut.before > cut.after) == (2, "base", True)
    expertprune.cut_adapter(adapter, folder / "first", tmp_path / "one")
    config = read_json(tmp_path / "one" / CONFIG) | {"base_model_name_or_path": "somewhere/else/first"}
    (tmp_path / "one" / CONFIG).write_text(json.dumps(config))
    assert expertprune.cut_adapter(tmp_path / "one", folder / "second", tmp_path / "two").plans == 1
    both, two = load_file(tmp_path / "both" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert both.keys() == two.keys()
    assert all(torch.equal(both[name], two[name]) for name in both)
    model = with_adapter(exact(folder / "first"), tmp_path / "one")
    with masked(model.get_base_model(), plans[1]):
        expected = logits_of(model)
    assert_same(logits_of(with_adapter(exact(folder / "second"), tmp_path / "both")), expected)


# --- fewer layers -------------------------------------------------------------------------------------------------------


def without_layer(base: ResolvedBase, gone: int, seed: int, **widths: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    layers = enumerate(base.layers)
    return plan_of(
        base, [GONE if layer == gone else random_units(shape, generator, **widths) for layer, shape in layers]
    )


@contextlib.contextmanager
def skipping(model: Any, plan: Plan) -> Iterator[None]:
    """While open, layers that the plan has no more hand on what they get; those that stay are masked."""
    whole = [shape.all_kept if units.gone else units for shape, units in zip(plan.shapes, plan.kept, strict=True)]
    layers = [model.model.layers[layer] for layer in plan.gone]
    handles = [layer.register_forward_hook(lambda _, given, __: given[0]) for layer in layers]
    with masked(model, replace(plan, layers=[LayerPlan(units) for units in whole])):
        yield
    for handle in handles:
        handle.remove()


NUMBERED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "layers to transform": (
        "llama", {"target_modules": LINEAR, "layers_to_transform": [0, 1, 3]},
        {"target_modules": LINEAR, "layers_to_transform": [0, 2]},
    ),
    "layers to transform of which none stays, and the head": (
        "llama", {"target_modules": ["o_proj", "lm_head"], "layers_to_transform": [1]},
        {"target_modules": ["o_proj", "lm_head"], "layers_to_transform": [3]},
    ),
    "full names, and patterns of ranks and scales": (
        "llama",
        {"target_modules": ["model.layers.1.mlp.up_proj", "layers.3.mlp.up_proj", "k_proj"],
         "rank_pattern": {r"layers\.3\.mlp\.up_proj": 2, "layers.1.mlp.up_proj": 3, "k_proj": 5},
         "alpha_pattern": {"^model.layers.2.self_attn.k_proj": 30}},
        {"target_modules": ["layers.2.mlp.up_proj", "k_proj"], "rank_pattern": {r"layers\.2\.mlp\.up_proj": 2, "k_proj": 5},
         "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 30}},
    ),
    "an expression for all layers": (
        "gemma3", {"target_modules": r".*\.layers\.[0-9]+\.mlp\.\w+_proj", "modules_to_save": ["q_norm"]},
        {"target_modules": r".*\.layers\.[0-9]+\.mlp\.\w+_proj", "modules_to_save": ["q_norm"]},
    ),
    "routed experts": (
        "qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["layers.3.mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["layers.2.mlp.experts.down_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERED)
def test_layers_are_renumbered_where_some_go(case: str, tmp_path: Path, store: Path) -> None:
    family, config, expected_config = NUMBERED[case]
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3" else {}
    base = resolved(save_tiny(tmp_path / "base", family, num_hidden_layers=4, **kinds), store)
    plan = without_layer(base, 1, 4, ffn=11)
    adapter = trained(base.folder, tmp_path / "adapter", **config)
    expert = expert_of(plan, base, tmp_path / "expert")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    model = merged(base.folder, adapter)
    with skipping(model, plan):
        expected = logits_of(model)
    small = exact(expert)
    without, found = logits_of(small), logits_of(with_adapter(small, tmp_path / "cut"))
    assert_same(found, expected)
    assert (without - expected).abs().max() > 0.05
    stored = read_json(tmp_path / "cut" / CONFIG)
    for key, value in expected_config.items():
        assert (sorted(stored[key]) if isinstance(value, list) else stored[key]) == (
            sorted(value) if isinstance(value, list) else value
        )


def test_layers_go_one_after_the_other_along_a_chain(tmp_path: Path, store: Path) -> None:
    """Of layers 0 to 3 first 1 goes, then the expert's 1, which was 2: what was 3 is 1 in the end."""
    base = resolved(save_tiny(tmp_path / "base", "qwen3_moe", num_hidden_layers=4), store)
    first = resolved(expert_of(without_layer(base, 1, 1, ffn=12), base, tmp_path / "first"), store)
    second = expert_of(without_layer(first, 1, 2, experts=4), first, tmp_path / "second")
    parameters = [f"layers.{layer}.mlp.experts.{name}_proj" for layer in range(4) for name in ("gate_up", "down")]
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=parameters)
    assert expertprune.cut_adapter(adapter, second, tmp_path / "both").plans == 2
    expertprune.cut_adapter(adapter, first.folder, tmp_path / "one")
    changed(tmp_path / "one", base_model_name_or_path="first")
    expertprune.cut_adapter(tmp_path / "one", second, tmp_path / "two")
    both, two = load_file(tmp_path / "both" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert both.keys() == two.keys()
    assert {name.split(".")[4] for name in both} == {"0", "1"}
    assert all(torch.equal(both[name], two[name]) for name in both)
    assert sorted(read_json(tmp_path / "both" / CONFIG)["target_parameters"]) == sorted(parameters[:4])
    either = trained(first.folder, tmp_path / "either", target_modules=["o_proj"])
    changed(either, base_model_name_or_path="owner/model")  # its layers 0 to 2 could be those of either base
    with pytest.raises(
        CheckpointError, match="shapes do not tell which base the adapter is of: first, which was cut from"
    ):
        expertprune.cut_adapter(either, second, tmp_path / "none", same_base=True)
    alone = trained(base.folder, tmp_path / "alone", target_modules=["o_proj"], layers_to_transform=[1, 2])
    whole = trained(
        base.folder, tmp_path / "whole", target_modules=["o_proj"], layers_to_transform=[1, 2],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    for adapter_ in (alone, whole):
        with pytest.raises(
            CheckpointError, match="its LoRA changes only layers or routed experts that the expert does"
        ):
            expertprune.cut_adapter(adapter_, second, tmp_path / "none")
    changed(adapter, target_modules=r".*layers\.[023]\..*o_proj")
    with pytest.raises(CheckpointError, match="names layers or routed experts by numbers, some of which change"):
        expertprune.cut_adapter(adapter, second, tmp_path / "none")


# --- bad input ----------------------------------------------------------------------------------------------------------


def changed(adapter: Path, **config: Any) -> None:
    (adapter / CONFIG).write_text(json.dumps(read_json(adapter / CONFIG) | config))


def without(adapter: Path, *names: str) -> None:
    for name in names:
        (adapter / name).unlink()


def pickled(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def truncated(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])


def tensors(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    stored = load_file(adapter / WEIGHTS)
    change(stored)
    save_file(stored, adapter / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
HURT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda a: without(a, CONFIG), "is no PEFT adapter (it has no adapter_config.json)"),
    "no JSON": (lambda a: (a / CONFIG).write_text("{"), "adapter_config.json: not valid JSON"),
    "no weights": (lambda a: without(a, WEIGHTS), "has no adapter_model.safetensors"),
    "a pickle": (pickled, "holds only adapter_model.bin, a pickle, which could run code when read"),
    "damaged": (truncated, "adapter_model.safetensors: truncated or corrupt"),
    "rank 0": (lambda a: changed(a, r=0), "adapter_config.json: r: must be at least 1 (found 0)"),
    "rank 0 of one module": (lambda a: changed(a, rank_pattern={"q_proj": 0}), "rank_pattern: a rank is 0"),
    "another rank": (lambda a: changed(a, r=5), "is of rank 4, and adapter_config.json says r: 5"),
    "prefix tuning": (lambda a: changed(a, peft_type="PREFIX_TUNING"), "peft_type is PREFIX_TUNING, and only LORA"),
    "IA3": (lambda a: changed(a, peft_type="IA3"), "peft_type is IA3, and only LORA"),
    "biases": (lambda a: changed(a, bias="lora_only"), "bias is 'lora_only'"),
    "PiSSA": (lambda a: changed(a, init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
    "layers twice": (lambda a: changed(a, layer_replication=[[0, 2]]), "layer_replication: an adapter with layers"),
    "another base": (
        lambda a: changed(a, base_model_name_or_path="owner/model"),
        "base_model_name_or_path is 'owner/model', and the expert second was cut from first, which was cut from base; "
        "if it is the same model under another name, give --same-base",
    ),
    "no base": (lambda a: changed(a, base_model_name_or_path=None), "base_model_name_or_path is None, and the expert"),
    "of the expert itself": (
        lambda a: changed(a, base_model_name_or_path="x/second"), "is an adapter of the expert second itself",
    ),
    "other shapes": (
        lambda a: tensors(a, lambda t: t.update({Q.format("A"): torch.ones(4, 32)})),
        f"does not go with base, the base of the expert first: {Q.format('A')} is [4, 32], and that base makes it [4, 24]",
    ),
    "half of a product": (lambda a: tensors(a, lambda t: t.pop(Q.format("B"))), f"holds {Q.format('A')}, and no"),
    "no such module": (
        lambda a: tensors(a, lambda t: t.update({Q.format("A").replace("q_proj", "qkv"): torch.ones(4, 24)})),
        "the base has no model.layers.0.self_attn.qkv.weight",
    ),
    "no such layer": (
        lambda a: tensors(a, lambda t: t.update({Q.format("A").replace(".0.", ".3."): torch.ones(4, 24)})),
        "is in layer 3, and there are only 3",
    ),
    "not finite": (
        lambda a: tensors(a, lambda t: t[Q.format("A")].mul_(float("nan"))), f"{Q.format('A')} holds values that are not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HURT)
def test_bad_adapters_are_refused_by_name_and_leave_nothing(
    what: str, twice: tuple[Path, list[Plan]], plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    hurt, message = HURT[what]
    hurt(tmp_path / "adapter")
    result = call("adapter", tmp_path / "adapter", "--expert", twice[0] / "second", "--out", tmp_path / "cut", code=2)
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def plain(twice: tuple[Path, list[Plan]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        twice[0] / "base", tmp_path_factory.mktemp("plain") / "adapter", target_modules=["q_proj", "down_proj"]
    )


def test_the_line_that_serves_an_adapter_has_its_rank(twice: tuple[Path, list[Plan]], tmp_path: Path) -> None:
    base, expert = twice[0] / "base", twice[0] / "second"
    for rank, option in ((16, "--enable-lora --lora-modules"), (33, "--enable-lora --max-lora-rank 64 --lora-modules")):
        adapter = trained(base, tmp_path / f"given-{rank}", target_modules=["q_proj"], r=rank)
        assert option in call("adapter", adapter, "--expert", expert, "--out", tmp_path / f"cut-{rank}").stdout


def test_a_base_under_another_name_is_found_by_its_shapes(
    twice: tuple[Path, list[Plan]], plain: Path, tmp_path: Path
) -> None:
    expertprune.cut_adapter(plain, twice[0] / "second", tmp_path / "expected")
    shutil.copytree(plain, tmp_path / "adapter")
    changed(tmp_path / "adapter", base_model_name_or_path="owner/model")
    for expected, given in (("expected", plain), ("first", tmp_path / "one")):
        if expected == "first":  # an adapter of the first expert: only the second plan is left
            expertprune.cut_adapter(plain, twice[0] / "first", given)
            changed(given, base_model_name_or_path="owner/other")
        else:
            given = tmp_path / "adapter"
        out = tmp_path / f"cut-{expected}"
        found = call_json("adapter", given, "--expert", twice[0] / "second", "--out", out, "--same-base")
        assert found["plans"] == (2 if expected == "expected" else 1)
        assert load_file(out / WEIGHTS).keys() == load_file(tmp_path / "expected" / WEIGHTS).keys()
        for name, tensor in load_file(tmp_path / "expected" / WEIGHTS).items():
            assert torch.equal(load_file(out / WEIGHTS)[name], tensor)


def test_what_the_expert_has_less_of_is_refused(tmp_path: Path, store: Path) -> None:
    base = resolved(save_worded(tmp_path / "base"), store)
    plan = with_rows(random_plan(base, 1, ffn=20), base)
    expert = expert_of(plan, base, tmp_path / "expert", method="least_squares")
    for name, config, message in (
        ("dora", {"target_modules": ["down_proj"], "use_dora": True}, "norms that DoRA"),
        ("rows", {"target_modules": ["embed_tokens"], "use_dora": True}, "norms that DoRA"),
        ("own", {"target_modules": ["v_proj"], "modules_to_save": ["down_proj"]}, "repair has solved for"),
    ):
        adapter = trained(base.folder, tmp_path / name, **config)
        with pytest.raises(CheckpointError, match=message):
            expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    kept = trained(base.folder, tmp_path / "kept", target_modules=["v_proj"], modules_to_save=["o_proj"])
    with pytest.raises(CheckpointError, match="repair has solved for"):
        expertprune.cut_adapter(kept, expert, tmp_path / "cut")


def test_overwrite_replaces_cut_adapters_only(twice: tuple[Path, list[Plan]], plain: Path, tmp_path: Path) -> None:
    expert = twice[0] / "second"
    (tmp_path / "own").mkdir()
    shutil.copytree(plain, tmp_path / "own", dirs_exist_ok=True)
    before = contents(tmp_path / "own")
    for arguments, message in (
        ([], "exists; choose another --out, or give --overwrite"),
        (["--overwrite"], "is no adapter that expertprune cut, so --overwrite does not touch it"),
    ):
        result = call("adapter", plain, "--expert", expert, "--out", tmp_path / "own", *arguments, code=2)
        assert message in result.stderr
    assert contents(tmp_path / "own") == before
    call("adapter", plain, "--expert", expert, "--out", tmp_path / "cut")
    made = contents(tmp_path / "cut")
    result = call("adapter", plain, "--expert", expert, "--out", tmp_path / "cut", "--overwrite")
    assert contents(tmp_path / "cut") == made
    assert "--enable-lora --lora-modules cut=" in result.stdout
    assert (
        "the command reads" in call("adapter", plain, "--expert", expert, "--out", plain, "--overwrite", code=2).stderr
    )
    no_expert = call("adapter", plain, "--expert", twice[0] / "base", "--out", tmp_path / "new", code=2)
    assert "is no expert (it has no expertprune.json)" in no_expert.stderr
