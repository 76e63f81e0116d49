"""`forecast` of a tiny model: sizes by arithmetic, nothing cut, what cannot be foreseen refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.composition.folds import PartOfProfile
from expertprune.composition.plan import compose
from expertprune.errors import PlanError, SpecError
from expertprune.models.checkpoint import Checkpoint
from expertprune.serving.throughput import bytes_per_token
from expertprune.spec.reading import parse_spec
from expertprune.stages import floor, outlook
from tests.calling import call, call_json
from tests.conftest import refuse_to_load
from tests.patching import everywhere
from tests.stages.test_sweep import AFTER, BEFORE
from tests.tiny import save_tiny

Patch = pytest.MonkeyPatch


def test_sizes_are_those_of_the_experts(spec_file: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    everywhere(monkeypatch, "expertprune.pruning.write.prune", refuse_to_load)
    picture = tmp_path / "out.png"
    found = call_json("forecast", spec_file, "--sizes", "25%,0.5,0.99", "--picture", picture)
    assert [(each["removed"], each["parameters"]) for each in found["sizes"]] == [(n, AFTER[n]) for n in (0.25, 0.5)]
    embedding = 64 * 24  # it is looked up
    speeds = [pytest.approx((BEFORE - embedding) / (AFTER[n] - embedding)) for n in (0.25, 0.5)]
    assert [each["speed"] for each in found["sizes"]] == speeds
    assert list(found["unreachable"]) == ["0.99"]
    first, second = (each["corpora"] for each in found["sizes"])
    assert list(first) == ["language/en", "domain/medical", "task/qa", "general/general"]
    for name in first:
        assert second[name]["excess"] > 0
        assert first[name]["excess"] < second[name]["excess"]
        assert first[name]["low"] < first[name]["retention"] < first[name]["high"] < 1
    assert picture.stat().st_size > 0
    assert "faster" in call("forecast", spec_file, "--sizes", "0.25", "--stored-only").output


def test_the_speed_is_at_most_what_reading_weights_allows(tmp_path: Path, spec_data: dict[str, Any]) -> None:
    """An embedding beside a head of its own is looked up, a row a token; a tied one is read whole."""
    for tied in (False, True):
        spec_data["base"] = str(save_tiny(tmp_path / f"tied-{tied}", tie_word_embeddings=tied))
        spec = parse_spec(spec_data | {"name": f"tied-{tied}"}, "spec", tmp_path)
        (size,) = expertprune.forecast(spec, [0.5]).sizes
        expert = expertprune.build(spec, tmp_path / f"expert-{tied}", overrides={"budget.ffn": 0.5})
        read = [bytes_per_token(Checkpoint(Path(folder))) for folder in (spec_data["base"], expert)]
        assert size.speed == pytest.approx(read[0] / read[1])


def test_where_a_base_breaks_and_what_nobody_named(
    spec_data: dict[str, Any], tmp_path: Path, monkeypatch: Patch
) -> None:
    spec = parse_spec(spec_data, "spec", tmp_path)
    monkeypatch.setattr(outlook, "known_languages", lambda tokenizer: ["en", "de", "zh"])
    found = expertprune.forecast(spec, [0.25, 0.5])
    assert "was made for German, Chinese too" in found.warnings[0]
    between = sum(size.corpora["task/qa"].retention for size in found.sizes) / 2
    monkeypatch.setattr(outlook, "BROKEN", between)
    assert expertprune.forecast(spec, [0.5, 0.25]).breaks["task/qa"] == 0.5
    monkeypatch.setattr(outlook, "BROKEN", 0.0)
    spec_data["corpora"]["sources"] |= dict.fromkeys(("de", "zh"), spec_data["corpora"]["sources"]["en"])
    spec_data |= {"dimensions": spec_data["dimensions"] | {"language": ["en", "de"]}, "general": ["zh"]}
    named = expertprune.forecast(parse_spec(spec_data, "spec", tmp_path), [0.25])
    assert (named.warnings, set(named.breaks.values())) == ([], {None})


def test_the_other_allocation_stands_beside(spec_file: Path) -> None:
    """It is what a spec that names the other allocation foresees."""
    own, one = (
        call_json("forecast", spec_file, "--sizes", "0.25", "--set", f"compose.allocation={name}")
        for name in ("global", "uniform")
    )
    assert (own["allocation"], one["allocation"]) == ("global", "uniform")
    assert own["sizes"][0]["instead"] == one["sizes"][0]["corpora"] != own["sizes"][0]["corpora"]
    assert one["sizes"][0]["instead"] == own["sizes"][0]["corpora"]
    said = call("forecast", spec_file, "--sizes", "0.25").output
    kept = own["sizes"][0]["corpora"]["task/qa"]["retention"]
    assert f"{kept:.3f} of task/qa" in " ".join(said.split())


def test_an_expert_that_was_built_corrects_every_size(spec_file: Path, tmp_path: Path) -> None:
    """At its own size the forecast says what was measured; at others it loses as many times more or less."""
    expert = tmp_path / "expert"
    call("build", spec_file, "--out", expert, "--set", "budget.ffn=0.25")
    measured = Expert.load(expert).evaluation
    assert measured is not None
    alone = call_json("forecast", spec_file, "--sizes", "0.25,0.5")["sizes"]
    found = call_json("forecast", spec_file, "--sizes", "0.25,0.5", "--built", expert)
    first, second = (size["corpora"] for size in found["sizes"])
    for name, result in measured.corpora.items():
        kept = result.metrics["bits_per_byte"].retention
        assert kept is not None
        lost = [1 / size["corpora"][name]["retention"] - 1 for size in alone]
        times = max(0.1, (1 / kept - 1) / lost[0])
        assert found["times_lost"][name] == pytest.approx(times)
        assert [1 / each[name]["retention"] - 1 for each in (first, second)] == pytest.approx(
            [times * each for each in lost]
        )
    assert (
        "corrected by the expert of --built" in call("forecast", spec_file, "--sizes", "0.5", "--built", expert).output
    )


def test_an_expert_says_the_same_to_specs_that_choose_otherwise(spec_file: Path, tmp_path: Path) -> None:
    """What it lost, over what is foreseen of its own units, is of the expert: of its allocation and criterion."""
    expert, chosen = tmp_path / "expert", ("compose.allocation=global", "budget.ffn=0.05", "relevance=regional")
    call("build", spec_file, "--out", expert, *(f"--set={each}" for each in chosen))
    common = ("forecast", spec_file, "--sizes", "0.25", "--built", expert)
    expected = call_json(*common, *(f"--set={each}" for each in chosen))["times_lost"]
    for other in ("compose.allocation=uniform", "relevance=impact", "dimensions.task=[]"):
        found = call_json(*common, "--set", other)["times_lost"]
        assert set(found) == set(expected) - ({"task/qa"} if "task" in other else set())
        if "task" not in other:  # all of the expert's corpora have profiles
            assert found == expected


def test_an_expert_of_a_floor_says_what_one_of_the_same_units_does(spec_data: dict[str, Any], tmp_path: Path) -> None:
    """A fraction of the parameters, times their number, may come out above what went."""
    base = save_tiny(tmp_path / "base", num_hidden_layers=2)
    spec = parse_spec(spec_data | {"base": str(base), "budget": {"ffn": 12, "multiple_of": 4}}, "spec", tmp_path)
    made = Expert.load(expertprune.build(spec, tmp_path / "expert"))
    before, removed = made.plan.parameters.before, made.plan.parameters.before - made.plan.parameters.after
    assert removed / before * before > removed
    document = made.plan.spec | {"budget": {"retention": {"expert": 0.5}, "multiple_of": 4}}
    of_floor = replace(made, plan=replace(made.plan, spec=document))
    prepared = expertprune.validate(spec)
    foreseeing = outlook.Foreseeing(outlook.profiled(prepared))
    assert foreseeing.times_lost(of_floor, prepared) == foreseeing.times_lost(made, prepared)


def test_an_expert_of_an_edited_plan_says_what_one_of_the_same_units_does(
    spec_data: dict[str, Any], tmp_path: Path
) -> None:
    """Its budget is that of the plan before it was edited, and another number of units went, or of other structures."""
    spec = parse_spec(spec_data | {"budget": {"ffn": 0.5, "kv_groups": 1, "multiple_of": 4}}, "spec", tmp_path)
    made = Expert.load(expertprune.build(spec, tmp_path / "expert"))
    prepared = expertprune.validate(spec)
    foreseeing = outlook.Foreseeing(outlook.profiled(prepared))
    expected = foreseeing.times_lost(made, prepared)
    for budget in ({"ffn": 0.125}, {"kv_groups": 1}, {"ffn": 0.99}):
        document = made.plan.spec | {"budget": {**budget, "multiple_of": 4}}
        edited = replace(made, plan=replace(made.plan, spec=document))
        assert foreseeing.times_lost(edited, prepared) == expected


def test_a_size_that_the_documents_of_a_fold_cannot_reach_is_foreseen_by_the_other_folds(
    spec_data: dict[str, Any], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Which heads can go together depends on the scores, so a budget may be out of reach of a part of the documents."""
    spec = parse_spec(spec_data, "spec", tmp_path)
    expected = expertprune.forecast(spec, [0.25]).sizes[0]
    folds = [0]

    def composed(spec: Any, base: Any, profiles: Any, *more: Any) -> Any:
        if isinstance(next(iter(profiles.values())), PartOfProfile):
            folds[0] += 1
            if folds[0] == 1:
                raise PlanError("budget.query_heads: 0.6 is too much")
        return compose(spec, base, profiles, *more)

    monkeypatch.setattr(outlook, "compose", composed)
    prepared = expertprune.validate(spec)
    foreseeing = outlook.Foreseeing(outlook.profiled(prepared))
    plan, found = foreseeing.sized(prepared, {})
    assert folds[0] > 1
    assert plan.parameters.after == expected.parameters
    assert list(found) == list(expected.corpora)
    assert all(each.excess > 0 for each in found.values())
    folds[0] = 0
    budget = prepared.spec.budget.model_copy(update={"ffn": 0, "parameters": 0.1})
    assert floor._foreseen(prepared, foreseeing, budget) is not None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.enabled=false"], "were not measured: run expertprune evaluate"),
        (["budget.layers=1"], "has lost whole layers"),
        (["budget.ffn=0"], "has lost nothing, so it says nothing of a cut"),
        (["compensation=none"], "compensation.method is none there"),
    ],
)
def test_an_expert_that_says_nothing_of_the_others_is_refused(
    spec_file: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    expert = tmp_path / "expert"
    call("build", spec_file, "--out", expert, *(f"--set={each}" for each in overrides))
    assert said in " ".join(call("forecast", spec_file, "--built", expert, code=2).stderr.split())


def test_a_corpus_of_which_no_byte_was_measured_corrects_nothing(spec_file: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    call("build", spec_file, "--out", expert, "--set", "budget.ffn=0.25")
    about = json.loads((expert / "expertprune.json").read_text())
    for row in about["evaluation"]["corpora"]["task/qa"]["per_document"]:  # each of a single token
        row |= dict.fromkeys(("tokens", "bytes", "expert_tokens", "expert_bytes", "base_bits", "expert_bits"), 0)
    (expert / "expertprune.json").write_text(json.dumps(about))
    alone, found = (call_json("forecast", spec_file, "--sizes", "0.25", *more) for more in ((), ("--built", expert)))
    assert set(found["times_lost"]) == set(found["breaks"]) - {"task/qa"}
    assert found["sizes"][0]["corpora"]["task/qa"] == alone["sizes"][0]["corpora"]["task/qa"]


def test_an_expert_of_another_base_is_refused(spec_file: Path, tmp_path: Path) -> None:
    expert, other = tmp_path / "expert", save_tiny(tmp_path / "other", seed=5)
    call("build", spec_file, "--out", expert, "--set", f"base={other}")
    said = call("forecast", spec_file, "--built", expert, code=2).stderr
    assert "was cut from another base" in " ".join(said.split())
    assert "has no expertprune.json" in call("forecast", spec_file, "--built", other, code=2).stderr


def test_what_cannot_be_foreseen_is_refused(spec_data: dict[str, Any], spec_file: Path, tmp_path: Path) -> None:
    assert "lacks the" in call("forecast", spec_file, "--stored-only", code=2).stderr
    assert "'5%..x'" in call("forecast", spec_file, "--sizes", "5%..x", code=2).stderr
    with pytest.raises(SpecError, match=r"1\.5 is not a fraction to remove"):
        expertprune.forecast(spec_file, [1.5])
    with pytest.raises(PlanError, match=r"no size can be reached; 0\.99: budget\.ffn"):
        expertprune.forecast(spec_file, [0.99])
    spec_data["budget"]["layers"] = 1
    with pytest.raises(SpecError, match=r"budget\.layers: what whole layers cost is not foreseen"):
        expertprune.forecast(parse_spec(spec_data, "spec", tmp_path))
