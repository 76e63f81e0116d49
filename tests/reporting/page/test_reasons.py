"""Why units were cut: counts, shares and overlaps against arithmetic written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import BaseReference, KindCount, LayerPlan, Parameters, Plan, UnitReasons
from expertprune.artifacts.profile import Profile
from expertprune.composition.scoring import check_criterion
from expertprune.reporting.page.reasons import NOT_CUT, Kind, Protected, decided, kept_units, relevance_findings
from expertprune.units import KeptUnits, LayerShape, Structure


def test_kept_units_are_counted_by_layer_and_by_who_protected_them() -> None:
    """Two layers of 4 neurons; the first keeps 0, 1, 3, the second 2, 3."""
    shapes = [LayerShape(hidden=8, ffn=4, query_heads=2, kv_heads=1, head_dim=2)] * 2
    first = UnitReasons(threshold=0.5, protected={"language": 2, "general": 1}, shared=KindCount(units=3, kept=2))
    second = UnitReasons(threshold=0.25, protected={"language": 0, "general": 2}, shared=KindCount(units=1, kept=1))
    layers = [
        LayerPlan(KeptUnits((0, 1, 3), (0, 1), (0,)), {"ffn": first}),
        LayerPlan(KeptUnits((2, 3), (0, 1), (0,)), {"ffn": second}),
    ]
    plan = Plan("p", BaseReference(model="m", digest="d"), Parameters(before=10, after=7), shapes, layers)
    ffn, heads, groups = kept_units(plan)
    assert (ffn.units, ffn.kept, ffn.cut, ffn.kept_fraction) == (8, 5, 3, 5 / 8)
    assert (ffn.of, ffn.kept_by_layer) == ([4, 4], [3, 2])
    assert ffn.protected == [Protected("language", 2, [2, 0]), Protected("general", 3, [1, 2])]
    assert ffn.kinds == [Kind("shared", 4, 3)]
    for uncut, units in ((heads, 4), (groups, 2)):
        assert (uncut.decided, uncut.kept, uncut.cut, uncut.kept_fraction, uncut.kinds) == (False, units, 0, 1.0, [])
    assert heads.protected == groups.protected == []
    assert decided(plan) == [Structure.FFN]
    # A third layer loses none: nobody had to protect its units, and the counts add up all the same.
    more = replace(plan, shapes=[*shapes, shapes[0]], layers=[*layers, LayerPlan(shapes[0].all_kept)])
    ffn = kept_units(more)[0]
    assert ffn.protected[2:] == [Protected(NOT_CUT, 4, [0, 0, 4])]
    assert [sum(counts) for counts in zip(*(each.layers for each in ffn.protected), strict=True)] == ffn.kept_by_layer


def test_a_real_build_against_brute_force(tiny_build: tuple[Path, Path]) -> None:
    plan = Expert.load(tiny_build[0]).plan
    profiles = {name: Profile(tiny_build[1] / "profiles" / f"{key}.safetensors") for name, key in plan.profiles.items()}
    ffn, groups = relevance_findings(plan, profiles, check_criterion("impact"), "mean", None)
    assert [(each.structure, each.criterion) for each in (ffn, groups)] == [("ffn", "impact"), ("kv_groups", "impact")]
    gone = {(layer, j) for layer, kept in enumerate(plan.kept) for j in range(32) if j not in kept.ffn}
    sets = {}
    for corpus in ffn.corpora:
        profile = profiles[corpus.name]
        # impact of neuron j: mean over documents of (rms · ‖column‖)²
        scores = [
            (profile.read_half(f"ffn.{layer}.rms") * profile.read(f"ffn.{layer}.output_l2")).square().mean(0).double()
            for layer in range(3)
        ]
        total = float(torch.cat(scores).sum())
        assert corpus.by_layer == pytest.approx([float(each.sum()) / total for each in scores], rel=1e-5)
        assert corpus.cut == pytest.approx(sum(float(scores[layer][j]) for layer, j in gone) / total, rel=1e-5)
        sets[corpus.name] = {(layer, int(j)) for layer in range(3) for j in scores[layer].argsort()[:8]}  # a quarter
    overlap = ffn.overlap
    assert overlap is not None
    assert (overlap.corpora, overlap.fraction, overlap.irrelevant) == (list(sets), 0.25, 24)
    assert overlap.chance == pytest.approx(1 / 7)  # 2 of 32 in common, 14 together
    for row, own in zip(overlap.matrix, sets.values(), strict=True):
        assert row == pytest.approx([len(own & other) / len(own | other) for other in sets.values()])
    agreed = set.intersection(*(own for name, own in sets.items() if name != "general/general"))
    assert (overlap.agreed, overlap.agreed_and_cut) == (len(agreed), len(agreed & gone))
    assert overlap.agreed_by_chance == pytest.approx(3 * 32 * (1 / 4) ** 3)
    assert overlap.cut_within == pytest.approx([len(own & gone) / len(gone) for own in sets.values()])
    assert overlap.cut_within_all == pytest.approx(len(agreed & gone) / len(gone))
    # Where nothing is cut, a quarter counts as irrelevant.
    whole = replace(plan, layers=[LayerPlan(shape.all_kept) for shape in plan.shapes])
    (uncut,) = relevance_findings(whole, profiles, check_criterion("impact"), "mean", None)
    assert [corpus.cut for corpus in uncut.corpora] == [None] * 4
    assert uncut.overlap is not None
    assert (uncut.overlap.matrix, uncut.overlap.fraction) == (overlap.matrix, 0.25)
    assert (uncut.overlap.cut_within, uncut.overlap.cut_within_all) == ([None] * 4, None)
