"""Scores against set definitions and arithmetic written out: rules, scales, made-up profiles, fusion."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, save_profile
from expertprune.composition.scoring import (
    CorpusScores,
    UnitKind,
    corpus_scores,
    fuse,
    givers,
    percentile,
    score_units,
    standard,
)
from expertprune.corpora.documents import CorpusName
from expertprune.spec.schema import Budget, Dimensions, Fusion, Relevance, Spec
from expertprune.units import DENSE, LayerShape, Structure
from tests.profiles import made_up_about

SHARED, EXPERT, GENERAL = UnitKind
FFN = Structure.FFN
SHAPE = LayerShape(hidden=8, ffn=6, query_heads=4, kv_heads=2, head_dim=2)
LAYERS, DOCUMENTS = 2, 3


def test_percentile_and_standard_written_out() -> None:
    """The latter of mean 4, deviations -3, -1, 0, 4 and their square root of the mean square."""
    deviation = ((9 + 1 + 0 + 16) / 4) ** 0.5
    for scale, scores, expected in (
        (percentile, [5.0, 1.0, 3.0, 3.0, 9.0], [0.75, 0.0, 0.375, 0.375, 1.0]),
        (percentile, [7.0], [0.0]),
        (percentile, [2.0, 2.0, 2.0], [0.5, 0.5, 0.5]),
        (standard, [1.0, 3.0, 4.0, 8.0], [-3 / deviation, -1 / deviation, 0.0, 4 / deviation]),
        (standard, [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]),
        (standard, [7.0], [0.0]),
        (standard, [0.1, 0.1, 0.1], [0.0, 0.0, 0.0]),  # whose mean is not quite 0.1
        (standard, [], []),
    ):
        assert scale(torch.tensor(scores, dtype=torch.float64)).tolist() == pytest.approx(expected)


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
            statistics[f"{block}.{layer}.impact"] = draw(DOCUMENTS, units)  # of neurons, none is stored
    about = made_up_about(corpus, corpus, ["x"] * 3, tokens=9, layers=[SHAPE] * LAYERS)
    return save_profile(folder / f"{corpus}-{seed}.safetensors", about, statistics)


def a_spec(dimensions: dict[str, list[str]], general: list[str], **compose_settings: Any) -> Spec:
    parts = {"dimensions": Dimensions(**dimensions), "budget": Budget(ffn=2), "compose": compose_settings}
    return Spec(name="made-up", base="nowhere", general=general, relevance=Relevance(criterion="impact"), **parts)


def scores_of(profile: Profile, structure: Structure = FFN, **compose_settings: Any) -> CorpusScores:
    return corpus_scores(profile, [structure], a_spec({"language": ["en"]}, [], **compose_settings))[structure]


def raw_impact(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Of each document and unit, from the profile's own numbers, `[documents, units]`."""
    if structure is FFN:
        rms = profile.read(f"ffn.{layer}.rms").double().numpy() * 2.0**-9
        return (rms * profile.read(f"ffn.{layer}.output_l2").double().numpy()) ** 2
    block = "heads" if structure is Structure.QUERY_HEADS else "groups"
    return profile.read(f"{block}.{layer}.impact").double().numpy()


def raw_activation(profile: Profile, structure: Structure, layer: int) -> np.ndarray:
    """Root of the mean over documents of each unit's summed squares, over the layer's mean, `[units]`."""
    block, units = ("ffn", 6) if structure is FFN else ("heads", SHAPE.units(structure))
    rms = profile.read(f"{block}.{layer}.rms").double().numpy() * 2.0**-9
    norm = np.sqrt((rms.reshape(DOCUMENTS, units, -1) ** 2).sum(2).mean(0))
    return norm / norm.mean()


def raw_means(profile: Profile, structure: Structure = FFN) -> np.ndarray:
    """`[layers, units]`"""
    return np.array([raw_impact(profile, structure, layer).mean(0) for layer in range(LAYERS)])


def shares(profile: Profile, structure: Structure = FFN) -> np.ndarray:
    """`[layers, units]`"""
    return raw_means(profile, structure) / raw_means(profile, structure).sum()


@pytest.mark.parametrize("structure", DENSE)
def test_share_is_the_part_of_the_whole_models_total(tmp_path: Path, structure: Structure) -> None:
    profile = made_profile(tmp_path, "en", 1)
    for aggregate, how in (("mean", {}), ("max", {"q": 1}), (0.25, {"q": 0.25}), (0.9, {"q": 0.9})):
        combine: Any = np.quantile if how else np.mean
        scores = scores_of(profile, structure, aggregate=aggregate)
        raw = [combine(raw_impact(profile, structure, layer), axis=0, **how) for layer in range(LAYERS)]
        for layer in range(LAYERS):
            np.testing.assert_allclose(scores.scaled[layer], raw[layer] / np.concatenate(raw).sum(), rtol=1e-5)
            np.testing.assert_allclose(scores.activation[layer], raw_activation(profile, structure, layer), rtol=1e-5)


def test_scales_of_the_layer(tmp_path: Path) -> None:
    profile = made_profile(tmp_path, "en", 1)
    percentiles, deviations = (scores_of(profile, scale=scale).scaled for scale in ("percentile", "standard"))
    for layer, raw in enumerate(raw_means(profile)):
        np.testing.assert_allclose(percentiles[layer], raw.argsort().argsort() / 5)
        np.testing.assert_allclose(deviations[layer], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-6)
    silent = made_profile(tmp_path, "en", 2, silent=True)  # without a division by zero
    for scale, expected in (("share", 0.0), ("percentile", 0.5)):
        scores = scores_of(silent, scale=scale)
        assert all(layer.tolist() == [expected] * 6 for layer in scores.scaled)
        assert all(layer.tolist() == [0.0] * 6 for layer in scores.activation)


def test_structures_that_compete_share_one_total(tmp_path: Path) -> None:
    """Neurons and groups for one budget: each is its part of the sum over both structures and all layers."""
    profile, spec = made_profile(tmp_path, "en", 1), a_spec({"language": ["en"]}, [])
    raw = {structure: raw_means(profile, structure) for structure in (FFN, Structure.KV_GROUPS)}
    for together in (True, False):
        found = score_units(spec, {CorpusName("language", "en"): profile}, list(raw), together)
        for structure, layers in found.items():
            total = sum(each.sum() for each in raw.values()) if together else raw[structure].sum()
            for layer in range(LAYERS):
                np.testing.assert_allclose(layers[layer].score, raw[structure][layer] / total, rtol=1e-5)


@pytest.fixture
def profiles(tmp_path: Path) -> dict[CorpusName, Profile]:
    names = ("language/en", "language/de", "domain/medical", "task/qa", "general/g", "general/h")
    named = [CorpusName(*name.split("/")) for name in names]
    return {name: made_profile(tmp_path, name.value, seed) for seed, name in enumerate(named)}


@pytest.mark.parametrize(
    ("rule", "combine", "giver"),
    [("intersection", np.max, np.argmax), ("union", np.min, np.argmin), ("mean", np.mean, np.argmax)],
)
def test_several_values_of_a_dimension_count_by_their_largest(
    profiles: dict[CorpusName, Profile], rule: str, combine: Any, giver: Any
) -> None:
    spec = a_spec({"language": ["en", "de"], "domain": ["medical"], "task": ["qa"]}, [], rule=rule)
    for structure in DENSE:
        en, de, medical, qa = (shares(profile, structure) for profile in list(profiles.values())[:4])
        per_dimension = np.stack([np.maximum(en, de), medical, qa])
        expected = combine(per_dimension, axis=0)
        fused = score_units(spec, profiles, [structure])[structure]
        for layer in range(LAYERS):
            np.testing.assert_allclose(fused[layer].score, expected[layer], rtol=1e-5)
            assert fused[layer].kind is None
            assert fused[layer].source.tolist() == giver(per_dimension[:, layer], axis=0).tolist()


def test_of_two_dimensions_the_larger_score_gives_the_mean() -> None:
    """Both are equally far from it, so their distances say nothing."""
    scores = torch.tensor([[0.5, 0.0, 0.1, 0.2], [0.1, 0.3, 0.7, 0.2]], dtype=torch.float64)
    assert givers(scores, scores.mean(0)).tolist() == [0, 1, 1, 0]
    assert givers(scores, scores.amax(0)).tolist() == [0, 1, 1, 0]
    assert givers(scores, scores.amin(0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("rule", "combine"), [("intersection", max), ("mean", np.mean)])
@pytest.mark.parametrize("tau", [0.02, 0.1, 0.2])
def test_scores_are_fused_with_the_activations_of_the_dimensions(
    profiles: dict[CorpusName, Profile], tau: float, rule: str, combine: Any
) -> None:
    """Every unit by hand, from the profiles' numbers: activations over values and dimensions as scores, then the fusion."""
    weight, beta = 0.25, 0.75
    fusion = {"method": "shared_exclusive", "tau": tau, "lambda": weight, "beta": beta}
    spec = a_spec({"language": ["en", "de"], "domain": ["medical"]}, ["g", "h"], fusion=fusion, rule=rule)
    en, de, medical, _, *general_of = profiles.values()
    expert_of = [[en, de], [medical]]
    fused = score_units(spec, profiles, [FFN])[FFN]
    kinds = set()
    for layer, unit in itertools.product(range(LAYERS), range(SHAPE.ffn)):
        s_g = max(shares(profile)[layer, unit] for profile in general_of)
        n_g = max(raw_activation(profile, FFN, layer)[unit] for profile in general_of)
        s_t = combine([max(shares(profile)[layer, unit] for profile in values) for values in expert_of])
        n_t = combine([max(raw_activation(profile, FFN, layer)[unit] for profile in values) for values in expert_of])
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


@pytest.mark.parametrize(
    ("n_t", "n_g", "constants", "score", "kind"),
    [
        (1.0, 3.0, {"beta": 0}, 0.2, GENERAL),  # never below the expert's
        (1.0, 1.001, {"tau": 0}, 0.3, GENERAL),
        (1.001, 1.0, {"tau": 0}, 0.2, EXPERT),
        (5.0, 0.0, {"tau": 1, "lambda": 0.25}, 0.3, SHARED),  # everything; lambda is general's weight
        (3.0, 1.0, {"tau": 0.5}, 0.4, SHARED),  # at tau
        (0.0, 0.0, {"tau": 0}, 0.4, SHARED),  # silent in both
    ],
)
def test_fuse(n_t: float, n_g: float, constants: dict[str, float], score: float, kind: int) -> None:
    """Of scores 0.2 of the expert and 0.6 of general."""
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (0.2, 0.6, n_t, n_g)]
    fused, found = fuse(*tensors, Fusion(**{"lambda": 0.5, "beta": 0.5, **constants}))
    assert fused.tolist() == pytest.approx([score])
    assert found.tolist() == [kind]
    weighted, found = fuse(*tensors, Fusion(**{"method": "weighted", "lambda": 0.25, **constants}))
    assert weighted.tolist() == pytest.approx([0.25 * 0.6 + 0.75 * 0.2]), "whatever their kind"
    assert found.tolist() == [kind]
