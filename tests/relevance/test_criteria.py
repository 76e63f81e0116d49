"""Criteria against arithmetic written out, and against real ablations of a tiny model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, save_profile
from expertprune.composition.scoring import check_criterion, unit_statistics
from expertprune.errors import SpecError
from expertprune.profiling.forward import forward_pass
from expertprune.relevance import Criterion, UnitStatistics, criteria, criterion
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


def made_up(units: int, channels_per_unit: int, documents: int = 4, impact: bool = True) -> UnitStatistics:
    generator = torch.Generator().manual_seed(units)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) + 0.1

    channels = units * channels_per_unit
    return UnitStatistics(
        rms=draw(documents, channels),
        impact=draw(documents, units) if impact else None,
        output_l1=draw(channels),
        output_l2=draw(channels),
        weight_norm=draw(units),
        layer=1,
        seed=3,
        variance=draw(channels),
        tokens=torch.full((documents,), 7.0),
        gradient=draw(documents, units) - 0.6,
        regional=draw(documents, units) - 0.6,
    )


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_shipped_criteria() -> None:
    assert sorted(criteria) == sorted([*NAMES, *OF_EXPERTS_ALONE])
    assert {name for name in criteria if Structure.FFN not in criteria[name].structures} == set(OF_EXPERTS_ALONE)
    assert all(criteria[name].name == name and criteria[name].paper.startswith("https://") for name in NAMES)


def test_per_unit_sums_consecutive_channels() -> None:
    statistics = two_units_of_two_channels()
    assert statistics.per_unit(torch.tensor([1.0, 2.0, 30.0, 40.0])).tolist() == [3.0, 70.0]
    assert statistics.per_unit(statistics.rms).tolist() == [[3.0, 7.0], [1.0, 0.5]]
    assert (statistics.units, statistics.documents) == (2, 2)


def test_activation_is_rms_times_absolute_column_sums() -> None:
    scores = criteria["activation"].score(two_units_of_two_channels())
    assert scores.tolist() == [[1 * 1 + 2 * 10, 3 * 100 + 4 * 1000], [0 * 1 + 1 * 10, 0.5 * 100 + 0 * 1000]]


def test_impact_of_channels_is_their_squared_contribution() -> None:
    scores = criteria["impact"].score(two_units_of_two_channels())
    assert scores.tolist() == [[(1 * 2) ** 2 + (2 * 3) ** 2, (3 * 5) ** 2 + (4 * 7) ** 2], [(1 * 3) ** 2, 2.5**2]]


def test_impact_that_was_measured_counts_as_it_is() -> None:
    measured = torch.tensor([[0.25, 4.0], [0.0, 9.0]])
    assert criteria["impact"].score(two_units_of_two_channels(measured)).tolist() == measured.tolist()


def test_magnitude_is_the_norm_of_the_weights_for_every_document() -> None:
    assert criteria["magnitude"].score(two_units_of_two_channels()).tolist() == [[6.0, 8.0], [6.0, 8.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels_per_unit", [1, 4])
def test_every_criterion_gives_one_score_per_document_and_unit(name: str, channels_per_unit: int) -> None:
    statistics = made_up(5, channels_per_unit, impact=channels_per_unit > 1)
    scores = criteria[name].score(statistics)
    assert scores.shape == (4, 5)
    assert (scores >= 0).all()


# --- random ---------------------------------------------------------------------------------------------------------


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    score = criteria["random"].score
    one = score(made_up(50, 1))
    assert torch.equal(score(made_up(50, 1)), one)
    louder = dataclasses.replace(made_up(50, 1), rms=100 * made_up(50, 1).rms, weight_norm=torch.zeros(50))
    assert torch.equal(score(louder), one)
    assert not torch.equal(score(dataclasses.replace(made_up(50, 1), seed=4)), one)


def test_random_is_the_same_for_every_document_and_spread_over_the_unit_interval() -> None:
    scores = criteria["random"].score(made_up(2000, 1))
    assert torch.equal(scores, scores[:1].expand_as(scores))
    assert len(scores[0].unique()) > 1990
    counts = torch.histc(scores[0], bins=4, min=0, max=1)
    assert counts.sum() == 2000  # all of them inside
    assert (counts > 400).all()  # 500 are expected in each quarter, with a deviation of 20


# --- from a running model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", seed=5)


@pytest.fixture(scope="module")
def profile(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    statistics = forward_pass(tiny_of(model).text(DOCUMENTS, 16))
    about = {"digest": "d", "corpus": "c", "documents": ["x"] * 3, "tokens": 15, "layers": [vars(SHAPE)] * 3}
    return save_profile(tmp_path_factory.mktemp("profile") / "p.safetensors", about, statistics)


@pytest.mark.parametrize("structure", DENSE)
def test_random_differs_between_layers_structures_and_seeds(profile: Profile, structure: Structure) -> None:
    def scores(of: Structure, layer: int, seed: int) -> list[float]:
        score = criteria["random"].score(unit_statistics(profile, of, layer, seed))[0]
        return score[: SHAPE.kv_heads].tolist()

    drawn = [scores(of, layer, seed) for of in DENSE for layer in range(3) for seed in (0, 1, 2)]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)
    assert scores(structure, 2, 1) == scores(structure, 2, 1)


def output_of(model: Any, module: str, ids: list[int]) -> Tensor:
    """The output of a submodule on one document, `[tokens, hidden]`."""
    seen: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = model.get_submodule(module).register_forward_hook(note)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def change_when_columns_are_zero(model: Any, module: str, projection: str, columns: range) -> list[float]:
    """`mean_t ‖Δy_t‖²` of a module's output for each document, when columns of a projection are zeroed."""
    weight = model.get_submodule(projection).weight
    before = [output_of(model, module, ids) for ids in DOCUMENTS]
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[:, list(columns)] = 0
    try:
        after = [output_of(model, module, ids) for ids in DOCUMENTS]
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    return [float((b - a).square().sum(1).mean()) for b, a in zip(before, after, strict=True)]


@pytest.mark.parametrize(
    ("structure", "module", "projection"),
    [
        (Structure.FFN, "", "mlp.down_proj"),  # the whole layer's output
        (Structure.QUERY_HEADS, "self_attn.o_proj", "self_attn.o_proj"),
        (Structure.KV_GROUPS, "self_attn.o_proj", "self_attn.o_proj"),
    ],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_impact_is_the_change_of_the_output_when_the_unit_is_ablated(
    model: Any, profile: Profile, structure: Structure, module: str, projection: str, layer: int
) -> None:
    scores = criteria["impact"].score(unit_statistics(profile, structure, layer, seed=0))
    path = f"model.layers.{layer}"
    exact = tiny_model("llama", seed=5).double()
    columns = exact.get_submodule(f"{path}.{projection}").weight.shape[1]
    width = columns // SHAPE.units(structure)
    ablated = [
        change_when_columns_are_zero(
            exact, f"{path}.{module}".rstrip("."), f"{path}.{projection}", range(unit * width, (unit + 1) * width)
        )
        for unit in range(SHAPE.units(structure))
    ]
    # Root mean squares of neurons are stored in half precision: 2 · 2⁻¹¹ of their square.
    torch.testing.assert_close(scores, torch.tensor(ablated).T, rtol=1.1e-3, atol=1e-8)


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_criterion_is_registered_once() -> None:
    def again(statistics: UnitStatistics) -> Tensor:
        return statistics.rms

    shipped = criteria["impact"]
    with pytest.raises(ValueError, match=r"criterion 'impact' is registered twice"):
        criterion("impact", paper="https://example.org")(again)
    assert criteria["impact"] is shipped


def test_a_new_criterion_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, Criterion] = {}
    monkeypatch.setattr(criteria, "_entries", entries)

    @criterion("loudness", paper="https://example.org")
    def loudness(statistics: UnitStatistics) -> Tensor:
        return statistics.per_unit(statistics.rms)

    assert check_criterion("loudness").score(two_units_of_two_channels()).tolist() == [[3.0, 7.0], [1.0, 0.5]]
    assert callable(loudness)
    assert list(criteria) == ["loudness"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("imapct", "; did you mean 'impact'?"),
        ("Magnitude", "; did you mean 'magnitude'?"),
        ("activations", "; did you mean 'activation'?"),
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
