"""Criteria from stored profiles: their formulas written out, and what no criterion may depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertprune.artifacts.profile import FORWARD, Profile, ProfilePart, halved, save_profile
from expertprune.composition.scoring import corpus_scores, needed_part, unit_statistics
from expertprune.corpora.batches import Tokens, make_batches
from expertprune.corpora.documents import Document
from expertprune.errors import SpecError
from expertprune.files import digest_of
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.profiling.store import about_profile, measure, profile_key, profile_path
from expertprune.relevance import Pass, UnitStatistics, criteria
from expertprune.spec.schema import Base, Relevance, Spec
from expertprune.units import DENSE, Structure
from tests import masks
from tests.masks import LENGTHS, Tiny, tiny, token_lists
from tests.patching import everywhere
from tests.profiles import made_up_about
from tests.tiny import tiny_tokenizer

NAMES = {Structure.FFN: "ffn", Structure.QUERY_HEADS: "heads", Structure.KV_GROUPS: "groups"}
TEXT, DRAWN = (ProfilePart(Pass.GRADIENT, loss) for loss in ("language_model", "kl"))
REGIONAL = ProfilePart(Pass.REGIONAL)


@pytest.fixture
def _not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay in float32, so that they compare closer than half precision allows."""

    def whole(name: str, values: Tensor) -> dict[str, Tensor]:
        return {name: values, f"{name}.scale": torch.tensor(1.0)}

    everywhere(monkeypatch, "expertprune.artifacts.profile.halved", whole)


def profile_of(of: Tiny, folder: Path, *parts: ProfilePart) -> Profile:
    """The tiny model is saved in a folder, and has a profile there."""
    of.model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base, tokens = resolve_base(Base(model=str(folder / "base")), folder / "store"), token_lists()
    key = profile_key(base, digest_of(tokens), 32)
    text = TextRun(load_model(base.folder, base.dtype), base.family, base.layers, make_batches(tokens, 30))
    path, documents = profile_path(folder / "store", key), [Document(" ".join(map(str, ids))) for ids in tokens]
    for part in (FORWARD, *parts):
        measure(text, [part], path, about_profile(base, "language/en", documents, key, text.tokens))
    return Profile(path)


def raw_scores(profile: Profile, criterion: str, structure: Structure, layer: int) -> Tensor:
    """`[documents, units]`"""
    statistics = unit_statistics(profile, structure, layer, 0, needed_part(Relevance(criterion=criterion)))
    return criteria[criterion].score(statistics)


def projections(layer: Any) -> Iterator[tuple[Structure, str, str, NDArray[np.float64]]]:
    """Structures of a layer with their names, those of what goes into their output projections, and its weight."""
    for structure, name in NAMES.items():
        block, output = ("ffn", masks.ffn_output(layer)) if name == "ffn" else ("heads", layer.self_attn.o_proj)
        yield structure, name, block, output.weight.detach().double().numpy()


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])  # with norms behind the blocks, and fused
@pytest.mark.usefixtures("_not_halved")
def test_criteria_of_gradients(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertprune.profiling.gradients.SEGMENT", 4)
    of, tokens = tiny(family), token_lists()
    slopes, norms = masks.mask_gradients(of, tokens), masks.segment_norms(of, tokens, 4)
    regional, inputs = masks.regional_gradients(of, tokens), [masks.layer_activations(of, ids) for ids in tokens]
    profile = profile_of(of, tmp_path, TEXT, REGIONAL)
    predicted = torch.tensor([length - 1.0 for length in LENGTHS], dtype=torch.float64)
    for index, layer in enumerate(of.model.model.layers):
        for structure, name, block, weight in projections(layer):
            energy = [np.square(weight).sum(0) * np.square(each[f"{block}.{index}"]).mean(0) for each in inputs]
            units = of.shapes[index].units(structure)
            written = np.sqrt(np.array(energy).reshape(len(LENGTHS), units, -1).sum(2))
            place = f"{name}.{index}"
            expected = {
                "taylor": slopes[place].abs(),
                "fisher": norms[place] ** 2 * predicted[:, None],
                "regional": regional[place].abs() + torch.tensor(written),
            }
            for criterion, scores in expected.items():
                masks.assert_near(
                    raw_scores(profile, criterion, structure, index), scores, 1e-5, f"{criterion} {place}"
                )


def check_fluctuation(
    of: Tiny, profile: Profile, inputs: list[dict[str, Any]], weights: Any, relative: float, near: float = 0.0
) -> None:
    """The variance of all documents' tokens, the same for each document; `near` is a part of the largest one."""
    for index, layer in enumerate(of.model.model.layers):
        for structure, name, block, weight in projections(layer):
            values = np.concatenate([each[f"{block}.{index}"] for each in inputs])
            variance = np.average((values - np.average(values, axis=0, weights=weights)) ** 2, axis=0, weights=weights)
            each = variance * np.square(weight).sum(0)
            expected = each.reshape(of.shapes[index].units(structure), -1).sum(1)
            scores = raw_scores(profile, "fluctuation", structure, index)
            assert scores.shape == (len(LENGTHS), len(expected))
            for row in scores.double().numpy():
                np.testing.assert_allclose(row, expected, relative, near * expected.max(), err_msg=f"{name} {index}")


def test_fluctuation_is_the_variance_over_all_tokens_massive_means_included(tmp_path: Path) -> None:
    """One neuron gives a thousand, give or take one: the variance is what is left of squares a million times larger."""
    of = tiny("llama", mlp_bias=True)
    with torch.no_grad():
        mlp = of.model.model.layers[0].mlp
        mlp.gate_proj.weight[5] *= 0.1
        mlp.gate_proj.bias[5], mlp.up_proj.bias[5] = 1000.0, 1.0
        mlp.up_proj.weight[5] *= 0.001
    inputs = [masks.layer_activations(of, ids) for ids in token_lists()]
    massive = np.concatenate([each["ffn.0"] for each in inputs])[:, 5]
    assert abs(massive.mean()) > 300 * massive.std()
    # a float32 near 1000 is known to 3e-5, so its distance of about 1 from the mean as well
    check_fluctuation(of, profile_of(of, tmp_path), inputs, None, 2e-4)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_fluctuation_is_the_variance_of_weighted_tokens(tmp_path: Path, prompt_weight: float) -> None:
    """Every third token is an answer's; the others are a prompt's."""
    of = tiny("llama")
    tokens = [Tokens(tuple(ids), tuple(place % 3 == 1 for place in range(len(ids)))) for ids in token_lists()]
    text = TextRun(of.model, of.family, of.shapes, make_batches(tokens, 30, prompt_weight=prompt_weight))
    about = made_up_about(tokens=text.tokens, layers=of.shapes)
    profile = measure(text, [FORWARD], tmp_path / "p.safetensors", about)
    weights = np.concatenate([np.where(each.answers, 1.0, prompt_weight) for each in tokens])
    check_fluctuation(of, profile, [masks.layer_activations(of, each.ids) for each in tokens], weights, 1e-5, 1e-5)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_each_criterion_reads_its_own_pass_and_a_missing_one_is_named(tmp_path: Path) -> None:
    """The two losses have parts of their own."""

    def scored(profile: Profile, criterion: str, loss: str) -> Tensor:
        data = {"name": "made-up", "base": "nowhere", "dimensions": {"language": "en"}, "budget": {"ffn": 2}}
        spec = Spec.model_validate({**data, "relevance": {"criterion": criterion, "loss": loss}})
        return corpus_scores(profile, [Structure.FFN], spec)[Structure.FFN].scaled[0]

    profile = profile_of(tiny("llama"), tmp_path)
    for criterion in sorted(name for name in criteria if criteria[name].needs):
        for loss in ("language_model", "kl"):
            part = f"gradient-{loss}" if criteria[criterion].needs is Pass.GRADIENT else "regional"
            with pytest.raises(SpecError, match=rf"language/en lacks the {part} pass .* run the profile stage"):
                scored(profile, criterion, loss)

    def drawn(of: Structure, layer: int, seed: int) -> tuple[float, ...]:
        return tuple(criteria["random"].score(unit_statistics(profile, of, layer, seed))[0, :3].tolist())

    different = {drawn(of, layer, seed) for of in DENSE for layer in range(3) for seed in (0, 1, 2)}
    assert len(different) == 3 * 3 * len(DENSE)
    assert drawn(Structure.FFN, 2, 1) == drawn(Structure.FFN, 2, 1)

    profile = profile_of(tiny("llama"), tmp_path, TEXT, DRAWN)
    assert not torch.allclose(scored(profile, "fisher", "language_model"), scored(profile, "fisher", "kl"), rtol=0.1)


# --- half precision -------------------------------------------------------------------------------------------------


def test_half_precision_keeps_any_magnitude_and_what_is_not_finite(tmp_path: Path) -> None:
    for number, largest in enumerate((3.4e38, 1e6, 65504.0, 1.0, 1e-38, 2.0**-140, 0.0)):
        values = torch.tensor([[largest, -largest / 2], [largest / 1000, 0.0]])
        saved = save_profile(tmp_path / f"{number}.safetensors", made_up_about(), halved("x", values))
        back = saved.read_half("x")
        assert back.dtype == torch.float32
        np.testing.assert_allclose(back.double().numpy(), values.double().numpy(), rtol=2.0**-11, atol=2.0**-150)
    for bad in (float("inf"), float("nan")):
        assert not bool(halved("x", torch.tensor([1.0, bad]))["x"].isfinite().all())


# --- arithmetic ---------------------------------------------------------------------------------------------------


# Two documents, and two units of two channels; numbers small enough to work with by hand.
SMALL = UnitStatistics(
    rms=torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.5, 0.0]]),
    impact=None,
    output_l1=torch.tensor([1.0, 10.0, 100.0, 1000.0]),
    output_l2=torch.tensor([2.0, 3.0, 5.0, 7.0]),
    weight_norm=torch.tensor([6.0, 8.0]),
    layer=0,
    seed=11,
)


def test_scores_written_out() -> None:
    expected = {
        "activation": [[1 * 1 + 2 * 10, 3 * 100 + 4 * 1000], [0 * 1 + 1 * 10, 0.5 * 100 + 0 * 1000]],
        "impact": [[(1 * 2) ** 2 + (2 * 3) ** 2, (3 * 5) ** 2 + (4 * 7) ** 2], [(1 * 3) ** 2, 2.5**2]],
        "magnitude": [[6.0, 8.0], [6.0, 8.0]],
    }
    for name, scores in expected.items():
        assert criteria[name].score(SMALL).tolist() == scores, name
    measured = torch.tensor([[0.25, 4.0], [0.0, 9.0]])
    assert torch.equal(criteria["impact"].score(dataclasses.replace(SMALL, impact=measured)), measured)


def test_random_is_the_same_for_every_document_and_spread_over_the_unit_interval() -> None:
    statistics = dataclasses.replace(SMALL, rms=torch.rand(4, 2000), weight_norm=torch.rand(2000))
    scores = criteria["random"].score(statistics)
    louder = dataclasses.replace(statistics, rms=torch.zeros(4, 2000), weight_norm=torch.zeros(2000))
    assert torch.equal(criteria["random"].score(louder), scores)
    assert torch.equal(scores, scores[:1].expand_as(scores))
    assert len(scores[0].unique()) > 1990
    assert 0 <= scores.min() < 0.01 < 0.99 < scores.max() <= 1
