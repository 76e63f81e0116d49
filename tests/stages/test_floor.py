"""A small expert that keeps enough: three builds at most, measured on documents that calibrate nothing."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import BaseReference, Parameters, Plan, RetentionFound, StructureBudget
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.errors import PlanError, SpecError
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.profiling.store import measure as measure_corpus
from expertprune.progress import silent
from expertprune.pruning.write import prune as prune_base
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Retention
from expertprune.stages import floor as retaining
from expertprune.stages.compose import plan_of
from expertprune.stages.floor import FloorFound, budgets_to_try, measure, plan_by_retention
from expertprune.stages.validate import Prepared, validation_documents
from tests.calling import call
from tests.patching import everywhere
from tests.scoring import score_documents

CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]


@pytest.fixture
def retaining_spec(spec_data: dict[str, Any]) -> dict[str, Any]:
    spec_data["budget"] = {"retention": {"expert": 0.9}, "multiple_of": 4}
    spec_data["compensation"] = "none"
    return spec_data


def prepared_with(data: dict[str, Any], folder: Path, overrides: dict[str, Any] | None = None) -> Prepared:
    return expertprune.validate(parse_spec(data, "spec", folder, overrides))


@pytest.fixture
def prepared(retaining_spec: dict[str, Any], tmp_path: Path) -> Prepared:
    return prepared_with(retaining_spec, tmp_path)


def kept_of(expert: float, general: float | None = None) -> FloorFound:
    corpora = dict.fromkeys(CORPORA[:3], 1.0) | {"domain/medical": expert}
    return FloorFound(corpora if general is None else corpora | {"general/general": general})


# --- what holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "floor", "holds"),
    [
        ({"language/en": 0.99, "domain/law": 0.95, "general/g": 0.5}, {"expert": 0.95}, True),
        ({"language/en": 0.99, "domain/law": 0.949, "general/g": 0.99}, {"expert": 0.95}, False),
        ({"language/en": 0.5, "general/g": 0.9, "general/h": 0.8}, {"general": 0.8}, True),
        ({"language/en": 0.5, "general/g": 0.9, "general/h": 0.79}, {"general": 0.8}, False),
        ({"language/en": 0.89, "general/g": 0.8}, {"expert": 0.9, "general": 0.8}, False),
        ({"language/en": 0.9, "general/g": 0.8}, {"expert": 0.9, "general": 0.8}, True),
        ({"language/en": 0.9}, {"general": 1.0}, True),  # there is no general corpus that could lose anything
    ],
)
def test_the_worst_corpus_of_a_kind_decides(kept: dict[str, float], floor: dict[str, float], holds: bool) -> None:
    assert FloorFound(kept).holds(Retention(**floor)) is holds


@pytest.mark.parametrize(("allocation", "layers_at_once"), [("uniform", 3), ("global", 1)])
def test_budgets_are_legal_steps_apart(
    retaining_spec: dict[str, Any], tmp_path: Path, allocation: str, layers_at_once: int
) -> None:
    """Hidden 24, three layers: a step of four neurons of one is 4 · 3 · 24 parameters, and four of 32 stay at the floor."""
    prepared = prepared_with(retaining_spec, tmp_path, {"compose.allocation": allocation})
    found = budgets_to_try(prepared)
    assert len(found) == 7 * 3 / layers_at_once
    total = prepared.base.checkpoint.parameters
    for steps, budget in enumerate(found, start=1):
        assert budget.parameters == pytest.approx(steps * layers_at_once * 4 * 3 * 24 / total)
        assert budget.retention is None
        assert budget.multiple_of == 4


def removed_by(prepared: Prepared) -> list[float]:
    """How many parameters each budget to try removes."""
    return [(budget.parameters or 0) * prepared.base.checkpoint.parameters for budget in budgets_to_try(prepared)]


def test_budgets_of_a_base_whose_layers_differ_begin_at_each_layers_own_width(
    retaining_spec: dict[str, Any], tmp_path: Path
) -> None:
    """Widths of 32, 8 and 20 have 7, 1 and 4 steps of four neurons above the floor, of 4 · 3 · 24 parameters each."""
    prepared = prepared_with(retaining_spec, tmp_path, {"compose.allocation": "global"})
    layers = tuple(replace(shape, ffn=ffn) for shape, ffn in zip(prepared.base.layers, (32, 8, 20), strict=True))
    found = removed_by(replace(prepared, base=replace(prepared.base, layers=layers)))
    apart = [large - small for small, large in itertools.pairwise([0, *found])]
    assert all(0 < each <= 4 * 3 * 24 * (1 + 1e-6) for each in apart)
    assert found[-1] == pytest.approx((7 + 1 + 4) * 4 * 3 * 24)


@pytest.mark.parametrize(("allocation", "parts"), [("uniform", 1), ("global", 3)])
def test_budgets_go_on_from_what_cut_heads_leave(
    retaining_spec: dict[str, Any], tmp_path: Path, allocation: str, parts: int
) -> None:
    """Three of six heads go in each of three layers, of 4 rows of q and 4 columns of o; the first budget is they alone."""
    retaining_spec["budget"]["query_heads"] = 3
    found = removed_by(prepared_with(retaining_spec, tmp_path, {"compose.allocation": allocation}))
    heads, step = 3 * 3 * 2 * 4 * 24, 3 * 4 * 3 * 24
    assert found == pytest.approx([heads + step * number / parts for number in range(7 * parts + 1)])


@pytest.mark.parametrize("everything", [True, False])
def test_heads_and_neurons_above_the_floor_go_where_enough_is_kept_else_heads_alone(
    retaining_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    retaining_spec["budget"]["query_heads"] = 3
    prepared = prepared_with(retaining_spec, tmp_path)
    heads, total = 3 * 3 * 2 * 4 * 24, prepared.base.checkpoint.parameters
    fake_measure(monkeypatch, lambda size: 0.95 if everything or size == total - heads else 0.1)
    plan = plan_of(prepared, silent)
    assert {len(kept.query_heads) for kept in plan.kept} == {3}
    assert {len(kept.ffn) for kept in plan.kept} == {4 if everything else 32}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"query_heads": {"keep": 7}}, "budget.query_heads: keep: 7 is more than the 6 that there are"),
        ({"kv_groups": 3}, "budget.kv_groups: "),
        ({"multiple_of": 64}, "there is no smaller width to try; lower budget.multiple_of or budget.floor"),
    ],
    ids=str,
)
def test_a_floor_is_refused_before_anything_is_profiled(
    retaining_spec: dict[str, Any], tmp_path: Path, allocation: str, budget: dict[str, Any], reason: str
) -> None:
    retaining_spec["budget"] |= budget
    with pytest.raises(PlanError, match=re.escape(reason)):
        prepared_with(retaining_spec, tmp_path, {"compose.allocation": allocation})


# --- search ---------------------------------------------------------------------------------------------------------


def searched(
    prepared: Prepared, keeps: list[float], guessed: list[float], floor: float, reachable: int = 7
) -> tuple[Plan | None, list[int]]:
    """The plan that is found where experts keep `keeps`, and `guessed` is foreseen; and what was built."""
    budgets = budgets_to_try(prepared)
    tried: list[int] = []

    def fake(_: Prepared, profiles: Any, budget: Any, evaluator: Any) -> tuple[Plan, FloorFound]:
        number = budgets.index(budget)
        assert number < reachable, "the floor of widths does not allow it"
        tried.append(number)
        found = StructureBudget(requested=0, of=32, kept=4, removed=28)
        base, parameters = BaseReference(model="b", digest="d"), Parameters(before=1, after=1)
        plan = Plan(str(number), base, parameters, [], [], {"ffn": found})
        return plan, kept_of(keeps[number])

    def foreseen(_: Prepared, profiles: Any, budget: Any) -> FloorFound | None:
        number = budgets.index(budget)
        return kept_of(guessed[number]) if number < reachable else None

    budget = prepared.spec.budget.model_copy(update={"retention": Retention(expert=floor)})
    asked = replace(prepared, spec=prepared.spec.model_copy(update={"budget": budget}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(retaining, "_try", fake)
        patched.setattr(retaining, "_foreseen", foreseen)
        try:
            return plan_by_retention(asked, {}, silent), tried
        except PlanError:
            return None, tried


LOSSES = st.lists(st.floats(0.001, 0.2), min_size=7, max_size=7)
ANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(losses=LOSSES, factor=st.floats(0.3, 3), reachable=st.integers(1, 7), expert=st.floats(0.3, 0.99))
@ANY
def test_a_forecast_that_is_right_up_to_a_factor_finds_the_largest_cut(
    prepared: Prepared, losses: list[float], factor: float, reachable: int, expert: float
) -> None:
    lost = [sum(losses[: number + 1]) for number in range(7)]
    keeps, guessed = [1 / (1 + each) for each in lost], [1 / (1 + each * factor) for each in lost]
    holding = [number for number in range(reachable) if keeps[number] >= expert * (1 + 1e-9)]
    assume(not any(abs(each / expert - 1) < 1e-6 for each in keeps))
    plan, tried = searched(prepared, keeps, guessed, expert, reachable)
    assert len(tried) == len(set(tried)) <= 3
    if not holding:
        assert plan is None
        assert 0 in tried
    else:
        assert plan is not None
        assert plan.name == str(max(holding))
        best = kept_of(keeps[max(holding)])
        assert plan.budget["ffn"].requested == RetentionFound(
            retention=Retention(expert=expert), found=dict(best.corpora)
        )


@given(losses=LOSSES, guesses=LOSSES, expert=st.floats(0.3, 0.99))
@ANY
def test_whatever_is_foreseen_at_most_three_are_built_and_the_plan_is_the_largest_that_held(
    prepared: Prepared, losses: list[float], guesses: list[float], expert: float
) -> None:
    keeps, guessed = ([1 / (1 + sum(each[: n + 1])) for n in range(7)] for each in (losses, guesses))
    plan, tried = searched(prepared, keeps, guessed, expert)
    held = [number for number in tried if keeps[number] >= expert]
    assert 1 <= len(tried) == len(set(tried)) <= 3
    assert (plan is None) == (not held)
    assert plan is None or plan.name == str(max(held))


def fake_measure(monkeypatch: pytest.MonkeyPatch, keeps: Any) -> list[int]:
    """Retention as a function of an expert's parameters; the sizes that were measured."""
    sizes: list[int] = []

    def faked(_: Prepared, __: Any, folder: Path) -> FloorFound:
        sizes.append(Checkpoint(folder).parameters)
        return kept_of(keeps(sizes[-1]), 1.0)

    monkeypatch.setattr(retaining, "measure", faked)
    return sizes


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_expert_that_is_measured_is_the_one_that_is_planned(
    retaining_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, allocation: str
) -> None:
    """As many parameters may go as so many steps of four neurons in each layer have, and not quite one group more.

    A group of two heads of 4 has 16 rows of q and o and 8 of k and v: no step of the ranking is larger.
    """
    prepared = prepared_with(retaining_spec, tmp_path, {"compose.allocation": allocation})
    total = prepared.base.checkpoint.parameters
    most, group = steps * 3 * 4 * 3 * 24, 24 * (16 + 8)
    sizes = fake_measure(monkeypatch, lambda size: 0.95 if total - size < most + group else 0.8)
    plan = plan_of(prepared, silent)
    assert plan.parameters.after in sizes
    assert 0 < total - plan.parameters.after < most + group
    if allocation == "uniform":
        assert len({len(kept.ffn) for kept in plan.kept}) == 1


def test_a_floor_that_no_cut_holds_names_the_best_and_writes_nothing(
    retaining_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = fake_measure(monkeypatch, lambda size: 0.7 + 1e-6 * (size % 7))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(retaining_spec))
    for command, out in (("compose", "plan.json"), ("build", "expert")):
        sizes.clear()
        message = call(command, path, "--out", tmp_path / out, code=2).stderr
        assert 1 <= len(sizes) <= 3
        assert "budget.retention: no cut keeps expert 0.9; the smallest, 0.0" in message
        assert f"keeps expert {0.7 + 1e-6 * (sizes[-1] % 7):.4f}" in message
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".", "expert", "plan"))] == []


def test_what_cannot_be_tried_is_said(retaining_spec: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(retaining_spec, "spec", tmp_path, {"budget.multiple_of": 64})
    with pytest.raises(PlanError, match=r"there is no smaller width to try; lower budget\.multiple_of"):
        expertprune.compose(spec)
    path = Path(retaining_spec["corpora"]["sources"]["medical"]["path"])
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(
        SpecError, match=r"corpora\.sources\.medical: budget\.retention holds documents back, and there is only one"
    ):
        expertprune.validate(spec)


def test_the_plan_of_a_floor_can_be_pruned(retaining_spec: dict[str, Any], tmp_path: Path) -> None:
    """With the real measure: the floor is low, and the plan's file says it, so that pruning calibrates as composing did."""
    spec = parse_spec(retaining_spec, "spec", tmp_path, {"budget.retention": {"expert": 0.01, "general": 0.01}})
    plan = expertprune.compose(spec)
    plan.save(tmp_path / "plan.json")
    assert plan.spec["budget"] == spec.document()["budget"]
    assert all(value >= 0.01 for value in plan.budget["ffn"].requested.found.values())
    assert "kept of held-back text" in call("inspect", tmp_path / "plan.json").output
    out = expertprune.prune(tmp_path / "plan.json", tmp_path / "expert")
    assert Expert.load(out).plan.parameters == plan.parameters


# --- held-back documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "held"), [(2, 1), (9, 2), (20, 5), (24, 6), (32, 8), (64, 8), (79, 8), (120, 12)]
)
def test_a_tenth_is_held_back_or_eight_up_to_a_quarter_but_one_at_least(documents: int, held: int) -> None:
    texts = tuple(Document(f"text {number}") for number in range(documents))
    found = validation_documents(Corpus(CorpusName.parse("language/en"), texts, ()))
    assert len(found) == held
    assert set(found) < set(texts)
    shuffled = validation_documents(Corpus(CorpusName.parse("language/en"), texts[::-1], ()))
    assert set(shuffled) == set(found), "the order of the corpus does not matter"


def test_documents_that_are_held_back_calibrate_nothing(
    retaining_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retaining_spec["compensation"] = "least_squares"
    prepared = expertprune.validate(parse_spec(retaining_spec, "spec", tmp_path))
    profiled: dict[str, set[str]] = {}
    repaired: list[tuple[int, ...]] = []

    def profiling(text: Any, part: Any, path: Path, about: Any, *rest: Any) -> Any:
        profiled[about.corpus] = set(about.documents)
        return measure_corpus(text, part, path, about, *rest)

    def pruning(plan: Plan, base: Any, folder: Path, repair_input: Any, *rest: Any) -> None:
        for batch in repair_input.batches:
            repaired.extend(tuple(row[:n].tolist()) for row, n in zip(batch.ids, batch.lengths, strict=True))
        prune_base(plan, base, folder, repair_input, *rest)

    everywhere(monkeypatch, "expertprune.profiling.store.measure", profiling)
    everywhere(monkeypatch, "expertprune.pruning.write.prune", pruning)
    fake_measure(monkeypatch, lambda size: 1.0)
    plan_of(prepared, silent)
    held = {name: validation_documents(corpus) for name, corpus in prepared.corpora.items()}
    every = {tuple(prepared.base.tokenizer(d.text)["input_ids"]) for documents in held.values() for d in documents}
    assert len(every) >= 4
    assert not every & set(repaired)
    for name, corpus in prepared.corpora.items():
        assert profiled[str(name)] == {d.digest for d in set(corpus.calibration) - set(held[name])}
        assert profiled[str(name)]


@pytest.mark.parametrize("method", ["none", "least_squares"])
def test_an_expert_is_measured_on_what_was_held_back(
    retaining_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The same numbers while it is repaired, and from its folder afterwards; the base reads once."""
    retaining_spec["compensation"] = method
    prepared = expertprune.validate(parse_spec(retaining_spec, "spec", tmp_path))
    tried: list[tuple[FloorFound, FloorFound]] = []
    tokenizer, limit = prepared.base.tokenizer, prepared.spec.calibration.max_tokens

    def measuring(_: Prepared, meanwhile: Any, folder: Path) -> FloorFound:
        runs = [TextRun(model, prepared.base.family, (), ())
                for model in (prepared.running.model, load_model(folder, torch.float32))]  # fmt: skip
        held = {str(name): validation_documents(corpus) for name, corpus in prepared.corpora.items()}
        rows = {name: score_documents(*runs, tokenizer, documents, limit) for name, documents in held.items()}
        expected = {name: sum(row.base_bits for row in each) / sum(row.expert_bits for row in each)
                    for name, each in rows.items()}  # fmt: skip
        tried.append((measure(prepared, meanwhile, folder), FloorFound(expected)))
        return tried[-1][0]

    monkeypatch.setattr(retaining, "measure", measuring)
    started: list[int] = []
    finish = TextRun.finish
    monkeypatch.setattr(TextRun, "finish", lambda run, *rest: (started.append(1), finish(run, *rest))[1])
    with contextlib.suppress(PlanError):
        plan_of(prepared, silent)
    assert tried
    for found, expected in tried:
        assert dict(found.corpora) == pytest.approx(dict(expected.corpora), rel=1e-5)
        assert list(found.corpora) == CORPORA
        assert found.corpora["language/en"] != 1
    ours = len(started) - 2 * len(CORPORA) * len(tried)  # the reference above lets both models read each corpus
    assert ours == (0 if method == "least_squares" else 1 + len(tried))
