"""Adapters cut along: the expert with the cut adapter computes what the masked base computes with the whole one, in PEFT."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expertprune
from expertprune.artifacts.plan import Plan, VocabularyPlan
from expertprune.composition.rows import essentials
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.inventory import vocabulary_rows
from expertprune.models.loading import load_model
from expertprune.units import KeptRows
from tests.adapters import CONFIG, LINEAR, WEIGHTS, expert_of, trained, with_adapter
from tests.calling import call, call_json
from tests.oracle import assert_same, contents, exact, logits_of, masked, random_plan, read_json, resolved
from tests.pruning.cutting import as_planned, plan_by_layer, tiny_base, without
from tests.vocabularies import save_worded

Widths = list[dict[str, int] | None]
ALL: Widths = [{"ffn": 13, "heads_per_group": 1, "kv_groups": 2}] * 3
BIASES = {"attention_bias": True, "mlp_bias": True}


def changed(adapter: Path, **config: Any) -> None:
    (adapter / CONFIG).write_text(json.dumps(read_json(adapter / CONFIG) | config))


def assert_cut_along(plan: Plan, base: Path, adapter: Path, expert: Path, out: Path, effect: float = 0.05) -> None:
    """The expert with the cut adapter equals the masked base with the adapter: of a mixture, in its weights."""
    expertprune.cut_adapter(adapter, expert, out)
    model, small = with_adapter(exact(base), adapter), load_model(expert, torch.float64, torch.device("cpu"))
    small.set_experts_implementation("eager")
    routed = any(shape.experts for shape in plan.shapes)
    model = model.merge_and_unload() if routed else model.get_base_model()
    with as_planned(model, plan):
        expected = logits_of(model)
    own = logits_of(small)
    assert_same(logits_of(with_adapter(small, out)), expected)
    assert (own - expected).abs().max() > effect, "PEFT must have read the adapter, and it must do something"


def in_order(config: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FOUR: Widths = [{"ffn": 11}, None, {"ffn": 11}, {"ffn": 11}]
ROUTED: Widths = [{"experts": 4, "ffn": 11, "heads_per_group": 1}] * 3
# A base, what a plan keeps in each layer, an adapter, and what is other in the config of the cut one.
CASES: list[tuple[dict[str, Any], Widths, dict[str, Any], dict[str, Any]]] = [
    (BIASES, ALL,
     {"target_modules": LINEAR, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 2}, "use_rslora": True,
      "alpha_pattern": {"down_proj": 9}, "lora_bias": True}, {}),
    ({}, [{"ffn": 19}, {}, {"ffn": 7, "heads_per_group": 1}], {"target_modules": r".*\.(q|up|down)_proj"}, {}),
    # with fewer heads, its config is another family's
    ({"family": "qwen2"}, ALL, {"target_modules": LINEAR, "layers_to_transform": [0, 2]}, {}),
    ({"family": "phi3"}, ALL, {"target_modules": FUSED}, {}),
    (BIASES, ALL, {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True}, {}),
    # what loses no columns: of an embedding without a cut vocabulary, and of attention where neurons alone go
    ({}, [{"ffn": 19}, {"heads_per_group": 1}, {"ffn": 7}],
     {"target_modules": ["embed_tokens", "up_proj", "layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"],
      "use_dora": True}, {}),
    (BIASES, ALL, {"target_modules": ["up_proj"], "modules_to_save": ["q_proj", "o_proj", "norm"]}, {}),
    ({"tie_word_embeddings": True}, [{"ffn": 20}] * 3, {"target_modules": ["lm_head", "down_proj"]}, {}),
    # routed experts; of the second family gates and values alternate, the third is stored under other names
    ({"family": "qwen3_moe"}, ROUTED,
     {"target_modules": ["q_proj"], "target_parameters": [*STACKED, "mlp.gate.weight"]}, {}),
    ({"family": "gpt_oss"}, ROUTED, {"target_modules": ["v_proj"], "target_parameters": STACKED, "r": 3}, {}),
    ({"family": "mixtral"}, ROUTED, {"target_modules": ["o_proj"], "target_parameters": STACKED, "r": 3}, {}),
    # fewer layers; no list of them would mean all
    ({}, FOUR, {"target_modules": LINEAR, "layers_to_transform": [0, 1, 3]}, {"layers_to_transform": [0, 2]}),
    ({}, FOUR, {"target_modules": ["o_proj", "lm_head"], "layers_to_transform": [1]}, {"layers_to_transform": [3]}),
    ({}, FOUR, {"target_modules": ["up_proj"], "layers_to_transform": []}, {}),
    ({}, FOUR,
     {"target_modules": ["model.layers.1.mlp.up_proj", "layers.3.mlp.up_proj", "k_proj"],
      "rank_pattern": {r"layers\.3\.mlp\.up_proj": 2, "layers.1.mlp.up_proj": 3, "k_proj": 5},
      "alpha_pattern": {"^model.layers.2.self_attn.k_proj": 30}},
     {"target_modules": ["k_proj", "layers.2.mlp.up_proj"], "rank_pattern": {r"layers\.2\.mlp\.up_proj": 2, "k_proj": 5},
      "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 30}}),
    ({"family": "gemma3", "layer_types": ["sliding_attention", "full_attention"] * 2}, FOUR,
     {"target_modules": r".*\.layers\.[0-9]+\.mlp\.\w+_proj", "modules_to_save": ["q_norm"]}, {}),
    ({"family": "qwen3_moe"}, FOUR,
     {"target_modules": ["q_proj"], "target_parameters": ["layers.3.mlp.experts.down_proj"]},
     {"target_parameters": ["layers.2.mlp.experts.down_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "widths", "config", "other"), CASES, ids=str)
def test_cut_adapter_and_expert_equal_the_masked_base_with_the_adapter(
    changes: dict[str, Any], widths: Widths, config: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_base(tmp_path, **{"num_hidden_layers": len(widths), **changes})
    plan = plan_by_layer(base, widths)
    adapter = trained(base.folder, tmp_path / "adapter", **config)
    assert_cut_along(plan, base.folder, adapter, expert_of(plan, base, tmp_path / "expert"), tmp_path / "cut")
    expected = read_json(adapter / CONFIG) | {"base_model_name_or_path": "expert", "revision": None} | other
    assert in_order(read_json(tmp_path / "cut" / CONFIG)) == in_order(expected)


def test_lora_of_single_routed_experts_is_renumbered(tmp_path: Path) -> None:
    """As PEFT wrote them before transformers stacked routed experts; PEFT reads them still, and stacks them."""
    base = tiny_base(tmp_path, "mixtral")
    adapter = trained(base.folder, tmp_path / "adapter", r=3, target_modules=["q_proj"])
    module, ffn, generator = "block_sparse_moe.experts", base.layers[0].ffn, torch.Generator().manual_seed(7)
    tensors = load_file(adapter / WEIGHTS)
    for layer in range(3):
        for number in range(6):
            for name in ("w1", "w3", "w2"):
                inputs, outputs = (ffn, 24) if name == "w2" else (24, ffn)
                path = f"base_model.model.model.layers.{layer}.{module}.{number}.{name}"
                tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(3, inputs, generator=generator).double()
                tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(outputs, 3, generator=generator).double()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    changed(adapter, target_modules=["q_proj", "w1", "w3", "w2"])
    plan = random_plan(base, 5, experts=4, ffn=11)
    expert = expert_of(plan, base, tmp_path / "expert")
    assert_cut_along(plan, base.folder, adapter, expert, tmp_path / "cut", effect=1)
    changed(adapter, target_modules=["q_proj", f"{module}.3.w2"])
    with pytest.raises(CheckpointError, match=f"'{module}.3.w2' names a routed expert by a number that changes"):
        expertprune.cut_adapter(adapter, expert, tmp_path / "again")


def test_dora_of_a_single_routed_expert_is_cut_where_rows_go_only(tmp_path: Path) -> None:
    """Its output projection loses columns, or the repair changes it, so that the norms of its rows are others."""
    base = tiny_base(tmp_path, "mixtral")
    expert = expert_of(random_plan(base, 5, ffn=11), base, tmp_path / "expert")
    shapes = {"w1": (24, base.layers[0].ffn), "w2": (base.layers[0].ffn, 24)}
    for name, (inputs, outputs) in shapes.items():
        adapter = trained(base.folder, tmp_path / name, target_modules=["q_proj"])
        path = f"base_model.model.model.layers.0.block_sparse_moe.experts.3.{name}"
        dora = {"lora_A.weight": (4, inputs), "lora_B.weight": (outputs, 4), "lora_magnitude_vector": (outputs,)}
        tensors = load_file(adapter / WEIGHTS) | {f"{path}.{end}": torch.ones(shape) for end, shape in dora.items()}
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
        changed(adapter, target_modules=["q_proj", name], use_dora=True)
    expertprune.cut_adapter(tmp_path / "w1", expert, tmp_path / "cut")
    kept = load_file(tmp_path / "cut" / WEIGHTS)
    assert [kept[name].shape for name in kept if name.endswith("w1.lora_magnitude_vector")] == [(11,)]
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2\.weight: the norms that DoRA"):
        expertprune.cut_adapter(tmp_path / "w2", expert, tmp_path / "again")


def test_an_adapter_of_a_rank_above_the_new_width_does_not_begin_anew(tmp_path: Path) -> None:
    """MiCA begins with as many singular vectors as the rank says, and an FFN of 11 neurons has no 12."""
    base = tiny_base(tmp_path)
    plan = plan_by_layer(base, [{"ffn": 11}] * 3)
    expert = expert_of(plan, base, tmp_path / "expert")
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["up_proj"], r=12)
    assert_cut_along(plan, base.folder, adapter, expert, tmp_path / "plain")
    changed(adapter, init_lora_weights="mica")
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    small = load_model(expert, torch.float32, torch.device("cpu"))
    own, expected = (logits_of(with_adapter(copy.deepcopy(small), tmp_path / name)) for name in ("cut", "plain"))
    assert torch.equal(own, expected)
    assert read_json(tmp_path / "cut" / CONFIG) == read_json(tmp_path / "plain" / CONFIG) | {"init_lora_weights": True}


# --- the vocabulary, and experts of experts -----------------------------------------------------------------------------

PADDING = (3, 5)


@dataclass(frozen=True)
class Chain:
    """An expert of a base, without some tokens, and an expert of that one, in the folders `first` and `second`."""

    folder: Path
    base: ResolvedBase
    plans: tuple[Plan, Plan]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The first plan keeps every third token, and what these need."""
    folder = tmp_path_factory.mktemp("twice")
    base = resolved(save_worded(folder / "base", tie_word_embeddings=False), folder / "store")
    must = essentials(base)
    kept = tuple(sorted(must.vocabulary.closed({*range(0, 400, 3)} | must.ids)))
    rows = VocabularyPlan(KeptRows(vocabulary_rows(base.checkpoint, base.family), kept, PADDING), base.tokenizer_digest)
    plan = replace(random_plan(base, 1, ffn=24, kv_groups=2), vocabulary=rows)
    first = resolved(expert_of(plan, base, folder / "first"), folder / "store")
    then = random_plan(first, 2, ffn=11, heads_per_group=1)
    expert_of(then, first, folder / "second")
    return Chain(folder, base, (plan, then))


@pytest.fixture(scope="module")
def plain(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the base; not to be changed."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return trained(chain.base.folder, folder, target_modules=[*LINEAR, "lm_head"])


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (load_file(each / WEIGHTS) for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lora_of_the_vocabulary_loses_rows(chain: Chain, tmp_path: Path) -> None:
    """PEFT stores the embedding and the head themselves beside such LoRA, so they are cut too."""
    plan = chain.plans[0]
    assert plan.vocabulary is not None
    kept = plan.vocabulary.rows.kept
    targets = ["embed_tokens", "lm_head", "up_proj", "down_proj"]
    adapter = trained(chain.base.folder, tmp_path / "adapter", target_modules=targets)
    expertprune.cut_adapter(adapter, chain.folder / "first", tmp_path / "cut")
    stored = load_file(tmp_path / "cut" / WEIGHTS)
    assert stored["base_model.model.model.embed_tokens.base_layer.weight"].shape == (len(kept) + 2, 24)
    model = with_adapter(exact(chain.base.folder), adapter)
    ids, new = torch.tensor([kept[3:15], kept[80:92]]), torch.tensor([[*range(3, 15)], [*range(80, 92)]])
    with masked(model.get_base_model(), plan):
        expected = logits_of(model, ids)[..., [*kept, *PADDING]]
    assert_same(logits_of(with_adapter(exact(chain.folder / "first"), tmp_path / "cut"), new), expected)


def test_tokens_that_are_named_by_id_need_the_whole_vocabulary(chain: Chain, tmp_path: Path) -> None:
    base, plan = chain.base, random_plan(chain.base, 1, ffn=20)
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["v_proj"], trainable_token_indices=[4, 9])
    assert_cut_along(plan, base.folder, adapter, expert_of(plan, base, tmp_path / "whole"), tmp_path / "cut")
    with pytest.raises(CheckpointError, match="trainable_token_indices names tokens by ids"):
        expertprune.cut_adapter(adapter, chain.folder / "first", tmp_path / "again")


def test_an_adapter_of_the_first_base_is_cut_along_all_plans(chain: Chain, plain: Path, tmp_path: Path) -> None:
    """Along both at once as along one after the other; under another name, its shapes say which are left."""
    second = chain.folder / "second"
    cut = expertprune.cut_adapter(plain, second, tmp_path / "both")
    assert (cut.plans, cut.base, cut.before > cut.after) == (2, "base", True)
    expertprune.cut_adapter(plain, chain.folder / "first", tmp_path / "one")
    assert_cut_along(chain.plans[1], chain.folder / "first", tmp_path / "one", second, tmp_path / "two")
    assert_same_weights(tmp_path / "two", tmp_path / "both")
    shutil.copytree(plain, tmp_path / "renamed")
    for given, name, plans, options in (
        ("one", "somewhere/else/first", 1, []),
        ("one", "owner/other", 1, ["--same-base"]),
        ("renamed", "owner/model", 2, ["--same-base"]),
    ):
        changed(tmp_path / given, base_model_name_or_path=name)
        out = tmp_path / name.replace("/", "-")
        assert call_json("adapter", tmp_path / given, "--expert", second, "--out", out, *options)["plans"] == plans
        assert_same_weights(out, tmp_path / "both")


def test_layers_go_one_after_the_other_along_a_chain(tmp_path: Path) -> None:
    """Of layers 0 to 3 first 1 goes, then the expert's 1, which was 2: what was 3 is 1 in the end."""
    base = tiny_base(tmp_path, "qwen3_moe", num_hidden_layers=4)
    first = resolved(expert_of(without(base, [1], seed=1, ffn=12), base, tmp_path / "first"), tmp_path / "store")
    second = expert_of(without(first, [1], seed=2, experts=4), first, tmp_path / "second")
    parameters = [f"layers.{layer}.mlp.experts.{name}_proj" for layer in range(4) for name in ("gate_up", "down")]
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=parameters)
    assert expertprune.cut_adapter(adapter, second, tmp_path / "both").plans == 2
    expertprune.cut_adapter(adapter, first.folder, tmp_path / "one")
    changed(tmp_path / "one", base_model_name_or_path="first")
    expertprune.cut_adapter(tmp_path / "one", second, tmp_path / "two")
    assert_same_weights(tmp_path / "both", tmp_path / "two")
    assert {name.split(".")[4] for name in load_file(tmp_path / "both" / WEIGHTS)} == {"0", "1"}
    assert sorted(read_json(tmp_path / "both" / CONFIG)["target_parameters"]) == sorted(parameters[:4])
    changed(adapter, target_modules=r".*layers\.[023]\..*o_proj")
    either = trained(first.folder, tmp_path / "either", target_modules=["o_proj"])
    changed(either, base_model_name_or_path="owner/model")  # its layers 0 to 2 could be those of either base
    gone: dict[str, Any] = {"target_modules": ["o_proj"], "layers_to_transform": [1, 2]}
    lost = "its LoRA changes only layers or routed experts that the expert does"
    for given, message in (
        (adapter, "names layers or routed experts by numbers, some of which change"),
        (either, "shapes do not tell which base the adapter is of: first, which was cut from"),
        (trained(base.folder, tmp_path / "lost", **gone), lost),
        (trained(base.folder, tmp_path / "lost, with a head", **gone, modules_to_save=["lm_head"]), lost),
    ):
        with pytest.raises(CheckpointError, match=message):
            expertprune.cut_adapter(given, second, tmp_path / "none", same_base=given == either)


# --- bad input ----------------------------------------------------------------------------------------------------------


Hurt = Callable[[Path], Any]


def said(**config: Any) -> Hurt:
    return lambda adapter: changed(adapter, **config)


def stored(change: Callable[[dict[str, Tensor]], Any]) -> Hurt:
    def hurt(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return hurt


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
HURT: list[tuple[Hurt, str]] = [
    (lambda adapter: (adapter / CONFIG).unlink(), "is no PEFT adapter (it has no adapter_config.json)"),
    (lambda adapter: (adapter / CONFIG).write_text("{"), "adapter_config.json: not valid JSON"),
    (lambda adapter: (adapter / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    (lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"), "a pickle, which could run code when read"),
    (lambda adapter: (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100]), "truncated or corrupt"),
    (said(r=0), "adapter_config.json: r: must be at least 1 (found 0)"),
    (said(rank_pattern={"q_proj": 0}), "rank_pattern: a rank is 0"),
    (said(r=5), "is of rank 4, and adapter_config.json says r: 5"),
    (said(peft_type="PREFIX_TUNING"), "peft_type is PREFIX_TUNING, and only LORA"),
    (said(bias="lora_only"), "bias is 'lora_only'"),
    (said(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
    (said(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga', which changes the base"),
    (said(layers_to_transform="3"), "adapter_config.json: layers_to_transform: must be a"),
    (said(layers_to_transform=[0, "x"]), "adapter_config.json: layers_to_transform.1: must be a"),
    (said(modules_to_save="lm_head"), "adapter_config.json: modules_to_save: must be a list"),
    (said(modules_to_save=[7]), "adapter_config.json: modules_to_save.0: must be"),
    (said(exclude_modules=[["q_proj"]]), "adapter_config.json: exclude_modules.0: must be"),
    (said(layer_replication=[[0, 2]]), "layer_replication: an adapter with layers"),
    (said(base_model_name_or_path="owner/model"),
     "base_model_name_or_path is 'owner/model', and the expert second was cut from first, which was cut from base; "
     "if it is the same model under another name, give --same-base"),
    (said(base_model_name_or_path=None), "base_model_name_or_path is None, and the expert"),
    (said(base_model_name_or_path="x/second"), "is an adapter of the expert second itself"),
    (stored(lambda t: t.update({A: torch.ones(4, 32)})),
     f"does not go with base, the base of the expert first: {A} is [4, 32], and that base makes it [4, 24]"),
    (stored(lambda t: t.pop(B)), f"holds {A}, and no"),
    (stored(lambda t: t.update({A.replace("q_proj", "qkv"): torch.ones(4, 24)})),
     "the base has no model.layers.0.self_attn.qkv.weight"),
    (stored(lambda t: t.update({A.replace(".0.", ".3."): torch.ones(4, 24)})), "is in layer 3, and there are only 3"),
    (stored(lambda t: t[A].mul_(float("nan"))), f"{A} holds values that are not"),
]  # fmt: skip


@pytest.mark.parametrize(("hurt", "message"), HURT, ids=[message for _, message in HURT])
def test_bad_adapters_are_refused_by_name(hurt: Hurt, message: str, chain: Chain, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    hurt(tmp_path / "adapter")
    result = call(
        "adapter", tmp_path / "adapter", "--expert", chain.folder / "second", "--out", tmp_path / "cut", code=2
    )
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_the_expert_has_less_of_is_refused(chain: Chain, tmp_path: Path) -> None:
    expert = expert_of(chain.plans[0], chain.base, tmp_path / "expert", method="least_squares")
    for number, (config, message) in enumerate(
        (
            ({"target_modules": ["down_proj"], "use_dora": True}, "norms that DoRA"),
            ({"target_modules": ["embed_tokens"], "use_dora": True}, "norms that DoRA"),
            ({"target_modules": ["v_proj"], "modules_to_save": ["down_proj"]}, "repair has solved for"),
            ({"target_modules": ["v_proj"], "modules_to_save": ["o_proj"]}, "repair has solved for"),
        )
    ):
        adapter = trained(chain.base.folder, tmp_path / str(number), **config)
        with pytest.raises(CheckpointError, match=message):
            expertprune.cut_adapter(adapter, expert, tmp_path / "cut")


def test_whole_weights_that_the_repair_leaves_as_they_are_come_along(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    expert = expert_of(random_plan(base, 5, ffn=11), base, tmp_path / "expert", method="least_squares")
    adapter = trained(base.folder, tmp_path / "adapter", target_modules=["v_proj"], modules_to_save=["o_proj"])
    expertprune.cut_adapter(adapter, expert, tmp_path / "cut")
    assert_same_weights(tmp_path / "cut", adapter)
    kept, solved = (
        expert_of(without(base, [1]), base, tmp_path / f"by-{method}", method) for method in ("none", "least_squares")
    )
    saved = {"modules_to_save": ["down_proj"], "layers_to_transform": [0]}
    for number, config in enumerate((saved, {"target_modules": ["layers.0.mlp.down_proj"], "use_dora": True})):
        adapter = trained(base.folder, tmp_path / str(number), **{"target_modules": ["v_proj"], **config})
        expertprune.cut_adapter(adapter, kept, tmp_path / f"{number} cut")
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight: th"):
            expertprune.cut_adapter(adapter, solved, tmp_path / "again")


def test_overwrite_replaces_cut_adapters_only(chain: Chain, plain: Path, tmp_path: Path) -> None:
    expert = chain.folder / "second"
    shutil.copytree(plain, tmp_path / "own")
    before = contents(tmp_path / "own")
    for given, out, options, message in (
        (expert, "own", [], "exists; choose another --out, or give --overwrite"),
        (expert, "own", ["--overwrite"], "is no adapter that expertprune cut, so --overwrite does not touch it"),
        (expert, plain, ["--overwrite"], "the command reads"),
        (chain.folder / "base", "new", [], "is no expert (it has no expertprune.json)"),
    ):
        result = call("adapter", plain, "--expert", given, "--out", tmp_path / out, *options, code=2)
        assert message in result.stderr
    assert contents(tmp_path / "own") == before
    call("adapter", plain, "--expert", expert, "--out", tmp_path / "cut")
    made = contents(tmp_path / "cut")
    result = call("adapter", plain, "--expert", expert, "--out", tmp_path / "cut", "--overwrite")
    assert contents(tmp_path / "cut") == made
    assert "--enable-lora --lora-modules cut=" in result.stdout
    adapter = trained(chain.base.folder, tmp_path / "high", target_modules=["q_proj"], r=33)
    result = call("adapter", adapter, "--expert", expert, "--out", tmp_path / "cut", "--overwrite")
    assert "--enable-lora --max-lora-rank 64 --lora-modules" in result.stdout
