"""From a prepared spec to its plan where that takes more than one look: rounds, and a search that can be interrupted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.profile import Profile
from expertprune.composition.plan import compose
from expertprune.errors import SpecError
from expertprune.models.masking import Divergence
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.decide import search_batches
from expertprune.units import KeptUnits, Structure
from tests.patching import everywhere


def spec_with(spec_data: dict[str, Any], tmp_path: Path, **overrides: Any) -> Spec:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return parse_spec(spec_data, "spec", tmp_path, dotted)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plan of every round, in order."""
    made: list[Plan] = []
    original = compose

    def noted(*arguments: Any, **named: Any) -> Plan:
        made.append(original(*arguments, **named))
        return made[-1]

    everywhere(monkeypatch, "expertprune.composition.plan.compose", noted)
    return made


# --- rounds ---------------------------------------------------------------------------------------------------------

BUDGETS: dict[str, dict[str, Any]] = {
    "ffn": {"ffn": 0.5, "multiple_of": 4},
    "heads": {"query_heads": 0.5, "multiple_of": 4},
    "parameters": {"parameters": 0.25, "multiple_of": 2},
    "groups and neurons": {"parameters": 0.3, "kv_groups": 1, "multiple_of": 4},
}


@pytest.mark.parametrize("scale", ["share", "standard"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_what_a_round_dropped_stays_dropped(
    allocation: str, budget: str, scale: str, spec_data: dict[str, Any], tmp_path: Path, rounds: list[Plan]
) -> None:
    spec_data |= {"budget": BUDGETS[budget], "compose": {"allocation": allocation, "rounds": 3, "scale": scale}}
    plan = expertprune.compose(parse_spec(spec_data, "spec", tmp_path))
    assert len(rounds) == 3
    assert plan is rounds[-1]
    for early, late in itertools.pairwise(rounds):
        for before, now in zip(early.kept, late.kept, strict=True):
            assert all(set(now.of(structure)) <= set(before.of(structure)) for structure in Structure)
    assert plan.parameters["after"] < rounds[0].parameters["after"]


def test_many_small_rounds_never_bring_a_unit_back(
    spec_data: dict[str, Any], tmp_path: Path, rounds: list[Plan]
) -> None:
    """Where one step is larger than a round's part of the budget, a round may have nothing to do."""
    spec_data |= {
        "budget": {"parameters": 0.12, "multiple_of": 16},
        "compose": {"allocation": "global", "rounds": 8},
        "calibration": {"documents": 4},
    }
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path))
    assert len(rounds) == 8
    for early, late in itertools.pairwise(rounds):
        for before, now in zip(early.kept, late.kept, strict=True):
            assert all(set(now.of(structure)) <= set(before.of(structure)) for structure in Structure)


def test_the_last_round_meets_the_budget_exactly(spec_data: dict[str, Any], tmp_path: Path) -> None:
    spec_data["compose"] = {"rounds": 3}
    uniform = expertprune.compose(spec_with(spec_data, tmp_path, budget__ffn=0.5))
    assert [len(kept.ffn) for kept in uniform.kept] == [16] * 3
    ranked = expertprune.compose(spec_with(spec_data, tmp_path, budget__ffn=0.5, compose__allocation="global"))
    assert sum(32 - len(kept.ffn) for kept in ranked.kept) == 48
    changes = {"compose.allocation": "global", "budget": {"parameters": 0.2, "multiple_of": 1}}
    whole = expertprune.compose(parse_spec(spec_data, "spec", tmp_path, changes))
    before, after = whole.parameters["before"], whole.parameters["after"]
    # A group of two heads of 4 has 16 rows of q and o and 8 of k and v, 24 wide: the largest step.
    assert 0.2 * before <= before - after < 0.2 * before + 24 * (16 + 8)


def test_one_round_is_no_rounds(spec_data: dict[str, Any], tmp_path: Path, store: Path) -> None:
    plan = expertprune.compose(spec_with(spec_data, tmp_path, budget__ffn=0.5))
    spelled = expertprune.compose(spec_with(spec_data, tmp_path, budget__ffn=0.5, compose__rounds=1))
    assert plan == spelled
    assert len(list((store / "profiles").iterdir())) == 4


def test_masked_models_have_profiles_of_their_own(
    spec_data: dict[str, Any], tmp_path: Path, store: Path, rounds: list[Plan]
) -> None:
    plain = {str(name): profile.digest for name, profile in expertprune.profile(spec_with(spec_data, tmp_path)).items()}
    plan = expertprune.compose(spec_with(spec_data, tmp_path, compose__rounds=2, budget__ffn=0.5))
    assert plan.profiles == plain, "the plan names the profiles of the base"
    others = [path for path in (store / "profiles").iterdir() if path.stem not in plain.values()]
    assert len(others) == 4
    for path in others:
        profile = Profile(path)
        assert profile.digest == path.stem
        for layer, kept in enumerate(rounds[0].kept):
            silent = (profile.read(f"ffn.{layer}.output_l2") == 0).nonzero()[:, 0].tolist()
            assert silent == sorted(set(range(32)) - set(kept.ffn)), "the columns of masked neurons are zero"


def test_rounds_leave_the_base_as_it_was(spec_data: dict[str, Any], tmp_path: Path) -> None:
    prepared = expertprune.validate(spec_with(spec_data, tmp_path, compose__rounds=2, budget__ffn=0.5))
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    plan_of(prepared, silent)
    assert all(torch.equal(value, before[name]) for name, value in prepared.model.state_dict().items())


def test_rounds_whose_profiles_are_not_stored_are_refused_where_nothing_may_run(
    spec_data: dict[str, Any], tmp_path: Path
) -> None:
    spec = spec_with(spec_data, tmp_path, compose__rounds=2, budget__ffn=0.5)
    expertprune.profile(spec)
    with pytest.raises(SpecError, match="lacks the forward pass: run the profile stage"):
        expertprune.compose(spec, run=False)
    plan = expertprune.compose(spec)
    assert expertprune.compose(spec, run=False) == plan


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def searching(spec_data: dict[str, Any]) -> dict[str, Any]:
    spec_data["budget"] = {"ffn": 0.5, "multiple_of": 4}
    spec_data["compose"] = {"allocation": "search", "search": {"trials": 7, "tokens": 64}}
    return spec_data


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[KeptUnits]]:
    """Every plan whose divergence is measured, in order."""
    calls: list[list[KeptUnits]] = []
    original = Divergence.__call__

    def counted(self: Divergence, kept: Sequence[KeptUnits]) -> float:
        calls.append(list(kept))
        return original(self, kept)

    monkeypatch.setattr(Divergence, "__call__", counted)
    return calls


def test_the_search_keeps_the_best_of_what_it_measured(
    searching: dict[str, Any], tmp_path: Path, measured: list[list[KeptUnits]]
) -> None:
    spec = parse_spec(searching, "spec", tmp_path)
    prepared = expertprune.validate(spec)
    plan = plan_of(prepared, silent)
    assert len(plan.search) == 7
    divergence = Divergence(prepared.model, prepared.base.family, prepared.base.layers, search_batches(prepared))
    values = [divergence(kept) for kept in list(measured)]
    assert min(values) == pytest.approx(min(plan.search), rel=1e-6)
    assert divergence(plan.kept) == pytest.approx(min(plan.search), rel=1e-6)
    others = [expertprune.compose(spec, overrides={"compose.allocation": how}) for how in ("global", "uniform")]
    assert [divergence(other.kept) for other in others] == pytest.approx(plan.search[:2], rel=1e-6)
    assert plan.parameters["after"] <= others[0].parameters["after"]


def test_a_second_search_measures_nothing_again(
    searching: dict[str, Any], tmp_path: Path, store: Path, measured: list[list[KeptUnits]]
) -> None:
    spec = parse_spec(searching, "spec", tmp_path)
    plan = expertprune.compose(spec)
    (stored,) = (store / "searches").iterdir()
    assert len(json.loads(stored.read_text())) == len(measured)
    measured.clear()
    assert expertprune.compose(spec) == plan
    assert measured == []
    expertprune.compose(spec, overrides={"compose.search.seed": 1})
    assert measured, "another seed tries others"


@pytest.mark.parametrize("after", [1, 4])
def test_a_search_that_was_interrupted_goes_on_to_the_same_result(
    searching: dict[str, Any],
    tmp_path: Path,
    measured: list[list[KeptUnits]],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    spec = parse_spec(searching, "spec", tmp_path)
    undisturbed = expertprune.compose(spec, store=tmp_path / "undisturbed")
    all_of_them = list(measured)
    measured.clear()
    counted: Callable[..., float] = Divergence.__call__

    def interrupted(self: Divergence, kept: Sequence[KeptUnits]) -> float:
        if len(measured) == after:
            raise KeyboardInterrupt
        return counted(self, kept)

    with monkeypatch.context() as patched:
        patched.setattr(Divergence, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            expertprune.compose(spec, store=tmp_path / "other")
    assert measured == all_of_them[:after]
    assert expertprune.compose(spec, store=tmp_path / "other") == undisturbed
    assert measured == all_of_them


def test_a_damaged_record_of_a_search_is_measured_again(
    searching: dict[str, Any], tmp_path: Path, store: Path, measured: list[list[KeptUnits]]
) -> None:
    spec = parse_spec(searching, "spec", tmp_path)
    plan = expertprune.compose(spec)
    first = list(measured)
    (stored,) = (store / "searches").iterdir()
    stored.write_text("{")
    assert expertprune.compose(spec) == plan
    assert measured == first + first


def test_neurons_and_groups_are_searched_together(searching: dict[str, Any], tmp_path: Path) -> None:
    searching["budget"] = {"parameters": 0.2, "multiple_of": 4}
    plan = expertprune.compose(parse_spec(searching, "spec", tmp_path))
    before, after = plan.parameters["before"], plan.parameters["after"]
    assert before - after >= 0.2 * before
    for kept in plan.kept:
        assert len(kept.ffn) % 4 == 0
        assert 24 % len(kept.query_heads) == 0


def test_a_search_after_rounds_keeps_what_they_dropped_out(
    searching: dict[str, Any], tmp_path: Path, rounds: list[Plan]
) -> None:
    searching["compose"] |= {"rounds": 3}
    searching["compose"]["search"]["trials"] = 12
    expertprune.compose(parse_spec(searching, "spec", tmp_path))
    for early, late in itertools.pairwise(rounds):
        for before, now in zip(early.kept, late.kept, strict=True):
            assert set(now.ffn) <= set(before.ffn)


@pytest.mark.parametrize("rounds_", [1, 3])
def test_a_uniform_search_keeps_the_same_widths_in_every_layer(
    searching: dict[str, Any], tmp_path: Path, rounds: list[Plan], rounds_: int
) -> None:
    searching["budget"] = {"parameters": 0.2, "multiple_of": 4}
    searching["compose"] |= {"rounds": rounds_}
    searching["compose"]["search"]["uniform"] = True
    plan = expertprune.compose(parse_spec(searching, "spec", tmp_path))
    assert len({(len(k.ffn), len(k.query_heads), len(k.kv_groups)) for k in plan.kept}) == 1
    # 3, 2 or 1 of three groups stay, and neurons make up the rest.
    assert len(plan.search) == 3
    assert plan.parameters["before"] - plan.parameters["after"] >= 0.2 * plan.parameters["before"]
    for early, late in itertools.pairwise(rounds):
        for before, now in zip(early.kept, late.kept, strict=True):
            assert all(set(now.of(structure)) <= set(before.of(structure)) for structure in Structure)


def test_a_uniform_search_of_neurons_alone_has_one_way_to_go(searching: dict[str, Any], tmp_path: Path) -> None:
    searching["compose"]["search"]["uniform"] = True
    plan = expertprune.compose(parse_spec(searching, "spec", tmp_path))
    assert [len(kept.ffn) for kept in plan.kept] == [16] * 3
    assert (
        plan.kept
        == expertprune.compose(parse_spec(searching, "spec", tmp_path, {"compose.allocation": "uniform"})).kept
    )


@pytest.mark.parametrize("tokens", [64, 100, 5000])
def test_the_text_of_the_trials_is_of_all_corpora_in_turn(
    searching: dict[str, Any], tmp_path: Path, tokens: int
) -> None:
    searching["compose"]["search"]["tokens"] = tokens
    prepared = expertprune.validate(parse_spec(searching, "spec", tmp_path))
    documents = {name: prepared.calibration(name)[0] for name in prepared.corpora}
    lengths = {d.digest: len(d.text.split()) for each in documents.values() for d in each}
    in_turn = [d.digest for row in itertools.zip_longest(*documents.values()) for d in row if d is not None]
    expected: list[int] = []
    for digest in dict.fromkeys(in_turn):
        if sum(expected) < tokens:
            expected.append(lengths[digest])
    batches = search_batches(prepared)
    assert sorted(length for batch in batches for length in batch.lengths) == sorted(expected)
    assert sum(expected) >= min(tokens, sum(lengths.values()))
