"""Scores against set definitions and arithmetic written out: rules, scales, made-up profiles, fusion."""

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

from expertprune.artifacts.profile import Profile, save_profile
from expertprune.composition.scoring import (
    CorpusScores,
    UnitKind,
    corpus_scores,
    fuse,
    percentile,
    rules,
    score_units,
    standard,
)
from expertprune.corpora.documents import CorpusName
from expertprune.spec.schema import Budget, Dimensions, Fusion, Relevance, Spec
from expertprune.units import DENSE, LayerShape, Structure
from tests.profiles import made_up_about

SHARED, EXPERT, GENERAL = UnitKind


# --- rules ----------------------------------------------------------------------------------------------------------


@given(scores=arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.just(12)), elements=st.integers(0, 6)))
@settings(deadline=None)
def test_rules_combine_the_sets_of_irrelevant_units(scores: np.ndarray) -> None:
    """Few values, so that ties are common."""
    for name, combine in (("intersection", set.intersection), ("union", set.union)):
        combined = rules[name](torch.from_numpy(scores)).tolist()
        for threshold in range(-1, 8):
            irrelevant = [{unit for unit in range(12) if row[unit] <= threshold} for row in scores]
            assert {unit for unit in range(12) if combined[unit] <= threshold} == combine(*irrelevant)


# --- scales and aggregation -----------------------------------------------------------------------------------------


def test_percentile_written_out() -> None:
    assert percentile(torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0])).tolist() == [0.75, 0.0, 0.375, 0.375, 1.0]
    assert percentile(torch.tensor([7.0])).tolist() == [0.0]
    assert percentile(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]


def test_standard_written_out() -> None:
    """Mean 4, deviations -3, -1, 0, 4 and their square root of the mean square."""
    deviation = ((9 + 1 + 0 + 16) / 4) ** 0.5
    expected = [-3 / deviation, -1 / deviation, 0.0, 4 / deviation]
    assert standard(torch.tensor([1.0, 3.0, 4.0, 8.0], dtype=torch.float64)).tolist() == pytest.approx(expected)
    assert standard(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]
    assert standard(torch.tensor([7.0], dtype=torch.float64)).tolist() == [0.0]


# --- scores of made-up profiles -------------------------------------------------------------------------------------

SHAPE = LayerShape(hidden=8, ffn=6, query_heads=4, kv_heads=2, head_dim=2)
LAYERS, DOCUMENTS = 2, 3


def made_profile(folder: Path, corpus: str, seed: int, silent: bool = False) -> Profile:
    """A profile of random statistics over two layers and three documents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.05) * (0 if silent else 1)

    statistics: dict[str, Tensor] = {name: torch.full((DOCUMENTS,), 3.0) for name in ("tokens", "weights")}
    for layer in range(LAYERS):
        for block, channels in (("ffn", SHAPE.ffn), ("heads", SHAPE.query_heads * SHAPE.head_dim)):
            statistics |= {
                f"{block}.{layer}.rms": (1000 * draw(DOCUMENTS, channels)).half(),
                f"{block}.{layer}.rms.scale": torch.tensor(2.0**-9),
                f"{block}.{layer}.sum": draw(channels).double(),
                f"{block}.{layer}.square_sum": 9 * draw(channels).double() + 9,
                f"{block}.{layer}.output_l1": draw(channels),
                f"{block}.{layer}.output_l2": draw(channels),
            }
        for block, units in (("ffn", SHAPE.ffn), ("heads", SHAPE.query_heads), ("groups", SHAPE.kv_heads)):
            statistics[f"{block}.{layer}.weight_norm"] = draw(units)
            if block != "ffn":
                statistics[f"{block}.{layer}.impact"] = draw(DOCUMENTS, units)
    about = made_up_about(corpus, corpus, ["x"] * 3, tokens=9, layers=[SHAPE] * LAYERS)
    return save_profile(folder / f"{corpus}-{seed}.safetensors", about, statistics)


def a_spec(dimensions: Mapping[str, list[str]], general: list[str], **compose_settings: Any) -> Spec:
    return Spec(
        name="made-up",
        base="nowhere",
        dimensions=Dimensions(**dimensions),
        general=general,
        budget=Budget(ffn=2, kv_groups=1, query_heads=2),
        relevance=Relevance(criterion="impact"),
        compose={"allocation": "uniform", **compose_settings},
    )


def one_structure(profile: Profile, structure: Structure, spec: Spec) -> CorpusScores:
    return corpus_scores(profile, [structure], spec)[structure]


def raw_impact(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Of each document and unit, from the profile's own numbers, `[documents, units]`."""
    if structure is Structure.FFN:
        rms = profile.read(f"ffn.{layer}.rms").double().numpy() * 2.0**-9
        return (rms * profile.read(f"ffn.{layer}.output_l2").double().numpy()) ** 2
    return (
        profile.read(f"{'heads' if structure is Structure.QUERY_HEADS else 'groups'}.{layer}.impact").double().numpy()
    )


def raw_activation(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Root of the mean over documents of each unit's summed squares, over the layer's mean, `[units]`."""
    block, units = ("ffn", 6) if structure is Structure.FFN else ("heads", SHAPE.units(structure))
    rms = profile.read(f"{block}.{layer}.rms").double().numpy() * 2.0**-9
    norm = np.sqrt((rms.reshape(DOCUMENTS, units, -1) ** 2).sum(2).mean(0))
    return norm / norm.mean()


@pytest.mark.parametrize("structure", DENSE)
@pytest.mark.parametrize("aggregate", ["mean", "max", 0.25, 0.9])
def test_share_is_the_part_of_the_whole_models_total(
    tmp_path: Path, structure: Structure, aggregate: str | float
) -> None:
    profile = made_profile(tmp_path, "en", 1)
    scores = one_structure(profile, structure, a_spec({"language": ["en"]}, [], aggregate=aggregate))
    named = {"mean": np.mean, "max": np.max}
    how, options = (named[aggregate], {}) if isinstance(aggregate, str) else (np.quantile, {"q": aggregate})
    raw = [how(raw_impact(profile, structure, layer), axis=0, **options) for layer in range(LAYERS)]
    assert sum(float(layer.sum()) for layer in scores.scaled) == pytest.approx(1)
    for layer in range(LAYERS):
        np.testing.assert_allclose(scores.scaled[layer], raw[layer] / np.concatenate(raw).sum(), rtol=1e-5)
        np.testing.assert_allclose(scores.activation[layer], raw_activation(profile, structure, layer), rtol=1e-5)


@pytest.mark.parametrize("scale", ["share", "percentile"])
def test_a_silent_corpus_is_scored_without_division_by_zero(tmp_path: Path, scale: str) -> None:
    profile = made_profile(tmp_path, "en", 1, silent=True)
    scores = one_structure(profile, Structure.FFN, a_spec({"language": ["en"]}, [], scale=scale))
    expected = 0.0 if scale == "share" else 0.5
    assert all(layer.tolist() == [expected] * 6 for layer in scores.scaled)
    assert all(layer.tolist() == [0.0] * 6 for layer in scores.activation)


def test_scales_of_the_layer(tmp_path: Path) -> None:
    profile = made_profile(tmp_path, "en", 1)
    percentiles, deviations = (
        one_structure(profile, Structure.FFN, a_spec({"language": ["en"]}, [], scale=scale)).scaled
        for scale in ("percentile", "standard")
    )
    for layer in range(LAYERS):
        raw = raw_impact(profile, Structure.FFN, layer).mean(0)
        np.testing.assert_allclose(percentiles[layer], raw.argsort().argsort() / 5)
        np.testing.assert_allclose(deviations[layer], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-6)


def test_structures_that_compete_share_one_total(tmp_path: Path) -> None:
    """Neurons and groups for one budget: each is its part of the sum over both structures and all layers."""
    profile, spec = made_profile(tmp_path, "en", 1), a_spec({"language": ["en"]}, [])
    profiles = {CorpusName("language", "en"): profile}
    both = [Structure.FFN, Structure.KV_GROUPS]
    raw = {s: np.array([raw_impact(profile, s, layer).mean(0) for layer in range(LAYERS)]) for s in both}
    total = sum(values.sum() for values in raw.values())
    for structure, layers in score_units(spec, profiles, both, together=True).items():
        for layer in range(LAYERS):
            np.testing.assert_allclose(layers[layer].score, raw[structure][layer] / total, rtol=1e-5)
    for structure, layers in score_units(spec, profiles, both).items():
        for layer in range(LAYERS):
            np.testing.assert_allclose(layers[layer].score, raw[structure][layer] / raw[structure].sum(), rtol=1e-5)


@pytest.fixture
def profiles(tmp_path: Path) -> dict[CorpusName, Profile]:
    names = ("language/en", "language/de", "domain/medical", "task/qa", "general/g", "general/h")
    named = [CorpusName(*name.split("/")) for name in names]
    return {name: made_profile(tmp_path, name.value, seed) for seed, name in enumerate(named)}


def shares(profile: Profile, structure: Structure) -> np.ndarray:
    """`[layers, units]`"""
    raw = np.array([raw_impact(profile, structure, layer).mean(0) for layer in range(LAYERS)])
    return raw / raw.sum()


@pytest.mark.parametrize("structure", DENSE)
@pytest.mark.parametrize("rule", ["intersection", "union", "mean"])
def test_several_values_of_a_dimension_count_by_their_largest(
    profiles: dict[CorpusName, Profile], structure: Structure, rule: str
) -> None:
    spec = a_spec({"language": ["en", "de"], "domain": ["medical"], "task": ["qa"]}, [], rule=rule)
    en, de, medical, qa = (shares(profile, structure) for profile in list(profiles.values())[:4])
    per_dimension = np.stack([np.maximum(en, de), medical, qa])
    combine = {"intersection": np.max, "union": np.min, "mean": np.mean}[rule]
    expected = combine(per_dimension, axis=0)
    fused = score_units(spec, profiles, [structure])[structure]
    for layer in range(LAYERS):
        np.testing.assert_allclose(fused[layer].score, expected[layer], rtol=1e-5)
        assert fused[layer].kind is None
        nearest = np.abs(per_dimension[:, layer] - expected[layer]).argmin(0)
        assert fused[layer].source.tolist() == nearest.tolist()
    assert not np.allclose(np.maximum(en, de), en)


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.1, 0.15, 0.2])
def test_scores_are_fused_with_the_activations_of_the_dimensions(
    profiles: dict[CorpusName, Profile], tau: float
) -> None:
    """Every unit by hand, from the profiles' numbers: largest activation over values and dimensions, then the fusion."""
    weight, beta = 0.25, 0.75
    spec = a_spec(
        {"language": ["en", "de"], "domain": ["medical"]},
        ["g", "h"],
        fusion={"method": "shared_exclusive", "tau": tau, "lambda": weight, "beta": beta},
    )
    en, de, medical, _, *general_of = profiles.values()
    expert_of = [en, de, medical]
    fused = score_units(spec, profiles, [Structure.FFN])[Structure.FFN]
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
        pytest.param(0.6, 0.2, 1.1, 1.0, {}, 0.4, SHARED, id="shared: the difference has no direction"),
        pytest.param(0.2, 0.6, 3.0, 1.0, {}, 0.2, EXPERT, id="expert: general has no say"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {}, 0.3, GENERAL, id="general: half of its score"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {"beta": 1}, 0.6, GENERAL, id="general: all of its score"),
        pytest.param(0.2, 0.6, 1.0, 3.0, {"beta": 0}, 0.2, GENERAL, id="general: never below the expert's"),
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
    fused, found = fuse(*tensors, Fusion(**{"lambda": 0.5, "beta": 0.5, **constants}))
    assert fused.tolist() == pytest.approx([score])
    assert found.tolist() == [kind]
    weighted, found = fuse(*tensors, Fusion(**{"method": "weighted", "lambda": 0.25, **constants}))
    share = constants.get("lambda", 0.25)
    assert weighted.tolist() == pytest.approx([share * s_g + (1 - share) * s_t]), "whatever their kind"
    assert found.tolist() == [kind]
