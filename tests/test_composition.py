"""The algebra of composition against set definitions and arithmetic written out; whole plans against NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import expertprune
from expertprune.artifacts import LayerPlan, Plan, Profile, load_plan, save_profile
from expertprune.budgets import Widths
from expertprune.composition import (
    EXPERT,
    GENERAL,
    SHARED,
    Fused,
    compose,
    corpus_scores,
    explain,
    fuse,
    intersection,
    keep_largest,
    over_documents,
    percentile,
    rules,
    score_structure,
    select_layer,
    unit_statistics,
)
from expertprune.corpora import CorpusName
from expertprune.errors import PlanError, SpecError
from expertprune.models import resolve_base
from expertprune.spec import Budget, Dimensions, Fusion, Spec, parse_spec
from expertprune.units import KeptUnits, LayerShape, Structure

# Few values, so that ties are common.
SCORES = st.integers(1, 3).flatmap(
    lambda dimensions: arrays.arrays(np.int64, (dimensions, 12), elements=st.integers(0, 6))
)


# --- rules ----------------------------------------------------------------------------------------------------------


@given(scores=SCORES)
@settings(deadline=None)
def test_intersection_is_the_intersection_of_the_irrelevant_sets(scores: np.ndarray) -> None:
    combined = rules["intersection"](torch.from_numpy(scores)).tolist()
    for threshold in range(-1, 8):
        irrelevant = [{unit for unit in range(12) if row[unit] <= threshold} for row in scores]
        assert {unit for unit in range(12) if combined[unit] <= threshold} == set.intersection(*irrelevant)


@given(scores=SCORES)
@settings(deadline=None)
def test_union_is_the_union_of_the_irrelevant_sets(scores: np.ndarray) -> None:
    combined = rules["union"](torch.from_numpy(scores)).tolist()
    for threshold in range(-1, 8):
        irrelevant = [{unit for unit in range(12) if row[unit] <= threshold} for row in scores]
        assert {unit for unit in range(12) if combined[unit] <= threshold} == set.union(*irrelevant)


@given(scores=SCORES)
@settings(deadline=None)
def test_mean_weighs_dimensions_alike(scores: np.ndarray) -> None:
    combined = rules["mean"](torch.from_numpy(scores).double()).tolist()
    assert combined == pytest.approx([sum(column) / len(column) for column in scores.T.tolist()])


@given(data=st.data(), dimensions=st.integers(1, 3), units=st.integers(1, 12))
@settings(deadline=None)
def test_the_budget_chooses_the_smallest_threshold_that_reaches_it(
    data: st.DataObject, dimensions: int, units: int
) -> None:
    """Without ties, what is dropped for a count is the intersection at the smallest threshold that holds so many."""
    order = data.draw(st.permutations(range(dimensions * units)))
    scores = np.array(order).reshape(dimensions, units)
    for dropped_count in range(units + 1):
        kept = keep_largest(intersection(torch.from_numpy(scores)), units - dropped_count).tolist()
        for threshold in range(-1, dimensions * units):
            in_all = {unit for unit in range(units) if all(row[unit] <= threshold for row in scores)}
            if len(in_all) >= dropped_count:
                break
        assert set(range(units)) - set(kept) == in_all


@pytest.mark.parametrize("rule", ["intersection", "union", "mean"])
def test_one_dimension_is_its_own_combination(rule: str) -> None:
    scores = torch.tensor([[0.3, 0.1, 0.2]])
    assert torch.equal(rules[rule](scores), scores[0])


def test_the_rules_are_those_that_a_spec_may_name() -> None:
    assert sorted(rules) == ["intersection", "mean", "union"]


# --- scales and aggregation -----------------------------------------------------------------------------------------


@given(scores=arrays.arrays(np.float64, st.integers(1, 30), elements=st.integers(-3, 3).map(float)))
@settings(deadline=None)
def test_percentile_is_the_average_rank(scores: np.ndarray) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = (stats.rankdata(scores, method="average") - 1) / max(1, len(scores) - 1)
    np.testing.assert_allclose(percentile(torch.from_numpy(scores)).numpy(), expected)


def test_percentile_written_out() -> None:
    assert percentile(torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0])).tolist() == [0.75, 0.0, 0.375, 0.375, 1.0]
    assert percentile(torch.tensor([7.0])).tolist() == [0.0]
    assert percentile(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [2.5, 20.0]),
        ("max", [4.0, 50.0]),
        (0.5, [2.5, 15.0]),
        (0.25, [1.75, 7.5]),
        (0.9, [3.7, 41.0]),
    ],
)
def test_over_documents(how: str | float, expected: list[float]) -> None:
    scores = torch.tensor([[1.0, 50.0], [4.0, 0.0], [2.0, 20.0], [3.0, 10.0]])
    assert over_documents(scores, how).tolist() == pytest.approx(expected)


@given(
    scores=arrays.arrays(np.float32, (5, 3), elements=st.floats(0, 100, width=32)),
    quantile=st.sampled_from([0.1, 0.75]),
)
@settings(deadline=None)
def test_quantiles_over_documents_are_numpys(scores: np.ndarray, quantile: float) -> None:
    expected = np.quantile(scores.astype(np.float64), quantile, axis=0)
    np.testing.assert_allclose(over_documents(torch.from_numpy(scores), quantile), expected, rtol=1e-5, atol=1e-5)


# --- scores of made-up profiles -------------------------------------------------------------------------------------

SHAPE = LayerShape(hidden=8, ffn=6, query_heads=4, kv_heads=2, head_dim=2)
LAYERS, DOCUMENTS = 2, 3


def made_profile(folder: Path, corpus: str, seed: int, silent: bool = False) -> Profile:
    """A profile of random statistics over two layers and three documents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.05) * (0 if silent else 1)

    statistics: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for block, channels in (("ffn", SHAPE.ffn), ("heads", SHAPE.query_heads * SHAPE.head_dim)):
            statistics |= {
                f"{block}.{layer}.rms": (1000 * draw(DOCUMENTS, channels)).half(),
                f"{block}.{layer}.scale": torch.tensor(2.0**-9),
                f"{block}.{layer}.output_l1": draw(channels),
                f"{block}.{layer}.output_l2": draw(channels),
            }
        for block, units in (("ffn", SHAPE.ffn), ("heads", SHAPE.query_heads), ("groups", SHAPE.kv_heads)):
            statistics[f"{block}.{layer}.weight_norm"] = draw(units)
            if block != "ffn":
                statistics[f"{block}.{layer}.impact"] = draw(DOCUMENTS, units)
    about = {
        "digest": corpus,
        "corpus": corpus,
        "documents": ["x"] * DOCUMENTS,
        "tokens": 9,
        "layers": [vars(SHAPE)] * LAYERS,
    }
    return save_profile(folder / f"{corpus}-{seed}.safetensors", about, statistics)


def a_spec(dimensions: Mapping[str, list[str]], general: list[str], **compose_settings: Any) -> Spec:
    return Spec(
        name="made-up",
        base="nowhere",
        dimensions=Dimensions(**dimensions),
        general=general,
        budget=Budget(ffn=2, kv_groups=1, query_heads=2),
        compose=compose_settings,
    )


def numbers(profile: Profile, name: str) -> np.ndarray:
    return profile.read(name).double().numpy()


def raw_impact(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Of each document and unit, from the profile's own numbers, `[documents, units]`."""
    if structure is Structure.FFN:
        rms = numbers(profile, f"ffn.{layer}.rms") * 2.0**-9
        return (rms * numbers(profile, f"ffn.{layer}.output_l2")) ** 2
    return numbers(profile, f"{'heads' if structure is Structure.QUERY_HEADS else 'groups'}.{layer}.impact")


def raw_activation(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Root of the mean over documents of each unit's summed squares, over the layer's mean, `[units]`."""
    block, units = ("ffn", 6) if structure is Structure.FFN else ("heads", SHAPE.units(structure))
    rms = numbers(profile, f"{block}.{layer}.rms") * 2.0**-9
    norm = np.sqrt((rms.reshape(DOCUMENTS, units, -1) ** 2).sum(2).mean(0))
    return norm / norm.mean()


@pytest.mark.parametrize("structure", Structure)
@pytest.mark.parametrize("aggregate", ["mean", "max", 0.25])
def test_share_is_the_part_of_the_whole_models_total(
    tmp_path: Path, structure: Structure, aggregate: str | float
) -> None:
    profile = made_profile(tmp_path, "en", 1)
    scores = corpus_scores(profile, structure, a_spec({"language": ["en"]}, [], aggregate=aggregate))
    reduce = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), 0.25: lambda x: np.quantile(x, 0.25, axis=0)}
    raw = [reduce[aggregate](raw_impact(profile, structure, layer)) for layer in range(LAYERS)]
    assert sum(float(layer.sum()) for layer in scores.scaled) == pytest.approx(1)
    for layer in range(LAYERS):
        np.testing.assert_allclose(scores.scaled[layer], raw[layer] / np.concatenate(raw).sum(), rtol=1e-5)
        np.testing.assert_allclose(scores.activation[layer], raw_activation(profile, structure, layer), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["impact", "activation", "magnitude", "random"])
def test_shares_of_every_criterion_sum_to_one(tmp_path: Path, criterion: str) -> None:
    spec = a_spec({"language": ["en"]}, [])
    spec.relevance.criterion = criterion
    for structure in Structure:
        scaled = corpus_scores(made_profile(tmp_path, "en", 1), structure, spec).scaled
        assert sum(float(layer.sum()) for layer in scaled) == pytest.approx(1)


def test_a_louder_corpus_has_the_same_shares_and_percentiles(tmp_path: Path) -> None:
    profile = made_profile(tmp_path, "en", 1)
    louder = {name: profile.read(name) for layer in range(LAYERS) for name in names_of(layer)}
    for layer in range(LAYERS):
        louder[f"ffn.{layer}.scale"] = torch.tensor(2.0**3)
    loud = save_profile(tmp_path / "loud.safetensors", profile.about, louder)
    for scale in ("share", "percentile"):
        spec = a_spec({"language": ["en"]}, [], scale=scale)
        one, other = (corpus_scores(p, Structure.FFN, spec) for p in (profile, loud))
        for layer in range(LAYERS):
            torch.testing.assert_close(one.scaled[layer], other.scaled[layer])
            torch.testing.assert_close(one.activation[layer], other.activation[layer])


def names_of(layer: int) -> list[str]:
    return [f"ffn.{layer}.{name}" for name in ("rms", "output_l1", "output_l2", "weight_norm")]


@pytest.mark.parametrize("scale", ["share", "percentile"])
def test_a_silent_corpus_is_scored_without_division_by_zero(tmp_path: Path, scale: str) -> None:
    profile = made_profile(tmp_path, "en", 1, silent=True)
    scores = corpus_scores(profile, Structure.FFN, a_spec({"language": ["en"]}, [], scale=scale))
    expected = 0.0 if scale == "share" else 0.5
    assert all(layer.tolist() == [expected] * 6 for layer in scores.scaled)
    assert all(layer.tolist() == [0.0] * 6 for layer in scores.activation)


def test_percentiles_are_of_the_layer(tmp_path: Path) -> None:
    profile = made_profile(tmp_path, "en", 1)
    scores = corpus_scores(profile, Structure.FFN, a_spec({"language": ["en"]}, [], scale="percentile"))
    for layer in range(LAYERS):
        assert sorted(scores.scaled[layer].tolist()) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
        assert (
            scores.scaled[layer].argsort().tolist()
            == raw_impact(profile, Structure.FFN, layer).mean(0).argsort().tolist()
        )


def test_statistics_of_heads_and_groups_have_all_their_channels(tmp_path: Path) -> None:
    profile = made_profile(tmp_path, "en", 1)
    for structure, units in ((Structure.QUERY_HEADS, 4), (Structure.KV_GROUPS, 2)):
        statistics = unit_statistics(profile, structure, 1, seed=0)
        assert (statistics.units, statistics.documents, statistics.layer) == (units, DOCUMENTS, 1)
        np.testing.assert_allclose(statistics.rms, numbers(profile, "heads.1.rms") * 2.0**-9)
        assert statistics.impact is not None
        np.testing.assert_allclose(statistics.impact, raw_impact(profile, structure, 1))


@pytest.fixture
def profiles(tmp_path: Path) -> dict[CorpusName, Profile]:
    names = [
        ("language", "en"),
        ("language", "de"),
        ("domain", "medical"),
        ("task", "qa"),
        ("general", "g"),
        ("general", "h"),
    ]
    return {CorpusName(*name): made_profile(tmp_path, name[1], seed) for seed, name in enumerate(names)}


def shares(profile: Profile, structure: Structure) -> np.ndarray:
    """`[layers, units]`"""
    raw = np.array([raw_impact(profile, structure, layer).mean(0) for layer in range(LAYERS)])
    return raw / raw.sum()


@pytest.mark.parametrize("structure", Structure)
@pytest.mark.parametrize("rule", ["intersection", "union", "mean"])
def test_several_values_of_a_dimension_count_by_their_largest(
    profiles: dict[CorpusName, Profile], structure: Structure, rule: str
) -> None:
    spec = a_spec({"language": ["en", "de"], "domain": ["medical"], "task": ["qa"]}, [], rule=rule)
    en, de, medical, qa = (shares(profile, structure) for profile in list(profiles.values())[:4])
    per_dimension = np.stack([np.maximum(en, de), medical, qa])
    combine = {"intersection": np.max, "union": np.min, "mean": np.mean}[rule]
    expected = combine(per_dimension, axis=0)
    fused = score_structure(spec, profiles, structure, LAYERS)
    for layer in range(LAYERS):
        np.testing.assert_allclose(fused[layer].score, expected[layer], rtol=1e-5)
        assert fused[layer].kind is None
        nearest = np.abs(per_dimension[:, layer] - expected[layer]).argmin(0)
        assert fused[layer].source.tolist() == nearest.tolist()
    assert not np.allclose(np.maximum(en, de), en)


@pytest.mark.parametrize("structure", Structure)
def test_several_general_corpora_count_by_their_largest(
    profiles: dict[CorpusName, Profile], structure: Structure
) -> None:
    """With everything shared and the general score alone, that is what is left."""
    spec = a_spec({"language": ["en"]}, ["g", "h"], fusion={"tau": 1.0, "lambda": 1.0})
    g, h = (shares(profiles[CorpusName("general", value)], structure) for value in "gh")
    fused = score_structure(spec, profiles, structure, LAYERS)
    for layer in range(LAYERS):
        np.testing.assert_allclose(fused[layer].score, np.maximum(g, h)[layer], rtol=1e-5)
        assert fused[layer].kind is not None
        assert set(fused[layer].kind.tolist()) == {SHARED}


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.15, 0.2, 0.3])
def test_scores_are_fused_with_the_activations_of_the_dimensions(
    profiles: dict[CorpusName, Profile], tau: float
) -> None:
    """Every unit by hand, from the profiles' numbers: largest activation over values and dimensions, then the fusion."""
    weight, beta = 0.25, 0.75
    spec = a_spec(
        {"language": ["en", "de"], "domain": ["medical"]},
        ["g", "h"],
        fusion={"tau": tau, "lambda": weight, "beta": beta},
    )
    expert_of = [
        profiles[CorpusName(*name)] for name in (("language", "en"), ("language", "de"), ("domain", "medical"))
    ]
    general_of = [profiles[CorpusName("general", value)] for value in "gh"]
    fused = score_structure(spec, profiles, Structure.FFN, LAYERS)
    kinds = set()
    for layer, unit in itertools.product(range(LAYERS), range(SHAPE.ffn)):
        s_t = max(shares(profile, Structure.FFN)[layer, unit] for profile in expert_of)
        n_t = max(raw_activation(profile, Structure.FFN, layer)[unit] for profile in expert_of)
        s_g = max(shares(profile, Structure.FFN)[layer, unit] for profile in general_of)
        n_g = max(raw_activation(profile, Structure.FFN, layer)[unit] for profile in general_of)
        if abs(n_g - n_t) / (n_g + n_t) <= tau:
            kind, score = SHARED, weight * s_g + (1 - weight) * s_t
        elif n_t > n_g:
            kind, score = EXPERT, s_t
        else:
            kind, score = GENERAL, max(beta * s_g, s_t)
        assert float(fused[layer].score[unit]) == pytest.approx(score, rel=1e-5)
        assert fused[layer].kind is not None
        assert int(fused[layer].kind[unit]) == kind
        assert (int(fused[layer].source[unit]) == 2) == (score > s_t)
        kinds.add(kind)
    assert len(kinds) > 1


# --- fusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s_t", "s_g", "n_t", "n_g", "constants", "score", "kind"),
    [
        pytest.param(0.2, 0.6, 1.0, 1.1, {}, 0.4, SHARED, id="shared: half of each"),
        pytest.param(0.2, 0.6, 1.0, 1.1, {"lambda": 0.25}, 0.3, SHARED, id="shared: lambda is general's weight"),
        pytest.param(0.2, 0.6, 1.0, 1.1, {"lambda": 0}, 0.2, SHARED, id="shared: expert alone"),
        pytest.param(0.2, 0.6, 1.0, 1.1, {"lambda": 1}, 0.6, SHARED, id="shared: general alone"),
        pytest.param(0.6, 0.2, 1.1, 1.0, {}, 0.4, SHARED, id="shared: the difference has no direction"),
        pytest.param(0.2, 0.6, 3.0, 1.0, {}, 0.2, EXPERT, id="expert: general has no say"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {}, 0.3, GENERAL, id="general: half of its score"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {"beta": 1}, 0.6, GENERAL, id="general: all of its score"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {"beta": 0}, 0.2, GENERAL, id="general: never below the expert's"),
        pytest.param(0.4, 0.6, 1.0, 3.0, {"beta": 0.5}, 0.4, GENERAL, id="general: the expert's is larger"),
        pytest.param(0.2, 0.6, 1.0, 1.0, {"tau": 0}, 0.4, SHARED, id="tau 0: equal activations are shared"),
        pytest.param(0.2, 0.6, 1.0, 1.001, {"tau": 0}, 0.3, GENERAL, id="tau 0: nothing else is"),
        pytest.param(0.2, 0.6, 1.001, 1.0, {"tau": 0}, 0.2, EXPERT, id="tau 0: nothing else is, the other way"),
        pytest.param(0.2, 0.6, 5.0, 0.0, {"tau": 1}, 0.4, SHARED, id="tau 1: everything is shared"),
        pytest.param(0.2, 0.6, 3.0, 1.0, {"tau": 0.5}, 0.4, SHARED, id="at tau: shared"),
        pytest.param(0.2, 0.6, 0.0, 0.0, {"tau": 0}, 0.4, SHARED, id="silent in both: shared"),
        pytest.param(0.2, 0.6, 0.0, 1.0, {}, 0.3, GENERAL, id="silent for the expert"),
    ],
)
def test_fuse(
    s_t: float, s_g: float, n_t: float, n_g: float, constants: dict[str, float], score: float, kind: int
) -> None:
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (s_t, s_g, n_t, n_g)]
    fused, found = fuse(*tensors, Fusion(**constants))
    assert fused.tolist() == pytest.approx([score])
    assert found.tolist() == [kind]


def test_fuse_treats_each_unit_by_itself() -> None:
    expert, general = torch.tensor([0.2, 0.2, 0.2]), torch.tensor([0.6, 0.6, 0.6])
    fused, kind = fuse(expert, general, torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, 3.0]), Fusion())
    assert fused.tolist() == pytest.approx([0.4, 0.2, 0.3])
    assert kind.tolist() == [SHARED, EXPERT, GENERAL]


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


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=200), data=st.data())
@settings(deadline=None)
def test_keep_largest_among_equals_keeps_the_first(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:count])
    assert keep_largest(torch.tensor(scores), count).tolist() == expected


def fused(scores: list[float], sources: list[int] | None = None, kinds: list[int] | None = None) -> Fused:
    units = len(scores)
    kind = None if kinds is None else torch.tensor(kinds)
    return Fused(torch.tensor(scores, dtype=torch.float64), torch.tensor(sources or [0] * units), kind)


GQA = LayerShape(hidden=8, ffn=4, query_heads=9, kv_heads=3, head_dim=2)


def test_heads_are_chosen_inside_the_groups_that_stay() -> None:
    """The loudest heads belong to the quietest group, and go with it."""
    heads = fused([1, 2, 3, 90, 91, 92, 6, 5, 4])
    kept = select_layer(GQA, Widths(4, 2, 2, {}), {Structure.KV_GROUPS: fused([5, 1, 4]), Structure.QUERY_HEADS: heads})
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(1, 2, 6, 7), kv_groups=(0, 2))


def test_groups_that_stay_keep_all_their_heads_where_heads_are_not_cut() -> None:
    kept = select_layer(GQA, Widths(4, 3, 1, {}), {Structure.KV_GROUPS: fused([5, 1, 6])})
    assert kept == KeptUnits(ffn=(0, 1, 2, 3), query_heads=(6, 7, 8), kv_groups=(2,))


def test_only_what_is_cut_needs_scores() -> None:
    assert select_layer(GQA, Widths(4, 3, 3, {}), {}) == GQA.all_kept
    kept = select_layer(GQA, Widths(1, 3, 3, {}), {Structure.FFN: fused([1, 2, 9, 3])})
    assert kept == KeptUnits((2,), tuple(range(9)), (0, 1, 2))


@given(
    data=st.data(),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 4),
    ffn=st.integers(1, 9),
)
@settings(deadline=None)
def test_selection_always_has_the_widths_and_a_legal_shape(
    data: st.DataObject, groups: int, per_group: int, ffn: int
) -> None:
    shape = LayerShape(8, ffn, groups * per_group, groups, 2)
    widths = Widths(
        data.draw(st.integers(1, ffn)), data.draw(st.integers(1, per_group)), data.draw(st.integers(1, groups)), {}
    )
    scores = {
        structure: fused(data.draw(st.lists(st.integers(0, 5), min_size=units, max_size=units)))
        for structure in Structure
        for units in [shape.units(structure)]
    }
    kept = select_layer(shape, widths, scores)
    assert (len(kept.ffn), len(kept.kv_groups)) == (widths.ffn, widths.kv_groups)
    for indices in (kept.ffn, kept.query_heads, kept.kv_groups):
        assert list(indices) == sorted(set(indices))
    heads_of = {group: [h for h in kept.query_heads if h // per_group == group] for group in kept.kv_groups}
    assert all(len(heads) == widths.heads_per_group for heads in heads_of.values())
    assert sum(map(len, heads_of.values())) == len(kept.query_heads)
    for structure, candidates, chosen in [
        (Structure.FFN, range(ffn), kept.ffn),
        (Structure.KV_GROUPS, range(groups), kept.kv_groups),
        *((Structure.QUERY_HEADS, range(g * per_group, (g + 1) * per_group), heads) for g, heads in heads_of.items()),
    ]:
        score = scores[structure].score.tolist()
        dropped = [score[unit] for unit in candidates if unit not in chosen]
        assert not dropped or max(dropped) <= min(score[unit] for unit in chosen)


# --- explanation ----------------------------------------------------------------------------------------------------


def test_explain_counts_who_protected_the_kept_units() -> None:
    kept = KeptUnits(ffn=(0, 2, 3, 5), query_heads=(0,), kv_groups=(0,))
    scores = fused(
        [9, 1, 8, 7, 2, 6], sources=[0, 0, 1, 2, 1, 0], kinds=[SHARED, SHARED, EXPERT, GENERAL, EXPERT, SHARED]
    )
    assert explain(kept, {Structure.FFN: scores}, ["language", "domain"]) == {
        "ffn": {
            "threshold": 2.0,
            "protected": {"language": 2, "domain": 1, "general": 1},
            "shared": {"units": 3, "kept": 2},
            "expert_exclusive": {"units": 2, "kept": 1},
            "general_exclusive": {"units": 1, "kept": 1},
        }
    }


def test_explain_without_general_corpora_speaks_of_dimensions_only() -> None:
    kept = KeptUnits(ffn=(1,), query_heads=(0,), kv_groups=(1,))
    scores = {Structure.KV_GROUPS: fused([1, 4], [1, 0])}
    assert explain(kept, scores, ["language", "task"]) == {
        "kv_groups": {"threshold": 1.0, "protected": {"language": 1, "task": 0}}
    }


def test_explain_has_no_threshold_where_nothing_went() -> None:
    kept = KeptUnits(ffn=(0, 1), query_heads=(0,), kv_groups=(0,))
    assert explain(kept, {Structure.FFN: fused([3, 4])}, ["task"])["ffn"]["threshold"] is None


# --- whole plans ----------------------------------------------------------------------------------------------------


def widths_of(plan: Plan) -> set[tuple[int, int, int]]:
    return {(len(k.ffn), len(k.query_heads), len(k.kv_groups)) for k in plan.kept}


@pytest.mark.parametrize(
    ("budget", "widths", "scored"),
    [
        ({"budget.ffn": 0.25}, (24, 6, 3), {"ffn"}),
        ({"budget.ffn": 12}, (20, 6, 3), {"ffn"}),
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
    assert len(plan.layers) == 3
    assert widths_of(plan) == {widths}
    assert [plan.budget[s]["kept"] for s in ("ffn", "query_heads", "kv_groups")] == list(widths)
    for layer in plan.layers:
        assert set(layer.why) == scored
        for structure, why in layer.why.items():
            kept = len(layer.kept.of(Structure(structure)))
            assert sum(why["protected"].values()) == kept
            assert list(why["protected"]) == ["language", "domain", "task", *general]
            kinds = [why[kind] for kind in ("shared", "expert_exclusive", "general_exclusive") if kind in why]
            assert len(kinds) == (3 if general else 0)
            if general:
                assert sum(kind["kept"] for kind in kinds) == kept
                assert sum(kind["units"] for kind in kinds) == {"ffn": 32, "query_heads": 6, "kv_groups": 3}[structure]


def test_a_budget_of_zero_keeps_everything(tiny_spec: Spec) -> None:
    plan = expertprune.compose(tiny_spec, overrides={"budget.ffn": 0})
    assert plan.cuts_nothing
    assert plan.parameters["after"] == plan.parameters["before"]
    assert plan.layers == [LayerPlan(shape.all_kept, {}) for shape in plan.shapes]


def test_a_plan_is_what_the_profiles_say(tiny_spec: Spec) -> None:
    """The intersection by hand: largest share over three corpora; what is smallest in each layer goes."""
    spec = parse_spec(tiny_spec.document(), "spec", Path.cwd(), {"general": []})
    profiles = expertprune.profile(spec)
    plan = expertprune.compose(spec)
    largest = []
    for profile in profiles.values():
        rms = [numbers(profile, f"ffn.{layer}.rms") * numbers(profile, f"ffn.{layer}.scale") for layer in range(3)]
        impact = np.array([(rms[layer] * numbers(profile, f"ffn.{layer}.output_l2")) ** 2 for layer in range(3)]).mean(
            1
        )
        largest.append(impact / impact.sum())
    assert len(largest) == 3
    score = np.max(largest, axis=0)
    for layer in range(3):
        dropped = np.argsort(score[layer])[:8]
        assert set(plan.kept[layer].ffn) == set(range(32)) - set(dropped.tolist())
        why = plan.layers[layer].why["ffn"]
        assert why["threshold"] == pytest.approx(score[layer, dropped].max(), rel=1e-5)
        owners = np.argmax([corpus[layer, list(plan.kept[layer].ffn)] for corpus in largest], axis=0)
        assert list(why["protected"].values()) == np.bincount(owners, minlength=3).tolist()


def test_the_plan_says_how_many_parameters_stay(tiny_spec: Spec) -> None:
    """Three layers, hidden 24: a neuron has three rows; a group of two heads of 4 has 16 rows of q and o, 8 of k and v."""
    plan = expertprune.compose(tiny_spec, overrides={"budget.kv_groups": 1})
    attention = 24 * (2 * 24 + 2 * 12)
    assert plan.parameters["before"] == 2 * 64 * 24 + 24 + 3 * (3 * 24 * 32 + attention + 2 * 24)
    assert plan.parameters["before"] - plan.parameters["after"] == 3 * (8 * 3 * 24 + (2 * 2 * 4 + 2 * 4) * 24)


def test_plans_are_deterministic(tiny_spec: Spec, tmp_path: Path) -> None:
    overrides = {"budget.kv_groups": 1}
    one = expertprune.compose(tiny_spec, store=tmp_path / "one", overrides=overrides)
    again = expertprune.compose(tiny_spec, store=tmp_path / "one", overrides=overrides)
    other = expertprune.compose(tiny_spec, store=tmp_path / "other", overrides=overrides)
    assert one == again == other
    assert one.digest == other.digest


def test_a_plan_is_the_same_after_saving_and_loading(tiny_spec: Spec, tmp_path: Path) -> None:
    plan = expertprune.compose(tiny_spec, overrides={"budget.kv_groups": 1, "budget.query_heads": 3})
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("settings_", [{}, {"general": []}, {"compose.scale": "percentile"}, {"compose.rule": "mean"}])
def test_a_larger_budget_never_keeps_what_a_smaller_one_dropped(tiny_spec: Spec, settings_: dict[str, Any]) -> None:
    plans = [expertprune.compose(tiny_spec, overrides={**settings_, "budget.ffn": n}) for n in (4, 8, 16, 28)]
    for larger, smaller in itertools.pairwise(plans):
        for more, fewer in zip(larger.kept, smaller.kept, strict=True):
            assert set(fewer.ffn) < set(more.ffn)


def test_more_heads_or_groups_never_bring_back_what_fewer_dropped(tiny_spec: Spec) -> None:
    def kept(**budget: int) -> list[KeptUnits]:
        overrides = {"budget.ffn": 0, **{f"budget.{key}": count for key, count in budget.items()}}
        return expertprune.compose(tiny_spec, overrides=overrides).kept

    one, two, both = kept(kv_groups=1), kept(kv_groups=2), kept(kv_groups=2, query_heads=3)
    for a, b, c in zip(one, two, both, strict=True):
        assert set(b.kv_groups) < set(a.kv_groups)
        assert set(b.query_heads) < set(a.query_heads)
        assert c.kv_groups == b.kv_groups
        assert set(c.query_heads) < set(b.query_heads)


def test_the_control_is_blind_and_seeded(tiny_spec: Spec) -> None:
    def kept(seed: int) -> list[KeptUnits]:
        overrides = {"relevance.criterion": "random", "relevance.seed": seed}
        return expertprune.compose(tiny_spec, overrides=overrides).kept

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert len({layer.ffn for layer in kept(0)}) == 3


def test_profiles_are_named_by_corpus(tiny_spec: Spec) -> None:
    profiles = expertprune.profile(tiny_spec)
    plan = expertprune.compose(tiny_spec)
    assert list(plan.profiles) == ["language/en", "domain/medical", "task/qa", "general/general"]
    assert plan.profiles == {str(name): profile.digest for name, profile in profiles.items()}


def test_compose_refuses_what_it_cannot_do(tiny_spec: Spec, store: Path) -> None:
    base = resolve_base(tiny_spec.base, store)
    profiles = expertprune.profile(tiny_spec)
    without = {name: profile for name, profile in profiles.items() if name.dimension != "domain"}
    with pytest.raises(SpecError, match="no profile for domain/medical: run the profile stage first"):
        compose(tiny_spec, base, without)
    unknown = tiny_spec.model_copy(deep=True)
    unknown.relevance.criterion = "impakt"
    with pytest.raises(SpecError, match="did you mean 'impact'"):
        compose(unknown, base, profiles)
    too_much = tiny_spec.model_copy(update={"budget": Budget(kv_groups=3)})
    with pytest.raises(PlanError, match="at most 2 of 3 KV groups"):
        compose(too_much, base, profiles)


def test_a_profile_that_the_spec_does_not_name_has_no_say(tiny_spec: Spec, tmp_path: Path, store: Path) -> None:
    base, profiles = resolve_base(tiny_spec.base, store), expertprune.profile(tiny_spec)
    stray = made_profile(tmp_path, "stray", 9)
    assert compose(tiny_spec, base, {**profiles, CorpusName("language", "de"): stray}) == compose(
        tiny_spec, base, profiles
    )
