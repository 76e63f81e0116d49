"""The oracle for depth: an expert without some layers computes what the base does when it skips them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.artifacts.plan import Plan
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.depth import check_kinds
from expertprune.models.loading import load_model
from expertprune.models.masking import masked
from expertprune.pruning.selfcheck import check_family
from expertprune.units import GONE, new_positions
from tests.oracle import (
    GetDense,
    assert_same,
    bases_of,
    change_config,
    exact,
    generated,
    load,
    logits_of,
    masked_logits,
    plan_of,
    pruned,
    random_units,
    read_json,
    resolved,
    stored_tensors,
)
from tests.tiny import FAMILIES, save_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "qwen3_next": {"family": "qwen3_next", "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "qwen3_next, one attention": {"family": "qwen3_next"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "qwen3_moe, a layer without": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "qwen3_moe, another without": {"family": "qwen3_moe", "mlp_only_layers": [2]},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GetDense:
    return bases_of(VARIANTS, tmp_path_factory.mktemp("depth"))


def without(base: ResolvedBase, gone: Sequence[int], **widths: int) -> Plan:
    """A plan of random units that drops whole layers."""
    generator = torch.Generator().manual_seed(3)
    kept = [
        GONE if layer in gone else random_units(shape, generator, **widths) for layer, shape in enumerate(base.layers)
    ]
    return plan_of(base, kept)


@contextlib.contextmanager
def skipping(model: Any, gone: Sequence[int]) -> Iterator[None]:
    """While open, these layers give back what they get."""
    handles = [model.model.layers[layer].register_forward_hook(lambda _, given, __: given[0]) for layer in gone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skipped_logits(model: Any, gone: Sequence[int]) -> Tensor:
    with skipping(model, gone):
        return logits_of(model)


@pytest.mark.parametrize(("variant", "gone"), [(name, (2 if "one attention" in name else 1,)) for name in VARIANTS])
def test_an_expert_without_a_layer_equals_the_base_that_skips_it(
    variant: str, gone: tuple[int, ...], dense: GetDense, tmp_path: Path
) -> None:
    made = dense(variant)
    folder = pruned(without(made.base, gone), made.base, tmp_path / "expert")
    expert = exact(folder)
    assert_same(logits_of(expert), skipped_logits(made.model, gone))
    with skipping(made.model, gone):
        assert torch.equal(generated(expert), generated(made.model))
    assert read_json(folder / "config.json")["num_hidden_layers"] == 2


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen2", "mixtral", "deepseek_v3"])
def test_depth_goes_with_widths(variant: str, dense: GetDense, tmp_path: Path) -> None:
    made = dense(variant)
    widths = {"experts": 4} if made.base.family.experts else {"ffn": 13, "heads_per_group": 1, "kv_groups": 2}
    plan = without(made.base, [1], **widths)
    found = logits_of(exact(pruned(plan, made.base, tmp_path / "expert")))
    pairs = zip(plan.shapes, plan.kept, strict=True)
    whole = plan_of(made.base, [shape.all_kept if units.gone else units for shape, units in pairs])
    with skipping(made.model, [1]):
        assert_same(found, masked_logits(made.model, whole))


def test_layers_of_their_own_widths_move_along(dense: GetDense, tmp_path: Path) -> None:
    """Layer 2, which becomes layer 1, keeps other widths than layer 0."""
    made, generator = dense("llama"), torch.Generator().manual_seed(4)
    shape = made.base.layers[0]
    kept = [random_units(shape, generator, ffn=13), GONE, random_units(shape, generator, ffn=19, kv_groups=2)]
    folder = pruned(plan_of(made.base, kept), made.base, tmp_path / "expert")
    config = read_json(folder / "config.json")
    assert config["num_hidden_layers"] == 2
    model = load_model(folder, torch.float32, torch.device("cpu"))
    float32 = load(made.base.folder)
    with masked(float32, made.base.family, made.base.layers, kept), torch.no_grad():
        expected = logits_of(float32)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


def test_tensors_move_and_only_those_of_gone_layers_go(dense: GetDense, tmp_path: Path) -> None:
    made = dense("llama")
    folder = pruned(without(made.base, [1]), made.base, tmp_path / "expert")
    before, after = stored_tensors(made.base.folder), stored_tensors(folder)
    moved = {"model.layers.0.": "model.layers.0.", "model.layers.2.": "model.layers.1."}
    for old, new in moved.items():
        for name in (name for name in before if name.startswith(old)):
            assert torch.equal(after.pop(new + name.removeprefix(old)), before[name])
    assert after.keys() == {name for name in before if not name.startswith("model.layers.")}


def test_masks_of_depth_skip_and_leave_nothing_behind(dense: GetDense) -> None:
    made = dense("gemma3")
    own, plan = logits_of(made.model), without(made.base, [1])
    with masked(made.model, made.base.family, made.base.layers, plan.kept):
        assert_same(logits_of(made.model), skipped_logits(made.model, [1]))
    assert torch.equal(logits_of(made.model), own)


def test_kinds_of_attention_by_position_are_written_out(tmp_path: Path, store: Path) -> None:
    """Every sixth layer of Gemma 3 sees the whole text; without layer 2 the fifth does."""
    folder = save_tiny(tmp_path / "base", "gemma3", num_hidden_layers=8, layer_types=None)
    change_config(folder, remove=["layer_types"])
    base, model = resolved(folder, store), exact(folder)
    expert = pruned(without(base, [2, 7]), base, tmp_path / "expert")
    types = read_json(expert / "config.json")["layer_types"]
    assert [place for place, kind in enumerate(types) if kind == "full_attention"] == [4]
    assert_same(logits_of(exact(expert)), skipped_logits(model, [2, 7]))


def test_a_rule_that_cannot_say_which_layers_have_experts_is_refused(tmp_path: Path, store: Path) -> None:
    """Of every two layers the second one has some; without layer 1, so would layer 2, which has none."""
    folder = save_tiny(tmp_path / "base", "ernie4_5_moe", num_hidden_layers=4, moe_layer_interval=2)
    base = resolved(folder, store)
    with pytest.raises(PlanError, match=r"layers 0, 2, 3 cannot stay alone.*moe_layer_interval"):
        base.family.pruned_config(base.checkpoint.config, without(base, [1]).kept)
    pruned(without(base, [2, 3]), base, tmp_path / "expert")


def test_the_last_layer_that_keeps_keys_and_values_stays(dense: GetDense) -> None:
    base = dense("qwen3_next, one attention").base
    with pytest.raises(PlanError, match="no layer would stay that keeps keys and values"):
        base.family.pruned_config(base.checkpoint.config, without(base, [1]).kept)


def test_layers_that_read_earlier_keys_are_refused(dense: GetDense) -> None:
    base = dense("llama").base
    config = {**base.checkpoint.config, "num_kv_shared_layers": 2}
    with pytest.raises(PlanError, match="2 of them read the keys and values of earlier ones"):
        base.family.pruned_config(config, without(base, [1]).kept)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_next", "deepseek_v2"])
def test_layers_stay_what_they_are(family: str, dense: GetDense) -> None:
    base = dense(family).base
    check_kinds(base.checkpoint, base.family, base.layers, [1], False)


def test_a_layer_that_would_change_is_named(dense: GetDense, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a config that keeps the first two kinds of attention, layer 2 becomes one that sees the whole text."""
    base = dense("gemma3").base
    kinds = base.checkpoint.config["layer_types"]
    monkeypatch.setattr(
        type(base.family), "pruned_config",
        lambda self, config, kept: {**config, "num_hidden_layers": 2, "layer_types": kinds[:2]},
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"layer 2 would become layer 1.*is_sliding False where it is True"):
        check_kinds(base.checkpoint, base.family, base.layers, [1], False)


def test_a_plan_says_which_layers_go(dense: GetDense) -> None:
    plan = without(dense("mixtral").base, [1])
    again = Plan.from_document(plan.document(), "plan")
    assert (again.gone, new_positions(again.kept)) == ((1,), {0: 0, 2: 1})
    assert plan.document()["layers"][1]["kept"] is None
    assert plan.digest != without(dense("mixtral").base, [2]).digest


def test_the_oracle_of_unlisted_families_cuts_a_layer(dense: GetDense) -> None:
    base = dense("qwen3_moe, another without").base
    assert "a whole layer" in check_family(base, layers=True)
