"""Which whole layers go, against arithmetic written out, and the widths of the layers that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from expertprune.artifacts.plan import StructureBudget
from expertprune.artifacts.profile import Profile, save_profile
from expertprune.composition.depth import choose_layers, foreseen_layers
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.ranking import global_widths
from expertprune.composition.scoring import Fused
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import GONE_WIDTHS, LayerWidths, summary
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Budget, Compose, Dimensions, Spec
from expertprune.units import DENSE
from tests.bases import base_of
from tests.oracle import fetched, resolved
from tests.profiles import made_up_about
from tests.tiny import save_tiny

# By corpus, documents by layers. Of its sum over layers, the mean medical document has .4706, .1176,
# .1176 and .2941 in the four layers, qa .4, .2, .3 and .1, general .5, .1, 0 and .4. The larger of
# the first two, .75 times, and general .25 times: .4779, .175, .225 and .3206.
INFLUENCE = {
    "domain/medical": [[0.9, 0.1, 0.2, 0.5], [0.7, 0.3, 0.2, 0.5]],
    "task/qa": [[0.4, 0.2, 0.3, 0.1]],
    "general/general": [[0.5, 0.1, 0.0, 0.4]],
}
WHOLE, CUT = LayerWidths(256, 4, 4), LayerWidths(192, 4, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ResolvedBase:
    root = tmp_path_factory.mktemp("depth")
    return fetched(resolved(save_tiny(root / "base", num_hidden_layers=4), root / "store"))


def made_up(folder: Path, base: ResolvedBase) -> dict[CorpusName, Profile]:
    profiles: dict[CorpusName, Profile] = {}
    about = made_up_about(layers=base.layers)
    for number, (name, rows) in enumerate(INFLUENCE.items()):
        tensors = {f"stream.{layer}.influence": torch.tensor([row[layer] for row in rows]) for layer in range(4)}
        profiles[CorpusName.parse(name)] = save_profile(folder / f"{number}.safetensors", about, tensors)
    return profiles


def spec_of(layers: Any, **compose: Any) -> Spec:
    dimensions = Dimensions(domain=["medical"], task=["qa"])
    return Spec(name="n", base="b", dimensions=dimensions, budget=Budget(layers=layers), compose=Compose(**compose))


def test_the_layers_of_the_least_fused_influence_go(base: ResolvedBase, tmp_path: Path) -> None:
    profiles = made_up(tmp_path, base)
    for layers, gone in ((1, (1,)), (0.25, (1,)), (2, (1, 2)), ({"keep": 2}, (1, 2)), ("75%", (1, 2, 3))):
        found, why = choose_layers(spec_of(layers), base, profiles)
        assert found == gone
        assert why is not None
        assert why.relevance == pytest.approx([0.4779, 0.175, 0.225, 0.3206], abs=1e-4)
        assert why.source == ["general", "task", "task", "general"]
        assert why.why.threshold == max(why.relevance[layer] for layer in gone)
        assert why.why.shared is not None
        assert why.why.shared.units == 4, "a layer has no activation that could make it exclusive"


def test_rules_and_scales_apply_to_layers(base: ResolvedBase, tmp_path: Path) -> None:
    """By rank, layer 1 of medicine shares the lowest ranks with layer 2, and is above layer 3 in qa."""
    profiles = made_up(tmp_path, base)
    fusion = {"lambda": 0.0}
    _, why = choose_layers(spec_of(1, scale="percentile", fusion=fusion), base, profiles)
    assert why is not None
    assert why.relevance == pytest.approx([1, 1 / 3, 2 / 3, 2 / 3])  # medical 1, 1/6, 1/6, 2/3; qa 1, 1/3, 2/3, 0
    gone, why = choose_layers(spec_of(1, rule="union", fusion=fusion), base, profiles)
    assert why is not None
    assert gone == (3,)
    assert why.relevance == pytest.approx([0.4, 0.1176, 0.1176, 0.1], abs=1e-4)


def test_too_many_or_none_is_refused(base: ResolvedBase) -> None:
    for layers, message in (
        (4, r"at most 3 of 4 layers can be removed \(0\.75; budget\.floor is 0\.1\)"),
        (0.1, r"budget\.layers: 0\.1 of 4 layers .*removes nothing; the smallest.* 0\.25"),
        ({"keep": 5}, r"budget\.layers: keep: 5 is more than the 4 that there are"),
    ):
        with pytest.raises(PlanError, match=message):
            foreseen_layers(Budget(layers=layers), base)
    assert foreseen_layers(Budget(ffn=0.25), base) == ()
    with pytest.raises(ValidationError, match="give 'layers' or 'retention', not both"):
        Budget(layers=1, retention={"expert": 0.9})


def test_layers_that_the_config_needs_are_passed_over(tmp_path: Path, store: Path) -> None:
    """Of every two layers the second has experts. Without layer 3, layers 0 to 2 stay as they are."""
    folder = save_tiny(tmp_path / "base", "ernie4_5_moe", num_hidden_layers=4, moe_layer_interval=2)
    base = fetched(resolved(folder, store))
    assert choose_layers(spec_of(1), base, made_up(tmp_path, base))[0] == (3,)


def test_a_gone_layer_takes_all_its_parameters() -> None:
    """What a model of one layer less does not store, and what goes of the other three."""
    base = base_of(layers=4)
    per_layer = base.checkpoint.parameters - base_of(layers=3).checkpoint.parameters
    assert removed_parameters(base, [WHOLE, GONE_WIDTHS, WHOLE, WHOLE]) == per_layer
    assert removed_parameters(base, [CUT, GONE_WIDTHS, CUT, CUT]) == per_layer + 3 * 64 * 3 * 48
    base = base_of("qwen2", layers=4)  # a rewritten family gains biases in layers that stay
    per_layer = base.checkpoint.parameters - base_of("qwen2", layers=3).checkpoint.parameters
    fewer = LayerWidths(256, 3, 4)
    heads = 4 * 1 * 2 * (48 + 48 + 1)  # of 4 groups one head each: rows of q, columns of o, and q's bias
    assert removed_parameters(base, [fewer, fewer, fewer, GONE_WIDTHS]) == per_layer + 3 * (heads - 48)


@pytest.mark.parametrize("allocate", [global_widths, uniform_widths])
def test_other_keys_are_of_the_layers_that_stay(allocate: Any) -> None:
    base = base_of(layers=4)
    units = {structure: base.layers[0].units(structure) for structure in DENSE}
    alike = {each: [Fused(torch.arange(of) + 1.0, torch.zeros(of), None)] * 4 for each, of in units.items()}

    def widths(**budget: Any) -> tuple[LayerWidths, ...]:
        scores = [alike] if allocate is global_widths else []
        return allocate(Budget(layers=1, **budget), base, *scores, [2])

    assert widths() == widths(parameters=0.01) == (WHOLE, WHOLE, GONE_WIDTHS, WHOLE)  # the layer alone is more
    cut = widths(ffn=0.25)
    assert cut[2] == GONE_WIDTHS
    assert sum(layer.ffn for layer in cut) == 3 * 192
    third = base.checkpoint.parameters // 3
    assert third <= removed_parameters(base, widths(parameters=1 / 3)) < third + 3 * 64 * 3 * 48


def test_the_summary_says_what_goes_and_what_the_others_keep() -> None:
    found = summary(Budget(layers=1, ffn=0.25), base_of(layers=4).layers, [CUT, GONE_WIDTHS, CUT, CUT])
    assert found["layers"] == StructureBudget(requested=1, of=4, kept=3, removed=1)
    assert found["ffn"] == StructureBudget(requested=0.25, of=256, kept=192, removed=64)
    assert found["kv_groups"] == StructureBudget(requested=0, of=4, kept=4, removed=0)
