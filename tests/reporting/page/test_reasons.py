"""Why units were cut: counts, shares and overlaps against arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import BaseReference, KindCount, LayerPlan, Parameters, Plan, UnitReasons
from expertprune.artifacts.profile import Profile
from expertprune.composition.scoring import check_criterion
from expertprune.reporting.page.reasons import (
    CorpusRelevance,
    Kind,
    Protected,
    _overlap,
    _shares,
    decided,
    kept_units,
    relevance_findings,
)
from expertprune.units import KeptUnits, LayerShape, Structure


def a_plan() -> Plan:
    """Two layers of 4 neurons; the first keeps 0, 1, 3, the second 2, 3."""
    shapes = [LayerShape(hidden=8, ffn=4, query_heads=2, kv_heads=1, head_dim=2)] * 2
    why = [
        UnitReasons(threshold=0.5, protected={"language": 2, "general": 1}, shared=KindCount(units=3, kept=2)),
        UnitReasons(threshold=0.25, protected={"language": 0, "general": 2}, shared=KindCount(units=1, kept=1)),
    ]
    layers = [
        LayerPlan(KeptUnits((0, 1, 3), (0, 1), (0,)), {"ffn": why[0]}),
        LayerPlan(KeptUnits((2, 3), (0, 1), (0,)), {"ffn": why[1]}),
    ]
    return Plan("p", BaseReference(model="m", digest="d"), Parameters(before=10, after=7), shapes, layers)


def test_kept_units_are_counted_by_layer_and_by_who_protected_them() -> None:
    ffn, heads, groups = kept_units(a_plan())
    assert (ffn.units, ffn.kept, ffn.cut, ffn.kept_fraction) == (8, 5, 3, 5 / 8)
    assert (ffn.of, ffn.kept_by_layer) == ([4, 4], [3, 2])
    assert ffn.protected == [Protected("language", 2, [2, 0]), Protected("general", 3, [1, 2])]
    assert ffn.kinds == [Kind("shared", 4, 3)]
    for uncut, units in ((heads, 4), (groups, 2)):
        assert (uncut.decided, uncut.kept, uncut.cut, uncut.kept_fraction) == (False, units, 0, 1.0)
        assert uncut.kinds == []
    assert decided(a_plan()) == [Structure.FFN]


def test_shares_of_relevance_by_layer_and_of_what_was_cut() -> None:
    layers = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([6.0, 2.0, 1.0, 1.0])]
    cut = [np.array([False, False, True, False]), np.array([True, True, False, False])]
    # 20 in all, 10 in each layer; cut: 3 + 6 + 2
    assert _shares("a", layers, cut) == CorpusRelevance("a", [0.5, 0.5], pytest.approx(11 / 20))
    assert _shares("a", [np.zeros(4)], cut[:1]) == CorpusRelevance("a", None, None)  # no relevance at all


def test_overlap_of_irrelevant_sets_by_hand() -> None:
    # One layer of 4, half of it cut. Irrelevant: en {0, 1}, medical {1, 2}, general {0, 3}; cut {0, 1}.
    corpora = {
        "language/en": [np.array([1.0, 2.0, 3.0, 4.0])],
        "domain/medical": [np.array([4.0, 1.0, 2.0, 3.0])],
        "general/general": [np.array([1.0, 4.0, 3.0, 2.0])],
    }
    found = _overlap(corpora, [np.array([True, True, False, False])])
    assert found is not None
    assert (found.fraction, found.irrelevant) == (0.5, 2)
    assert found.matrix[0] == pytest.approx([1, 1 / 3, 1 / 3])  # {1} of {0, 1, 2}; {0} of {0, 1, 3}
    assert found.matrix[1] == pytest.approx([1 / 3, 1, 0])
    assert found.chance == pytest.approx(1 / 3)  # two of four: one in common, three together
    assert found.agreed == 1  # both dimensions: {1}; general does not count
    assert found.agreed_and_cut == 1
    assert found.agreed_by_chance == pytest.approx(1.0)  # 4 · (2/4)²
    assert found.cut_within == pytest.approx([1.0, 0.5, 0.5])
    assert found.cut_within_all == pytest.approx(0.5)


def test_where_nothing_is_cut_a_quarter_counts_as_irrelevant() -> None:
    found = _overlap({"language/en": [np.arange(8.0)], "task/qa": [np.arange(8.0)]}, [np.zeros(8, dtype=bool)])
    assert found is not None
    assert (found.fraction, found.irrelevant, found.agreed) == (0.25, 2, 2)
    assert found.cut_within == [None, None]
    assert found.cut_within_all is None
    assert _overlap({"language/en": [np.array([1.0])]}, [np.array([False])]) is None  # one unit agrees with nothing


def test_a_real_build_against_brute_force(tiny_build: tuple[Path, Path]) -> None:
    folder, store = tiny_build
    plan = Expert.load(folder).plan
    profiles = {name: Profile(store / "profiles" / f"{key}.safetensors") for name, key in plan.profiles.items()}
    ffn, groups = relevance_findings(plan, profiles, check_criterion("impact"), "mean", None)
    assert (ffn.structure, groups.structure) == ("ffn", "kv_groups")
    assert ffn.overlap is not None
    assert ffn.overlap.corpora == [corpus.name for corpus in ffn.corpora]
    sets = []
    for corpus in ffn.corpora:
        profile = profiles[corpus.name]
        # impact of neuron j: mean over documents of (rms · ‖column‖)²
        scores = [
            (profile.read_half(f"ffn.{layer}.rms") * profile.read(f"ffn.{layer}.output_l2")).square().mean(0).double()
            for layer in range(3)
        ]
        total = float(torch.cat(scores).sum())
        assert corpus.by_layer == pytest.approx([float(each.sum()) / total for each in scores], rel=1e-5)
        gone = sum(float(s[j]) for s, k in zip(scores, plan.kept, strict=True) for j in range(32) if j not in k.ffn)
        assert corpus.cut == pytest.approx(gone / total, rel=1e-5)
        sets.append({(layer, int(j)) for layer in range(3) for j in scores[layer].argsort()[:8]})  # a quarter of 32
    for row, first in zip(ffn.overlap.matrix, sets, strict=True):
        assert row == pytest.approx([len(first & other) / len(first | other) for other in sets])
