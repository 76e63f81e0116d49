"""Criteria against arithmetic written out, and against real ablations of a tiny model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, save_profile
from expertprune.composition.scoring import check_criterion, unit_statistics
from expertprune.errors import SpecError
from expertprune.profiling.forward import forward_pass
from expertprune.relevance import UnitStatistics, criteria
from expertprune.units import DENSE, LayerShape, Structure
from tests.masks import tiny_of
from tests.tiny import tiny_model

OF_EXPERTS_ALONE = ["frequency", "reap"]  # see tests/pruning/test_experts.py
NAMES = ["activation", "fisher", "fluctuation", "impact", "magnitude", "random", "regional", "taylor"]
SHAPE = LayerShape(hidden=24, ffn=32, query_heads=6, kv_heads=3, head_dim=4)
DOCUMENTS = [[3, 4, 5, 6, 20], [7, 30, 8, 9, 14, 10, 41, 2], [11, 12]]


def two_units_of_two_channels(impact: Tensor | None = None) -> UnitStatistics:
    """Two documents; numbers small enough to work with by hand."""
    return UnitStatistics(
        rms=torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.5, 0.0]]),
        impact=impact,
        output_l1=torch.tensor([1.0, 10.0, 100.0, 1000.0]),
        output_l2=torch.tensor([2.0, 3.0, 5.0, 7.0]),
        weight_norm=torch.tensor([6.0, 8.0]),
        layer=0,
        seed=11,
    )


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_shipped_criteria() -> None:
    assert sorted(criteria) == sorted([*NAMES, *OF_EXPERTS_ALONE])
    assert {name for name in criteria if Structure.FFN not in criteria[name].structures} == set(OF_EXPERTS_ALONE)
    assert all(criteria[name].name == name and criteria[name].paper.startswith("https://") for name in NAMES)


MEASURED = torch.tensor([[0.25, 4.0], [0.0, 9.0]])
SCORES: list[tuple[str, Tensor | None, list[list[float]]]] = [
    ("activation", None, [[1 * 1 + 2 * 10, 3 * 100 + 4 * 1000], [0 * 1 + 1 * 10, 0.5 * 100 + 0 * 1000]]),
    ("impact", None, [[(1 * 2) ** 2 + (2 * 3) ** 2, (3 * 5) ** 2 + (4 * 7) ** 2], [(1 * 3) ** 2, 2.5**2]]),
    ("impact", MEASURED, MEASURED.tolist()),
    ("magnitude", None, [[6.0, 8.0], [6.0, 8.0]]),
]


@pytest.mark.parametrize(("name", "impact", "expected"), SCORES)
def test_scores_written_out(name: str, impact: Tensor | None, expected: list[list[float]]) -> None:
    assert criteria[name].score(two_units_of_two_channels(impact)).tolist() == expected


def test_random_is_the_same_for_every_document_and_spread_over_the_unit_interval() -> None:
    statistics = dataclasses.replace(two_units_of_two_channels(), rms=torch.rand(4, 2000), weight_norm=torch.rand(2000))
    scores = criteria["random"].score(statistics)
    louder = dataclasses.replace(statistics, rms=torch.zeros(4, 2000), weight_norm=torch.zeros(2000))
    assert torch.equal(criteria["random"].score(louder), scores)
    assert torch.equal(scores, scores[:1].expand_as(scores))
    assert len(scores[0].unique()) > 1990
    counts = torch.histc(scores[0], bins=4, min=0, max=1)
    assert counts.sum() == 2000  # all of them inside
    assert (counts > 400).all()  # 500 are expected in each quarter, with a deviation of 20


# --- from a running model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    statistics = forward_pass(tiny_of(tiny_model("llama", seed=5)).text(DOCUMENTS, 16))
    about = {"digest": "d", "corpus": "c", "documents": ["x"] * 3, "tokens": 15, "layers": [vars(SHAPE)] * 3}
    return save_profile(tmp_path_factory.mktemp("profile") / "p.safetensors", about, statistics)


def test_random_differs_between_layers_structures_and_seeds(profile: Profile) -> None:
    def scores(of: Structure, layer: int, seed: int) -> list[float]:
        score = criteria["random"].score(unit_statistics(profile, of, layer, seed))[0]
        return score[: SHAPE.kv_heads].tolist()

    drawn = [scores(of, layer, seed) for of in DENSE for layer in range(3) for seed in (0, 1, 2)]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)
    assert scores(Structure.FFN, 2, 1) == scores(Structure.FFN, 2, 1)


@pytest.mark.parametrize("structure", DENSE)
@pytest.mark.parametrize("layer", [0, 2])
def test_impact_is_the_change_of_the_output_when_the_unit_is_ablated(
    profile: Profile, structure: Structure, layer: int
) -> None:
    """`mean_t ‖Δy_t‖²` of the whole layer's output, or of the attention's, when a unit's columns are zero."""
    scores = criteria["impact"].score(unit_statistics(profile, structure, layer, seed=0))
    model = tiny_model("llama", seed=5).double().requires_grad_(False)
    module = model.model.layers[layer] if structure == Structure.FFN else model.model.layers[layer].self_attn.o_proj
    weight = (module.mlp.down_proj if structure == Structure.FFN else module).weight
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, __, y: seen.append((y[0] if isinstance(y, tuple) else y)[0]))

    def outputs() -> list[Tensor]:
        seen.clear()
        for ids in DOCUMENTS:
            model(input_ids=torch.tensor([ids]))
        return list(seen)

    before, ablated, whole = outputs(), [], weight.clone()
    for columns in torch.arange(weight.shape[1]).reshape(SHAPE.units(structure), -1):
        weight[:, columns] = 0
        ablated.append([float((b - a).square().sum(-1).mean()) for b, a in zip(before, outputs(), strict=True)])
        weight.copy_(whole)
    # Root mean squares of neurons are stored in half precision: 2 · 2⁻¹¹ of their square.
    torch.testing.assert_close(scores, torch.tensor(ablated).T, rtol=1.1e-3, atol=1e-8)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("imapct", "; did you mean 'impact'?"),
        (
            "zzz",
            "; valid: activation, fisher, fluctuation, frequency, impact, magnitude, random, reap, regional, taylor",
        ),
    ],
)
def test_an_unknown_criterion_is_answered_with_the_nearest(name: str, answer: str) -> None:
    with pytest.raises(SpecError) as error:
        check_criterion(name)
    assert str(error.value) == f"relevance.criterion: unknown criterion {name!r}{answer}"
