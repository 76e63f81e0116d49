"""What a spec names is found once, checked once, and not changed afterwards."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import expertprune
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.evaluation.measure import group_of
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Budget, Spec
from expertprune.stages import build, prune, sweep  # noqa: F401 - so that they are patched
from expertprune.stages.validate import find, prepare
from tests.patching import everywhere
from tests.tiny import save_tiny, write_corpus

CHECKS = {
    "base": "expertprune.models.base.resolve_base",
    "corpora": "expertprune.corpora.loading.load_corpora",
    "open keys": "expertprune.composition.defaults.resolved",
    "budget": "expertprune.composition.plan.foreseen_widths",
    "plan": "expertprune.pruning.write.check_plan",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each check is made."""
    found: Counter[str] = Counter()

    def count(name: str, path: str) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return original(*args, **kwargs)

        original = everywhere(monkeypatch, path, counted)

    for name, path in CHECKS.items():
        count(name, path)
    return found


def test_everything_is_checked_once_and_what_follows_is_told(
    tiny_spec: Spec, tmp_path: Path, calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "expertprune.stages.forecast")
    few = {"evaluate.documents": 1, "evaluate.corpora": ["medical"]}
    once = {"base": 1, "corpora": 1, "open keys": 1, "budget": 1}
    expertprune.build(tiny_spec, tmp_path / "built", few)
    assert calls == once  # a plan that was just made needs no check
    stages = [line.partition(":")[0] for line in caplog.messages[0].splitlines()]
    corpora = ("language/en", "domain/medical", "task/qa", "general/general")
    assert stages == ["tiny", *(f"  profile {name}" for name in corpora), "  repair", "  write", "  evaluate"]
    plan = expertprune.compose(tiny_spec)
    calls.clear()
    expertprune.prune(plan, tmp_path / "pruned")
    assert calls == {**once, "plan": 1}
    calls.clear()
    caplog.clear()
    expertprune.sweep(tiny_spec, [0.5, 0.25], overrides=few)
    assert calls == {**once, "open keys": 2, "budget": 2}
    stages = [line.rpartition(":")[0] for line in caplog.messages[0].splitlines()[1:]]  # profiles are there by now
    assert stages == [f"  budget {value}: {name}" for value in (0.5, 0.25) for name in ("repair", "write", "evaluate")]


@pytest.fixture
def in_file(spec_data: dict[str, Any], tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """What is wrong with a spec in a file that is changed in some of its dotted keys."""

    def problem(changes: dict[str, Any]) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(spec_data))
        with pytest.raises((SpecError, PlanError, CheckpointError)) as caught:
            expertprune.validate(path, changes)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{path}: ")
        return line.removeprefix(f"{path}: ")

    return problem


EN = "corpora.sources.en"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{EN}.path": "no.jsonl"}, rf"{EN}\.path: .*/no\.jsonl: no such file"),
        ({f"{EN}.path": "empty.jsonl"}, rf"{EN}\.path: .*/empty\.jsonl: holds no document to calibrate on"),
        ({f"{EN}.path": "broken.jsonl"}, rf"{EN}\.path: .*/broken\.jsonl, line 2: not valid JSON: "),
        ({f"{EN}.path": "other.jsonl"}, rf"{EN}\.path: .*, line 1: has no field 'text'; did you mean 'txet'\? \(name"),
        ({f"{EN}.path": "short.jsonl"}, rf"{EN}: every document is shorter than two tokens"),
        ({f"{EN}.evaluation": "no.jsonl"}, rf"{EN}\.evaluation: .*/no\.jsonl: no such file"),
        ({f"{EN}.questions": "no.jsonl"}, rf"{EN}\.questions: .*/no\.jsonl: no such file"),
        ({"relevance.criterion": "fihser"}, r"relevance\.criterion: unknown criterion 'fihser'; did you mean 'fisher'"),
        ({"budget.ffn": 0.9999}, r"budget\.ffn: 0\.9999 is too much .*; the largest legal one is"),
        ({"budget.vocabulary": {"keep": 64}}, r"budget\.vocabulary: .*tokenizer\.json: a WordLevel tokenizer cannot"),
        ({"base.model": "./nowhere"}, r"base\.model: .*/nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_file_and_key(
    in_file: Callable[[dict[str, Any]], str], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    content = {
        "empty": "",
        "broken": '{"text": "a"}\nnot json',
        "other": '{"txet": "a"}',
        "short": '{"text": "law"}\n{"text": "heart"}',
    }
    for name, text in content.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert re.match(told, in_file(changes))


def test_a_plan_is_named_where_a_corpus_that_it_was_made_from_is_gone(
    spec_data: dict[str, Any], tmp_path: Path
) -> None:
    path = write_corpus(tmp_path / "moved.jsonl", seed=20)
    spec_data["corpora"]["sources"]["en"] = {"path": str(path)}
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(tmp_path / "plan.json")
    path.unlink()
    with pytest.raises(SpecError, match=rf"^{tmp_path}/plan\.json: {EN}\.path: .*/moved\.jsonl: no such file"):
        expertprune.prune(tmp_path / "plan.json", tmp_path / "expert")


def test_specs_of_one_base_share_what_is_loaded_and_nothing_else(tiny_spec: Spec, store: Path) -> None:
    found = find(tiny_spec, store)
    first, second = prepare(found), prepare(found, Budget.model_validate({"ffn": 0.5, "multiple_of": 4}))
    assert first.running is second.running
    assert not first.running.loaded
    assert first.running.model is second.running.model
    assert first.running.loaded
    assert first.spec.budget != second.spec.budget
    assert found.spec == tiny_spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.spec = second.spec  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        first.spec.budget = second.spec.budget  # type: ignore[misc]


def test_other_corpora_are_measured_apart_and_do_not_calibrate(
    spec_data: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    sources = spec_data["corpora"]["sources"]
    sources["spare"] = {"path": str(write_corpus(tmp_path / "spare.jsonl", seed=20))}
    spec = parse_spec(spec_data, "spec", tmp_path, {"evaluate.others": ["spare"], "evaluate.corpora": ["en"]})
    found = find(spec, store)
    assert [group_of(corpus) for corpus in found.evaluated] == ["expert", "other"]
    assert found.evaluated[1].evaluation
    assert "spare" not in {name.value for name in found.calibration}
    sources["spare"]["evaluation"] = sources["en"]["path"]  # what calibrates measures nothing
    with pytest.raises(SpecError, match=r"corpus other/spare: .* also calibrate the expert"):
        find(parse_spec(spec_data, "spec", tmp_path, {"evaluate.others": ["spare"]}), store)


def test_a_plan_of_another_base_is_refused_before_its_budget_is_judged(
    tiny_spec: Spec, tmp_path: Path, calls: Counter[str]
) -> None:
    expertprune.compose(tiny_spec).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["base"]["digest"] = "f" * 64
    (tmp_path / "plan.json").write_text(json.dumps(data))
    calls.clear()
    with pytest.raises(PlanError, match="digest ffffffffffff"):
        expertprune.prune(tmp_path / "plan.json", tmp_path / "expert")
    assert calls["budget"] == 0


def test_a_mixture_for_transformers_alone_gets_one_width_without_being_told(tmp_path: Path, spec_data: Any) -> None:
    """Its config has one number of routed experts for all layers."""
    spec_data |= {"base": str(save_tiny(tmp_path / "olmoe", "olmoe")), "budget": {"experts": 2}, "relevance": "fisher"}
    spec_data |= {"serve_with": ["transformers"], "compose": {"allocation": "auto"}, "compensation": "none"}
    prepared = expertprune.validate(parse_spec(spec_data, "here", tmp_path))
    assert prepared.spec.compose.allocation == "uniform"


def test_passes_that_a_model_cannot_make_are_refused_whatever_they_would_score(tmp_path: Path, spec_data: Any) -> None:
    spec_data |= {"base": str(save_tiny(tmp_path / "olmoe", "olmoe")), "budget": {"experts": 2}}
    spec_data |= {"relevance": {"criterion": "regional", "experts": "fisher"}, "compose": {"allocation": "uniform"}}
    with pytest.raises(SpecError, match="regional needs the regional pass, which is not made through routed experts"):
        expertprune.validate(parse_spec(spec_data, "here", tmp_path))


def test_a_floor_needs_a_criterion_that_scores_neurons(tmp_path: Path, spec_data: Any) -> None:
    spec_data |= {"budget": {"retention": {"expert": 0.9}}, "relevance": {"criterion": "reap"}}
    with pytest.raises(SpecError, match="reap does not score ffn"):
        expertprune.validate(parse_spec(spec_data, "here", tmp_path))
