"""Selection, explanation and whole plans, against NumPy and arithmetic written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expertprune
from expertprune.artifacts.plan import KindCount, UnitReasons, load_plan
from expertprune.composition.plan import compose, explain, keep_largest, select_layer
from expertprune.composition.scoring import Fused, UnitKind
from expertprune.composition.shares import corpus_shares
from expertprune.composition.widths import LayerWidths
from expertprune.corpora.documents import CorpusName, Document
from expertprune.errors import PlanError, SpecError
from expertprune.models.base import resolve_base
from expertprune.spec.schema import Budget, Relevance, Spec
from expertprune.units import KeptUnits, LayerShape, Structure

SHARED, EXPERT, GENERAL = UnitKind
GQA = LayerShape(hidden=8, ffn=4, query_heads=9, kv_heads=3, head_dim=2)


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [([0, 1, 1, 1, 2], 3, [1, 2, 4]), ([0, 0, 0], 0, []), ([5, 4], 2, [0, 1]), ([-2, -1, -3], 1, [1])],
)
def test_keep_largest(scores: list[float], count: int, kept: list[int]) -> None:
    assert keep_largest(torch.tensor(scores, dtype=torch.float64), count).tolist() == kept


def fused(scores: list[float], sources: list[int] | None = None, kinds: list[int] | None = None) -> Fused:
    kind = None if kinds is None else torch.tensor(kinds)
    return Fused(torch.tensor(scores, dtype=torch.float64), torch.tensor(sources or [0] * len(scores)), kind)


def test_heads_are_chosen_inside_the_groups_that_stay() -> None:
    """The loudest heads belong to the quietest group, and go with it."""
    heads, groups = fused([1, 2, 3, 90, 91, 92, 6, 5, 4]), fused([5, 1, 6])
    kept = select_layer(GQA, LayerWidths(4, 2, 2), {Structure.KV_GROUPS: groups, Structure.QUERY_HEADS: heads})
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(1, 2, 6, 7), kv_groups=(0, 2))
    assert select_layer(GQA, LayerWidths(4, 3, 3), {}) == GQA.all_kept
    kept = select_layer(GQA, LayerWidths(4, 3, 1), {Structure.KV_GROUPS: groups})  # with all their heads
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(6, 7, 8), kv_groups=(2,))


def test_each_group_of_routed_experts_keeps_as_many() -> None:
    """The highest-scoring ones of each, however loud the other group is."""
    shape = LayerShape(hidden=8, ffn=2, query_heads=2, kv_heads=1, head_dim=4, experts=8, expert_groups=2)
    scores = {Structure.EXPERTS: fused([1, 3, 2, 4, 6, 9, 8, 7])}
    assert select_layer(shape, LayerWidths(2, 2, 1, 4), scores).experts == (1, 3, 5, 6)


def test_explain_counts_who_protected_the_kept_units() -> None:
    kept = KeptUnits(ffn=(0, 2, 3, 5), query_heads=(0,), kv_groups=(0,))
    kinds: list[int] = [SHARED, SHARED, EXPERT, GENERAL, EXPERT, SHARED]
    scores = fused([9, 1, 8, 7, 2, 6], sources=[0, 0, 1, 2, 1, 0], kinds=kinds)
    assert explain(kept, {Structure.FFN: scores}, ["language", "domain"]) == {
        "ffn": UnitReasons(
            threshold=2.0,
            protected={"language": 2, "domain": 1, "general": 1},
            shared=KindCount(units=3, kept=2),
            expert_exclusive=KindCount(units=2, kept=1),
            general_exclusive=KindCount(units=1, kept=1),
        )
    }


def test_corpora_of_the_repair_share_what_general_ones_leave() -> None:
    data = {"name": "any", "base": "any", "budget": {"ffn": 0.25}, "compensation": {"general": 0.4}}
    for general, dimensions, expected in (
        (["general", "chat"], {"language": ["de", "en"], "domain": "medical"}, [0.15, 0.15, 0.3, 0.2, 0.2]),
        ([], {"task": ["qa", "math"]}, [0.5, 0.5]),
    ):
        found = corpus_shares(Spec.model_validate({**data, "dimensions": dimensions, "general": general}))
        assert list(found.values()) == pytest.approx(expected)


@pytest.mark.usefixtures("warm_store", "no_model")
def test_every_layer_has_exactly_the_widths_of_the_budget(tiny_spec: Spec, tmp_path: Path) -> None:
    """The same plan each time, and from its file."""
    for general, widths, budget in (
        ([], (24, 6, 3), {"ffn": 0.25}),
        (["general"], (32, 4, 2), {"kv_groups": 1}),  # heads only leave with their group
        (["general"], (16, 2, 2), {"ffn": 0.5, "kv_groups": 1, "query_heads": 0.5}),
    ):
        overrides: dict[str, Any] = {"budget": {**budget, "multiple_of": 4}, "general": general}
        plan = expertprune.compose(tiny_spec, overrides=overrides)
        assert expertprune.compose(tiny_spec, overrides=overrides).digest == plan.digest
        plan.save(tmp_path / "plan.json", overwrite=True)
        assert load_plan(tmp_path / "plan.json") == plan
        assert [(len(k.ffn), len(k.query_heads), len(k.kv_groups)) for k in plan.kept] == [widths] * 3
        assert [plan.budget[s].kept for s in ("ffn", "query_heads", "kv_groups")] == list(widths)
        for layer in plan.layers:
            assert set(layer.why) == set(budget)
            for structure, why in layer.why.items():
                assert list(why.protected) == ["language", "domain", "task", *general]
                assert sum(why.protected.values()) == len(layer.kept.of(Structure(structure)))
                assert (why.shared is not None) == bool(general)


@pytest.mark.usefixtures("warm_store", "no_model")
def test_a_plan_is_what_the_profiles_say(tiny_spec: Spec) -> None:
    """The intersection by hand: largest share over three corpora; what is smallest in each layer goes."""
    profiles = expertprune.profile(tiny_spec, overrides={"general": []})
    plan = expertprune.compose(tiny_spec, overrides={"general": []})
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


@pytest.mark.usefixtures("warm_store", "no_model")
def test_only_the_profiles_of_a_specs_corpora_are_composed(tiny_spec: Spec, store: Path) -> None:
    base, profiles = resolve_base(tiny_spec.base, store), expertprune.profile(tiny_spec)
    for name, profile in profiles.items():
        assert (profile.corpus, profile.layers) == (str(name), list(base.layers))
        (path,) = tiny_spec.corpora.sources[name.value].path
        texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
        assert set(profile.documents) == {Document(text).digest for text in texts}
        assert profile.tokens == sum(len(text.split()) for text in texts)
    more = {**profiles, CorpusName("language", "de"): next(iter(profiles.values()))}
    assert compose(tiny_spec, base, more) == compose(tiny_spec, base, profiles)
    without = {name: profile for name, profile in profiles.items() if name.dimension != "domain"}
    with pytest.raises(SpecError, match="no profile for domain/medical: run the profile stage first"):
        compose(tiny_spec, base, without)
    unknown = tiny_spec.model_copy(update={"relevance": Relevance(criterion="impakt")})
    with pytest.raises(SpecError, match="did you mean 'impact'"):
        compose(unknown, base, profiles)
    too_much = tiny_spec.model_copy(update={"budget": Budget(kv_groups=3)})
    with pytest.raises(PlanError, match="at most 2 of 3 KV groups"):
        compose(too_much, base, profiles)
