"""The oracle: a cut model computes what the base computes with the dropped units masked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import expertprune
from expertprune.arch import families, family_of
from expertprune.artifacts.plan import Plan
from expertprune.errors import PlanError
from expertprune.models.depth import check_kinds
from expertprune.models.loading import load_model
from expertprune.models.masking import masked as masked_by_package
from expertprune.spec.reading import parse_spec
from expertprune.units import KeptUnits
from tests import oracle
from tests.oracle import SHARDS, GetDense, exact, load, plan_of, pruned, random_plan, read_json, resolved
from tests.pruning.cutting import assert_as_planned, assert_cut_as_planned, plan_by_layer, tiny_base, without
from tests.tiny import save_tiny

OWN = {"num_attention_heads": 12, "head_dim": 6}  # heads wider than the hidden size
PARTLY = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
# Every family, with and without what its config may leave out.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, both biases, own head_dim": {"family": "llama", **OWN, "attention_bias": True, "mlp_bias": True},
    "llama, tied, one head a group": {"family": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, own head_dim": {"family": "qwen2", **OWN, "tie_word_embeddings": True},
    "gemma3": {"family": "gemma3"},
    "gemma3, untied, own head_dim": {"family": "gemma3", **OWN, "tie_word_embeddings": False, "attention_bias": True},
    "gemma3, one group": {"family": "gemma3", "num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma2": {"family": "gemma2"},
    "gemma2, untied, own head_dim": {"family": "gemma2", **OWN, "tie_word_embeddings": False, "attention_bias": True},
    "mistral": {"family": "mistral", **OWN, "tie_word_embeddings": True},
    "olmo2": {"family": "olmo2"},
    "phi3": {"family": "phi3"},
    "phi3, part of a head is rotated": {"family": "phi3", "rope_parameters": PARTLY},
    "qwen3": {"family": "qwen3"},
    "qwen3, no bias, own head_dim": {"family": "qwen3", **OWN, "attention_bias": False},
    "starcoder2": {"family": "starcoder2", "tie_word_embeddings": False},
    "starcoder2, no bias, tied": {"family": "starcoder2", "use_bias": False},
}
# Those whose config says something of single layers.
OF_DEPTH: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in ("mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe")},
    "qwen3_next": {"family": "qwen3_next", "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "qwen3_next, one attention": {"family": "qwen3_next"},
    "qwen3_moe, a layer without": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "qwen3_moe, another without": {"family": "qwen3_moe", "mlp_only_layers": [2]},
}
WITHOUT_HEADS = [name for name, family in families().items() if family.has_ffn and not family.heads_are_units]
# Kept per layer. The hidden size is 24, which the query heads that stay must divide:
# of 6 heads in 3 groups 3, 4 and 2 stay, of 12 heads in 3 groups 3, 8 and 2, of 6 heads in 6 groups 2 and 2, of 4 heads
# in one group 1.
CUTS: dict[str, dict[str, int]] = {
    "ffn": {"ffn": 19},
    "query_heads": {"heads_per_group": 1},
    "kv_groups": {"kv_groups": 2},
    "all": {"ffn": 13, "heads_per_group": 1, "kv_groups": 2},
}


def largest(variant: str) -> str:
    """The cut of all that the variant allows."""
    if variant == "gemma3, one group":
        return "query_heads"
    return "ffn" if VARIANTS[variant]["family"] in WITHOUT_HEADS else "all"


# Every structure alone where the config's family stays the same and where it changes, and as much as may go elsewhere.
CASES = [
    (variant, cut) for variant in VARIANTS for cut in CUTS if variant in ("llama", "qwen2") or cut == largest(variant)
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return oracle.bases_of(VARIANTS | OF_DEPTH, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_cut_model_equals_masked_model(variant: str, cut: str, dense: GetDense, tmp_path: Path) -> None:
    number = CASES.index((variant, cut))
    shards = list(SHARDS)[number % 2]
    of = dense(variant, shards)
    plan, shape = random_plan(of.base, number, **CUTS[cut]), of.base.layers[0]
    folder = pruned(plan, of.base, tmp_path / "expert")
    assert_as_planned(exact(folder), of.model, plan)
    assert (folder / "model.safetensors.index.json").exists() == (shards == "several files")
    if of.base.family.when_heads_change is None or cut == "ffn":
        shown, expected = read_json(folder / "config.json"), read_json(of.base.folder / "config.json")
        names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        units = plan.kept[0]
        expected |= dict(zip(names, map(len, (units.ffn, units.query_heads, units.kv_groups)), strict=True))
        assert shown == expected | ({"head_dim": shape.head_dim} if "head_dim" in shown else {})


@pytest.mark.parametrize(
    ("changes", "gone", "said"),
    [
        # both follow from the query heads, and must be written once these change
        ({"num_key_value_heads": 6}, ["head_dim", "num_key_value_heads"], {}),
        # published Qwen2 configs; a base far from the default, so that losing it shows
        (
            {"family": "qwen2"},
            ["rope_parameters", "layer_types", "dtype"],
            {"rope_theta": 50.0, "torch_dtype": "float32"},
        ),
    ],
    ids=str,
)
def test_older_configs(changes: dict[str, Any], gone: list[str], said: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", **changes)
    oracle.change_config(folder, gone, **said)
    base = resolved(folder, tmp_path / "store")
    expert = load(assert_cut_as_planned(random_plan(base, **CUTS["all"]), base, tmp_path / "expert"))
    assert expert.config.rope_parameters["rope_theta"] == said.get("rope_theta", 10_000.0)


def test_heads_that_cannot_go_are_refused(dense: GetDense, tmp_path: Path) -> None:
    """Norms take their mean over all of them; or transformers checks factors against hidden_size / num_attention_heads."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0],
            "partial_rotary_factor": 1.0}  # fmt: skip
    longer = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    scaled = tiny_base(tmp_path, "phi3", rope_parameters=rope, **longer)
    said = r"config says rope_parameters\.rope_type: 'longrope', and only 'default'"
    cases = [(dense(name).base, f"heads of family '{name}' cannot be cut: q_norm and k_norm") for name in WITHOUT_HEADS]
    for number, (base, words) in enumerate([*cases, (scaled, said)]):
        for cut in ("query_heads", "kv_groups"):
            with pytest.raises(PlanError, match=words):
                pruned(random_plan(base, **CUTS[cut]), base, tmp_path / f"{cut} {number}")
    assert_cut_as_planned(random_plan(scaled, ffn=19), scaled, tmp_path / "expert")


def test_one_unit_of_each_structure_is_enough(dense: GetDense, tmp_path: Path) -> None:
    base = dense("qwen2").base
    plan = plan_of(base, [KeptUnits((31,), (5,), (2,)), KeptUnits((0,), (0,), (0,)), KeptUnits((7,), (3,), (1,))])
    assert_cut_as_planned(plan, base, tmp_path / "expert")


@pytest.mark.parametrize(("family", "model_type"), [("qwen2", "llama"), ("gemma3", "gemma3_text")])
def test_an_expert_can_be_cut_again(family: str, model_type: str, dense: GetDense, tmp_path: Path) -> None:
    first = dense(family).base
    base = resolved(
        pruned(random_plan(first, seed=1, ffn=24, kv_groups=2), first, tmp_path / "first"), tmp_path / "store"
    )
    assert base.family == family_of(model_type)
    assert_cut_as_planned(random_plan(base, seed=2, ffn=11, heads_per_group=1), base, tmp_path / "second")


# --- widths of single layers ----------------------------------------------------------------------------------------

# Kept in the first, second and third layer; one of them is left as it was.
LAYER_CUTS: dict[str, list[dict[str, int]]] = {
    "ffn": [{"ffn": 19}, {}, {"ffn": 7}],
    "query_heads": [{"heads_per_group": 1}, {}, {"heads_per_group": 2}],
    "all": [{"ffn": 13, "heads_per_group": 1, "kv_groups": 2}, {}, {"ffn": 20, "kv_groups": 1}],
}
LAYER_CASES = [
    *(("llama", cut) for cut in LAYER_CUTS),
    ("qwen2", "ffn"),
    *((variant, "all") for variant in ("llama, both biases, own head_dim", "qwen2, tied, own head_dim", "gemma2")),
    *((family, largest(family)) for family in ("mistral", "olmo2", "phi3", "qwen3", "starcoder2")),
]

Layered = dict[tuple[str, str], tuple[Plan, Path]]


@pytest.fixture(scope="module")
def layered(dense: GetDense, tmp_path_factory: pytest.TempPathFactory) -> Layered:
    root, made = tmp_path_factory.mktemp("layered"), {}
    for number, (variant, cut) in enumerate(LAYER_CASES):
        base = dense(variant).base
        plan = plan_by_layer(base, LAYER_CUTS[cut], seed=number)
        made[variant, cut] = (plan, pruned(plan, base, root / f"{variant}, {cut}"))
    return made


def exact_layered(folder: Path) -> Any:
    """With this package, which builds layers of their own widths without code in the folder."""
    return load_model(folder, torch.float64, torch.device("cpu"))


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where nothing but transformers is: whoever imports this package fails."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "expertprune"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("variant", "cut"), LAYER_CASES)
def test_layers_of_their_own_widths_equal_the_masked_model(
    variant: str, cut: str, dense: GetDense, layered: Layered, request: pytest.FixtureRequest
) -> None:
    """Built by this package, and by plain transformers from the folder alone."""
    plan, folder = layered[variant, cut]
    assert_as_planned(exact_layered(folder), dense(variant).model, plan)
    request.getfixturevalue("without_package")
    options: dict[str, Any] = {"dtype": torch.float64, "trust_remote_code": True, "output_loading_info": True}
    options["attn_implementation"] = "eager" if variant == "gemma2" else None  # the only one that caps
    plain, notes = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(notes.values()), notes
    decoder, _ = AutoModel.from_pretrained(folder, **options)
    with torch.no_grad():
        assert torch.equal(decoder(oracle.IDS).last_hidden_state, plain.model(oracle.IDS).last_hidden_state)
    assert read_json(folder / "config.json")["architectures"][0].startswith("Expert")  # which vLLM's plugin knows
    assert type(plain).__module__.startswith("transformers_modules.")
    assert_as_planned(plain.eval(), dense(variant).model, plan)


def test_a_base_of_layers_of_their_own_widths_can_be_cut_again(layered: Layered, tmp_path: Path) -> None:
    """To other widths of single layers; to one width, as an ordinary folder; or not at all, which gives the same bytes."""
    plan, folder = layered["llama", "all"]
    base = resolved(folder, tmp_path / "store")
    units = [(len(kept.ffn), len(kept.query_heads), len(kept.kv_groups)) for kept in plan.kept]
    assert [(shape.ffn, shape.query_heads, shape.kv_heads) for shape in base.layers] == units
    again = plan_by_layer(base, [{"ffn": 6}, {"ffn": 15, "kv_groups": 2}, {"ffn": 5}])
    second = exact_layered(pruned(again, base, tmp_path / "second"))
    assert_as_planned(second, exact_layered(folder), again)
    whole = pruned(plan_of(base, [shape.all_kept for shape in base.layers]), base, tmp_path / "whole")
    assert oracle.contents(whole) == oracle.contents(folder)
    base = resolved(layered["llama", "ffn"][1], tmp_path / "store")
    alike = random_plan(base, ffn=7)
    ordinary = pruned(alike, base, tmp_path / "ordinary")
    config = read_json(ordinary / "config.json")
    assert config["intermediate_size"] == 7
    assert not {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"} & set(config)
    assert list(ordinary.glob("*.py")) == []
    assert_as_planned(exact(ordinary), exact_layered(base.folder), alike)


def test_an_expert_of_such_a_base_can_be_built(layered: Layered, spec_data: dict[str, Any], tmp_path: Path) -> None:
    """Profiled, composed, repaired and evaluated; its layers have 19, 32 and 7 neurons."""
    spec_data |= {"base": str(layered["llama", "ffn"][1]), "compose": {"allocation": "global"}}
    spec_data["budget"] = {"ffn": 0.5, "multiple_of": 1}
    out = expertprune.build(parse_spec(spec_data, "spec", tmp_path), tmp_path / "expert")
    about = expertprune.inspect(out)
    budget, tensors = about["plan"]["budget"]["ffn"], oracle.stored_tensors(out)
    assert (budget["of"], sum(budget["removed"])) == ([19, 32, 7], (19 + 32 + 7) // 2)
    assert budget["kept"] == [tensors[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0] for layer in range(3)]
    assert about["evaluation"]["corpora"]["domain/medical"]["metrics"]["bits_per_byte"]["retention"] > 0
    assert sum(tensor.numel() for tensor in tensors.values()) == about["parameters"]["after"]


# --- fewer layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*OF_DEPTH, "llama", "phi3", "qwen2", "qwen2, tied, own head_dim", "gemma3"])
def test_an_expert_without_a_layer_equals_the_base_that_skips_it(variant: str, dense: GetDense, tmp_path: Path) -> None:
    """The others lose units too, in one of two cases where that changes the family that the config names."""
    made = dense(variant)
    units = {"experts": 4} if made.base.family.experts else {"ffn": 13, "heads_per_group": 1, "kv_groups": 2}
    plan = without(made.base, [2 if "one attention" in variant else 1], **({} if variant == "qwen2" else units))
    folder = pruned(plan, made.base, tmp_path / "expert")
    expert, own = exact(folder), oracle.logits_of(made.model)
    assert_as_planned(expert, made.model, plan)
    with masked_by_package(made.model, made.base.family, made.base.layers, plan.kept):
        oracle.assert_same(oracle.logits_of(expert), oracle.logits_of(made.model))
    assert torch.equal(oracle.logits_of(made.model), own), "masks leave nothing behind"
    assert read_json(folder / "config.json")["num_hidden_layers"] == 2


def test_layers_of_their_own_widths_move_along(dense: GetDense, tmp_path: Path) -> None:
    """Layer 2, which becomes layer 1, keeps other widths than layer 0."""
    made = dense("llama")
    plan = plan_by_layer(made.base, [{"ffn": 13}, None, {"ffn": 19, "kv_groups": 2}])
    expert = load_model(pruned(plan, made.base, tmp_path / "expert"), torch.float64, torch.device("cpu"))
    assert_as_planned(expert, made.model, plan)


def test_kinds_of_attention_by_position_are_written_out(tmp_path: Path) -> None:
    """Every sixth layer of Gemma 3 sees the whole text; without layer 2 the fifth does."""
    folder = save_tiny(tmp_path / "base", "gemma3", num_hidden_layers=8, layer_types=None)
    oracle.change_config(folder, remove=["layer_types"])
    base = resolved(folder, tmp_path / "store")
    expert = assert_cut_as_planned(without(base, [2, 7]), base, tmp_path / "expert")
    types = read_json(expert / "config.json")["layer_types"]
    assert [place for place, kind in enumerate(types) if kind == "full_attention"] == [4]


def test_layers_that_cannot_go_are_refused(dense: GetDense, tmp_path: Path) -> None:
    """Of every two layers of the last base the second one has experts; without layer 1, so would layer 2."""
    plain, linear = dense("llama").base, dense("qwen3_next, one attention").base
    folder = save_tiny(tmp_path / "base", "ernie4_5_moe", num_hidden_layers=4, moe_layer_interval=2)
    ruled = resolved(folder, tmp_path / "store")
    for base, changes, words in (
        (plain, {"num_kv_shared_layers": 2}, "2 of them read the keys and values of earlier ones"),
        (linear, {}, "no layer would stay that keeps keys and values"),
        (ruled, {}, r"layers 0, 2, 3 cannot stay alone.*moe_layer_interval"),
    ):
        with pytest.raises(PlanError, match=words):
            base.family.pruned_config({**base.checkpoint.config, **changes}, without(base, [1]).kept)
    pruned(without(ruled, [2, 3]), ruled, tmp_path / "expert")


def test_a_layer_that_would_change_is_named(dense: GetDense, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a config that keeps the first two kinds of attention, layer 2 becomes one that sees the whole text."""
    for variant in ("gpt_oss", "qwen3_next", "deepseek_v3", "gemma3"):
        base = dense(variant).base
        check_kinds(base.checkpoint, base.family, base.layers, [1], False)
    kinds = base.checkpoint.config["layer_types"]
    monkeypatch.setattr(
        type(base.family), "pruned_config",
        lambda self, config, kept: {**config, "num_hidden_layers": 2, "layer_types": kinds[:2]},
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"layer 2 would become layer 1.*is_sliding False where it is True"):
        check_kinds(base.checkpoint, base.family, base.layers, [1], False)
