"""Selection, explanation and whole plans, against NumPy and arithmetic written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expertprune
from expertprune.artifacts.plan import KindCount, UnitReasons, load_plan
from expertprune.composition.plan import compose, explain, keep_largest, select_layer
from expertprune.composition.scoring import Fused, UnitKind
from expertprune.composition.widths import LayerWidths
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError, SpecError
from expertprune.models.base import resolve_base
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Budget, Relevance, Spec
from expertprune.units import KeptUnits, LayerShape, Structure

# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([3, 1, 2], 2, [0, 2]),
        ([1, 1, 1, 1], 2, [0, 1]),
        ([0, 1, 1, 1, 2], 3, [1, 2, 4]),
        ([0, 0, 0], 0, []),
        ([5, 4], 2, [0, 1]),
        ([-1, -2, -3], 1, [0]),
    ],
)
def test_keep_largest(scores: list[float], count: int, kept: list[int]) -> None:
    assert keep_largest(torch.tensor(scores, dtype=torch.float64), count).tolist() == kept


def fused(scores: list[float], sources: list[int] | None = None, kinds: list[int] | None = None) -> Fused:
    units = len(scores)
    kind = None if kinds is None else torch.tensor(kinds)
    return Fused(torch.tensor(scores, dtype=torch.float64), torch.tensor(sources or [0] * units), kind)


SHARED, EXPERT, GENERAL = UnitKind
GQA = LayerShape(hidden=8, ffn=4, query_heads=9, kv_heads=3, head_dim=2)


def test_heads_are_chosen_inside_the_groups_that_stay() -> None:
    """The loudest heads belong to the quietest group, and go with it."""
    heads = fused([1, 2, 3, 90, 91, 92, 6, 5, 4])
    kept = select_layer(
        GQA, LayerWidths(4, 2, 2), {Structure.KV_GROUPS: fused([5, 1, 4]), Structure.QUERY_HEADS: heads}
    )
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(1, 2, 6, 7), kv_groups=(0, 2))


def test_groups_that_stay_keep_all_their_heads_where_heads_are_not_cut() -> None:
    assert select_layer(GQA, LayerWidths(4, 3, 3), {}) == GQA.all_kept
    kept = select_layer(GQA, LayerWidths(4, 3, 1), {Structure.KV_GROUPS: fused([5, 1, 6])})
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(6, 7, 8), kv_groups=(2,))


# --- explanation ----------------------------------------------------------------------------------------------------


def test_explain_counts_who_protected_the_kept_units() -> None:
    kept = KeptUnits(ffn=(0, 2, 3, 5), query_heads=(0,), kv_groups=(0,))
    scores = fused(
        [9, 1, 8, 7, 2, 6], sources=[0, 0, 1, 2, 1, 0], kinds=[SHARED, SHARED, EXPERT, GENERAL, EXPERT, SHARED]
    )
    assert explain(kept, {Structure.FFN: scores}, ["language", "domain"]) == {
        "ffn": UnitReasons(
            threshold=2.0,
            protected={"language": 2, "domain": 1, "general": 1},
            shared=KindCount(units=3, kept=2),
            expert_exclusive=KindCount(units=2, kept=1),
            general_exclusive=KindCount(units=1, kept=1),
        )
    }


# --- whole plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "widths", "scored"),
    [
        ({"budget.ffn": 0.25}, (24, 6, 3), {"ffn"}),
        ({"budget.ffn": 0, "budget.kv_groups": 1}, (32, 4, 2), {"kv_groups"}),  # heads only leave with their group
        ({"budget.ffn": 0, "budget.query_heads": 3}, (32, 3, 3), {"query_heads"}),
        (
            {"budget.ffn": 0.5, "budget.kv_groups": 1, "budget.query_heads": 0.5},
            (16, 2, 2),
            {"ffn", "query_heads", "kv_groups"},
        ),
    ],
)
@pytest.mark.parametrize("general", [["general"], []])
def test_every_layer_has_exactly_the_widths_of_the_budget(
    tiny_spec: Spec, budget: dict[str, Any], widths: tuple[int, int, int], scored: set[str], general: list[str]
) -> None:
    plan = expertprune.compose(tiny_spec, overrides={**budget, "general": general})
    assert [(len(k.ffn), len(k.query_heads), len(k.kv_groups)) for k in plan.kept] == [widths] * 3
    assert [plan.budget[s].kept for s in ("ffn", "query_heads", "kv_groups")] == list(widths)
    for layer in plan.layers:
        assert set(layer.why) == scored
        for structure, why in layer.why.items():
            kept = len(layer.kept.of(Structure(structure)))
            assert sum(why.protected.values()) == kept
            assert list(why.protected) == ["language", "domain", "task", *general]
            kinds = [kind for kind in (why.shared, why.expert_exclusive, why.general_exclusive) if kind is not None]
            assert len(kinds) == (3 if general else 0)
            if general:
                assert sum(kind.kept for kind in kinds) == kept
                assert sum(kind.units for kind in kinds) == {"ffn": 32, "query_heads": 6, "kv_groups": 3}[structure]


def test_a_plan_is_what_the_profiles_say(tiny_spec: Spec) -> None:
    """The intersection by hand: largest share over three corpora; what is smallest in each layer goes."""
    spec = parse_spec(tiny_spec.document(), "spec", Path.cwd(), {"general": []})
    profiles = expertprune.profile(spec)
    plan = expertprune.compose(spec)
    largest = []
    for profile in profiles.values():
        parts = ("rms", "rms.scale", "output_l2")
        factors = [[profile.read(f"ffn.{n}.{part}").double().numpy() for part in parts] for n in range(3)]
        impact = np.array([(rms * scale * norm) ** 2 for rms, scale, norm in factors]).mean(1)
        largest.append(impact / impact.sum())
    assert len(largest) == 3
    score = np.max(largest, axis=0)
    for layer in range(3):
        dropped = np.argsort(score[layer])[:8]
        assert set(plan.kept[layer].ffn) == set(range(32)) - set(dropped.tolist())
        why = plan.layers[layer].why["ffn"]
        assert why.threshold == pytest.approx(score[layer, dropped].max(), rel=1e-5)
        owners = np.argmax([corpus[layer, list(plan.kept[layer].ffn)] for corpus in largest], axis=0)
        assert list(why.protected.values()) == np.bincount(owners, minlength=3).tolist()


def test_plans_are_deterministic_and_the_same_after_saving_and_loading(tiny_spec: Spec, tmp_path: Path) -> None:
    overrides = {"budget.kv_groups": 1, "budget.query_heads": 3}
    one = expertprune.compose(tiny_spec, store=tmp_path / "one", overrides=overrides)
    other = expertprune.compose(tiny_spec, store=tmp_path / "other", overrides=overrides)
    assert one == other
    assert one.digest == other.digest
    one.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == one


def test_compose_refuses_what_it_cannot_do(tiny_spec: Spec, store: Path) -> None:
    base = resolve_base(tiny_spec.base, store)
    profiles = expertprune.profile(tiny_spec)
    without = {name: profile for name, profile in profiles.items() if name.dimension != "domain"}
    with pytest.raises(SpecError, match="no profile for domain/medical: run the profile stage first"):
        compose(tiny_spec, base, without)
    unknown = tiny_spec.model_copy(update={"relevance": Relevance(criterion="impakt")})
    with pytest.raises(SpecError, match="did you mean 'impact'"):
        compose(unknown, base, profiles)
    too_much = tiny_spec.model_copy(update={"budget": Budget(kv_groups=3)})
    with pytest.raises(PlanError, match="at most 2 of 3 KV groups"):
        compose(too_much, base, profiles)


def test_a_profile_that_the_spec_does_not_name_has_no_say(tiny_spec: Spec, tmp_path: Path, store: Path) -> None:
    base, profiles = resolve_base(tiny_spec.base, store), expertprune.profile(tiny_spec)
    stray = next(iter(profiles.values()))
    assert compose(tiny_spec, base, {**profiles, CorpusName("language", "de"): stray}) == compose(
        tiny_spec, base, profiles
    )
