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
from expertprune.artifacts.profile import Profile
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.errors import PlanError, SpecError
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Retention
from expertprune.stages import floor as retaining
from expertprune.stages.compose import plan_of
from expertprune.stages.floor import FloorFound, budgets_to_try, measure, plan_by_retention
from expertprune.stages.validate import Prepared, validation_documents
from tests.calling import call
from tests.scoring import score_documents
from tests.tiny import as_run

Data = dict[str, Any]
Patch = pytest.MonkeyPatch

CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]
STEP = 4 * 3 * 24  # parameters of four neurons of one layer
HEADS = 3 * 3 * 2 * 4 * 24  # of three heads in each of three layers: 4 rows of q and 4 columns of o
KEYS = 3 * 2 * 4 * 24  # of a KV group in each of three layers: 4 rows of k and of v; its query heads go with it


@pytest.fixture
def retaining_spec(spec_data: Data) -> Data:
    spec_data["budget"] = {"retention": {"expert": 0.9}, "multiple_of": 4}
    spec_data["compensation"] = "none"
    return spec_data


def prepared_with(data: Data, folder: Path, allocation: str = "uniform", **budget: Any) -> Prepared:
    changed = {**data, "budget": data["budget"] | budget}
    return expertprune.validate(parse_spec(changed, "spec", folder, {"compose.allocation": allocation}))


@pytest.fixture
def prepared(retaining_spec: Data, tmp_path: Path) -> Prepared:
    return prepared_with(retaining_spec, tmp_path)


def kept_of(expert: float, general: float | None = None) -> FloorFound:
    corpora = dict.fromkeys(CORPORA[:3], 1.0) | {"domain/medical": expert}
    return FloorFound(corpora if general is None else corpora | {"general/general": general})


def test_the_worst_corpus_of_a_kind_decides() -> None:
    for kept, floor, holds in (
        ({"language/en": 0.99, "domain/law": 0.95, "general/g": 0.5}, {"expert": 0.95}, True),
        ({"language/en": 0.99, "domain/law": 0.949, "general/g": 0.99}, {"expert": 0.95}, False),
        ({"language/en": 0.5, "general/g": 0.9, "general/h": 0.8}, {"general": 0.8}, True),
        ({"language/en": 0.5, "general/g": 0.9, "general/h": 0.79}, {"general": 0.8}, False),
        ({"language/en": 0.89, "general/g": 0.8}, {"expert": 0.9, "general": 0.8}, False),
        ({"language/en": 0.9}, {"general": 1.0}, True),  # there is no general corpus that could lose anything
    ):
        assert FloorFound(kept).holds(Retention(**floor)) is holds


def test_budgets_are_legal_steps_apart(retaining_spec: Data, tmp_path: Path) -> None:
    """Four of 32 neurons stay at the floor; where heads are cut, the first budget is they alone.

    KV groups that compete come last: two of three go in each layer, with two query heads each, or one where one is cut.
    """

    def removed(prepared: Prepared) -> list[float]:
        budgets = budgets_to_try(prepared)
        assert {(budget.retention, budget.multiple_of) for budget in budgets} == {(None, 4)}
        return [(budget.parameters or 0) * prepared.base.checkpoint.parameters for budget in budgets]

    for allocation, parts in (("uniform", 1), ("global", 3)):
        steps = [3 * STEP * number / parts for number in range(7 * parts + 1)]
        found = prepared_with(retaining_spec, tmp_path, allocation)
        cut = prepared_with(retaining_spec, tmp_path, allocation, query_heads=3)
        for each, before, group in ((found, 0, KEYS + 2 * HEADS // 3), (cut, HEADS, KEYS + HEADS // 3)):
            groups = [group * number / parts for number in range(1, 2 * parts + 1)] if allocation == "global" else []
            sizes = [before + step for step in (*steps, *(steps[-1] + step for step in groups))]
            assert removed(each) == pytest.approx([size for size in sizes if size])
        kept = prepared_with(retaining_spec, tmp_path, allocation, kv_groups=1)  # named, so no more of them go
        assert removed(kept) == pytest.approx([KEYS + 2 * HEADS // 3 + step for step in steps])
    # Layers whose widths differ have 7, 1 and 4 steps above the floor.
    layers = tuple(replace(shape, ffn=ffn) for shape, ffn in zip(found.base.layers, (32, 8, 20), strict=True))
    sizes = removed(replace(found, base=replace(found.base, layers=layers)))
    neurons = [0, *(size for size in sizes if size <= (7 + 1 + 4) * STEP)]
    assert all(0 < large - small <= STEP * (1 + 1e-6) for small, large in itertools.pairwise(neurons))
    assert sizes[-1] == pytest.approx((7 + 1 + 4) * STEP + 2 * KEYS + 4 * HEADS // 3)


def test_what_cannot_be_tried_is_refused_at_once(retaining_spec: Data, tmp_path: Path) -> None:
    for allocation, (budget, reason) in itertools.product(
        ("uniform", "global"),
        [
            ({"query_heads": {"keep": 7}}, "budget.query_heads: keep: 7 is more than the 6 that there are"),
            ({"kv_groups": 3}, "budget.kv_groups: "),
            (
                {"multiple_of": 64, "floor": 0.9},
                "there is no smaller width to try; lower budget.multiple_of or budget.floor",
            ),
        ],
    ):
        with pytest.raises(PlanError, match=re.escape(reason)):
            prepared_with(retaining_spec, tmp_path, allocation, **budget)
    path = Path(retaining_spec["corpora"]["sources"]["medical"]["path"])
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(
        SpecError, match=r"corpora\.sources\.medical: budget\.retention holds documents back, and there is only one"
    ):
        prepared_with(retaining_spec, tmp_path)


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
        return Plan(str(number), base, parameters, [], [], {"ffn": found}), kept_of(keeps[number])

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
    lost = list(itertools.accumulate(losses))
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
        found = dict(kept_of(keeps[max(holding)]).corpora)
        assert plan.budget["ffn"].requested == RetentionFound(retention=Retention(expert=expert), found=found)


@given(losses=LOSSES, guesses=LOSSES, expert=st.floats(0.3, 0.99))
@ANY
def test_whatever_is_foreseen_at_most_three_are_built_and_the_plan_is_the_largest_that_held(
    prepared: Prepared, losses: list[float], guesses: list[float], expert: float
) -> None:
    keeps, guessed = ([1 / (1 + lost) for lost in itertools.accumulate(each)] for each in (losses, guesses))
    plan, tried = searched(prepared, keeps, guessed, expert)
    held = [number for number in tried if keeps[number] >= expert]
    assert 1 <= len(tried) == len(set(tried)) <= 3
    assert (plan is None) == (not held)
    assert plan is None or plan.name == str(max(held))


# --- experts --------------------------------------------------------------------------------------------------------


def fake_measure(monkeypatch: Patch, keeps: Any) -> list[int]:
    """Retention as a function of an expert's parameters; the sizes that were measured."""
    sizes: list[int] = []

    def faked(_: Prepared, __: Any, folder: Path) -> FloorFound:
        sizes.append(Checkpoint(folder).parameters)
        return kept_of(keeps(sizes[-1]), 1.0)

    monkeypatch.setattr(retaining, "measure", faked)
    return sizes


@pytest.mark.parametrize(
    ("allocation", "heads", "most", "units"),
    [  # parameters that may go, and what then stays of every layer
        ("uniform", 0, 3 * STEP, (6, 28)),
        ("global", 0, 5 * 3 * STEP, None),
        ("uniform", 3, HEADS, (3, 32)),
        ("uniform", 3, HEADS + 7 * 3 * STEP, (3, 4)),
    ],
)
def test_the_expert_that_is_measured_is_the_one_that_is_planned(
    retaining_spec: Data, tmp_path: Path, monkeypatch: Patch, allocation: str, heads: int,
    most: int, units: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Where layers differ, not quite one group of two heads of 4 more may go, as no step of the ranking is larger."""
    prepared = prepared_with(retaining_spec, tmp_path, allocation, query_heads=heads)
    total = prepared.base.checkpoint.parameters
    most += 0 if units else 24 * (16 + 8) - 1
    sizes = fake_measure(monkeypatch, lambda size: 0.95 if total - size <= most else 0.1)
    plan = plan_of(prepared, silent)
    assert plan.parameters.after in sizes
    assert 0 < total - plan.parameters.after <= most
    assert units is None or {(len(kept.query_heads), len(kept.ffn)) for kept in plan.kept} == {units}


def test_a_floor_that_no_cut_holds(retaining_spec: Data, tmp_path: Path, monkeypatch: Patch) -> None:
    sizes = fake_measure(monkeypatch, lambda size: 0.7 + 1e-6 * (size % 7))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(retaining_spec))
    message = call("build", tmp_path / "tiny.yaml", "--out", tmp_path / "expert", code=2).stderr
    assert 1 <= len(sizes) <= 3
    assert "budget.retention: no cut keeps expert 0.9; the smallest, 0.0" in message
    assert f"keeps expert {0.7 + 1e-6 * (sizes[-1] % 7):.4f}" in message
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".", "expert"))] == []


def test_where_heads_alone_are_too_much_the_error_speaks_of_them(
    retaining_spec: Data, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The smallest cut is that of the heads, which no smaller step of a width makes smaller."""
    prepared = prepared_with(retaining_spec, tmp_path, "global", query_heads=1)
    fake_measure(monkeypatch, lambda size: 0.7)
    with pytest.raises(PlanError, match=r"calibrate on more text, or cut fewer heads \(budget.query_heads\)$"):
        plan_of(prepared, silent)


def test_the_plan_of_a_floor_can_be_pruned(retaining_spec: Data, tmp_path: Path, store: Path) -> None:
    """With the real measure: the floor is low, and the plan's file says it, so that pruning calibrates as composing did."""
    spec = parse_spec(retaining_spec, "spec", tmp_path, {"budget.retention": {"expert": 0.01, "general": 0.01}})
    plan = expertprune.compose(spec)
    plan.save(tmp_path / "plan.json")
    assert plan.spec["budget"] == spec.document()["budget"]
    assert all(value >= 0.01 for value in plan.budget["ffn"].requested.found.values())
    for name, corpus in expertprune.validate(spec).corpora.items():
        profile = Profile(store / "profiles" / f"{plan.profiles[str(name)]}.safetensors")
        held = {document.digest for document in validation_documents(corpus)}
        assert set(profile.documents) == {document.digest for document in corpus.calibration} - held
    assert "kept of held-back text" in call("inspect", tmp_path / "plan.json").output
    out = expertprune.prune(tmp_path / "plan.json", tmp_path / "expert")
    assert Expert.load(out).plan.parameters == plan.parameters


# --- held-back documents --------------------------------------------------------------------------------------------


def test_a_tenth_is_held_back_or_eight_up_to_a_quarter_but_one_at_least() -> None:
    for documents, held in ((2, 1), (9, 2), (20, 5), (24, 6), (32, 8), (64, 8), (79, 8), (120, 12)):
        texts = tuple(Document(f"text {number}") for number in range(documents))
        found, shuffled = (
            validation_documents(Corpus(CorpusName.parse("language/en"), each, ())) for each in (texts, texts[::-1])
        )
        assert len(found) == held
        assert set(found) < set(texts)
        assert set(shuffled) == set(found), "the order of the corpus does not matter"


def test_documents_that_are_held_back_calibrate_nothing(retaining_spec: Data, tmp_path: Path) -> None:
    """Profiles are of `calibration`, and the repair is of `repair_batches`. One corpus holds another, and more."""
    small, large = (Path(retaining_spec["corpora"]["sources"][name]["path"]) for name in ("medical", "en"))
    large.write_text(large.read_text() + small.read_text())
    prepared = prepared_with(retaining_spec, tmp_path)
    batches = prepared.repair_batches()
    repaired = {tuple(row[:n].tolist()) for each in batches for row, n in zip(each.ids, each.lengths, strict=True)}
    profiled = {each.ids for text in prepared.calibration.values() for each in text.tokens}
    assert repaired == profiled
    held = {name: set(validation_documents(corpus)) for name, corpus in prepared.corpora.items()}
    assert [len(each) for each in held.values()] == [6, 3, 3, 3]
    of_any = set().union(*held.values())
    assert not {tuple(prepared.base.tokenizer(each.text)["input_ids"]) for each in of_any} & profiled
    for name, corpus in prepared.corpora.items():
        assert set(prepared.calibration[name].documents) == set(corpus.calibration) - of_any


def test_warnings_about_held_back_text_name_the_key_that_cuts_it(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.running.model.config.max_position_embeddings = 4
    retaining.measuring_held_back(prepared)
    assert "lower calibration.max_tokens" in caplog.text
    assert "evaluate.max_tokens" not in caplog.text


@pytest.mark.parametrize("method", ["none", "least_squares"])
def test_an_expert_is_measured_on_held_back_text(
    retaining_spec: Data, tmp_path: Path, monkeypatch: Patch, method: str
) -> None:
    """The same numbers while it is repaired, and from its folder afterwards."""
    prepared = prepared_with({**retaining_spec, "compensation": method}, tmp_path)
    tried: list[FloorFound] = []
    tokenizer, limit = prepared.base.tokenizer, prepared.spec.calibration.max_tokens

    def measuring(_: Prepared, meanwhile: Any, folder: Path) -> FloorFound:
        models = prepared.running.model, load_model(folder, torch.float32)
        expected = {}
        for name, corpus in prepared.corpora.items():
            rows = score_documents(*map(as_run, models), tokenizer, validation_documents(corpus), limit)
            expected[str(name)] = sum(row.base_bits for row in rows) / sum(row.expert_bits for row in rows)
        tried.append(measure(prepared, meanwhile, folder))
        assert dict(tried[-1].corpora) == pytest.approx(expected, rel=1e-5)
        return tried[-1]

    monkeypatch.setattr(retaining, "measure", measuring)
    with contextlib.suppress(PlanError):
        plan_of(prepared, silent)
    assert tried
    for found in tried:
        assert list(found.corpora) == CORPORA
        assert found.corpora["language/en"] != 1
