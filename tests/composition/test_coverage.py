"""Coverage of unseen text: intervals from printed tables, folds by hand, and promises that hold on text drawn anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import expertprune
from expertprune.artifacts.profile import Profile
from expertprune.composition.coverage import UnseenTokens, check_enough, missing_interval, rows_for
from expertprune.composition.rows import RowRanking, choose_rows, essentials
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.profiling.rows import FOLDS
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base, Spec
from expertprune.spec.values import Coverage
from tests.vocabularies import counted_profile, save_worded, worded_spec

DE = CorpusName("language", "de")
ROWS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded(tmp_path_factory.mktemp("worded") / "base")


@pytest.fixture
def base(folder: Path, store: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(folder)), store)


def spec_of(coverage: float) -> Spec:
    budget = {"vocabulary": {"coverage": coverage}}
    return parse_spec(
        {"name": "n", "base": "b", "dimensions": {"language": "de"}, "general": [], "budget": budget}, "spec", Path()
    )


def profile_of(folder: Path, documents: list[list[int]], folds: list[int]) -> Profile:
    return counted_profile(folder, "de", ROWS, documents, folds)


def alone(base: ResolvedBase) -> list[int]:
    """Tokens that need not stay and need no others: a row each."""
    must = essentials(base)
    return [
        i for i in sorted(must.vocabulary.by_id) if i not in must.ids and must.vocabulary.needs(i) <= {i, *must.ids}
    ]


# --- the interval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "low", "high"),
    [
        ([0, 0, 0], 0.0, 2.996),  # Poisson limits as printed, 95% each (Garwood, 1936): of 0, of 1, of 10
        ([0, 1, 0], 0.0513, 4.744),
        ([1] * 10, 5.425, 16.962),
        ([5, 0], 5 * 0.0513, 5 * 4.744),  # one event of five tokens: five times the limits of one
        ([5] * 10, 5 * 5.425, 5 * 16.962),
    ],
)
def test_the_interval_is_poissons_for_events_of_equal_weight(missing: list[int], low: float, high: float) -> None:
    assert missing_interval(np.array(missing, dtype=float)) == pytest.approx((low, high), rel=1e-3)


def test_tokens_that_cluster_tell_less() -> None:
    _, spread = missing_interval(np.ones(20))
    _, clustered = missing_interval(np.array([17.0, 1, 1, 1]))
    assert clustered > 1.5 * spread


# --- folds ----------------------------------------------------------------------------------------------------------


def test_a_document_is_tested_on_what_the_other_folds_chose(base: ResolvedBase, tmp_path: Path) -> None:
    """Three folds. `a` is everywhere; `b` twice in one document, and nowhere in other folds; `c` in two folds."""
    a, b, c, *_ = alone(base)
    documents, folds = [[a, a, b, b], [a, c], [a, a, a, c], [a]], [0, 1, 2, 2]
    ranking = RowRanking(spec_of(0.5), base, {DE: profile_of(tmp_path, documents, folds)})
    must = len(essentials(base).ids)
    tested = ranking.tested[DE]
    assert tested is not None
    found = tested.coverage(must + 2)
    assert (found.documents, found.tokens) == (4, 11)
    # Without fold 0, a and c are kept, and its two b are missed; without fold 1 or 2, a and b, and their c are missed.
    assert found.estimate == pytest.approx(1 - 4 / 11)
    assert tested.coverage(must).estimate == 0, "no token of the text must stay"
    assert tested.coverage(ROWS).estimate == 1
    plan = ranking.plan(essentials(base).smallest + 64)
    assert plan.why is not None
    assert {a, b, c} <= set(plan.rows.kept)
    assert plan.why.coverage == {"language/de": 1.0}
    assert plan.why.unseen["language/de"].high <= 1


def test_one_fold_leaves_nothing_to_test_on(base: ResolvedBase, tmp_path: Path) -> None:
    token = alone(base)[0]
    profile = profile_of(tmp_path, [[token] * 9, [token]], [3, 3])
    assert RowRanking(spec_of(0.5), base, {DE: profile}).tested == {DE: None}
    with pytest.raises(PlanError, match="language/de has too few documents to test on"):
        choose_rows(spec_of(0.5), base, {DE: profile})


# --- promises -------------------------------------------------------------------------------------------------------


def evenly(needed: list[int]) -> UnseenTokens:
    """Documents of one token each."""
    count = len(needed)
    return UnseenTokens(np.arange(count), np.ones(count, dtype=np.int64), np.array(needed))


def test_the_fewest_rows_that_every_corpus_can_promise() -> None:
    """Of 1,000 tokens none may be left out for 0.997 (2.996 in 1,000), one for 0.9952 (4.744 in 1,000)."""
    one, other = evenly([0] * 999 + [300]), evenly([0] * 998 + [130, 200])
    assert rows_for(0.997, {DE: one}, 128, 1024) == 320
    assert rows_for(0.9952, {DE: one}, 128, 1024) == 128
    assert rows_for(0.9952, {DE: other}, 128, 1024) == 192
    assert rows_for(0.997, {DE: other, CorpusName("task", "qa"): one}, 128, 1024) == 320


def test_a_promise_that_text_cannot_bear_names_one_that_it_can() -> None:
    tested = evenly([0] * 1000)
    with pytest.raises(PlanError) as error:
        rows_for(0.9999, {DE: tested}, 128, 1024)
    assert str(error.value).startswith(
        "budget.vocabulary: coverage: 0.9999 cannot be promised of unseen text: the 1,000 calibration tokens of "
        "language/de promise at most coverage: 0.997; give it about 30,000 tokens"
    )
    assert rows_for(0.997, {DE: tested}, 128, 1024) == 128


def test_rows_that_must_stay_may_leave_nothing_to_cut() -> None:
    with pytest.raises(PlanError, match="1,024 of 1,024 rows must be kept"):
        rows_for(0.9, {DE: evenly([0] * 1000)}, 1024, 1024)


def test_too_little_text_is_told_before_any_model_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertprune.models.running.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    data = worded_spec(folder, tmp_path / "spec", {"vocabulary": {"coverage": 0.9999}})
    with pytest.raises(PlanError, match=r"language/de promise at most coverage: 0\.9\d+; give it about 30,000 tokens"):
        expertprune.validate(parse_spec(data, "spec", tmp_path))
    check_enough(0.997, {DE: 1000})
    with pytest.raises(PlanError, match="the 998 calibration tokens"):
        check_enough(0.997, {DE: 998})


def test_what_is_promised_holds_on_documents_drawn_anew(base: ResolvedBase, tmp_path: Path) -> None:
    """Clustered Zipf text: a document repeats its own rare tokens. Coverage of the calibration text itself does not hold."""
    tokens = np.array(alone(base))
    weights = 1 / np.arange(1, len(tokens) + 1) ** 1.3
    asked, promised, covered = 0.97, [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)

        def document(generator: np.random.Generator = generator) -> list[int]:
            drawn = generator.choice(tokens, 40, p=weights / weights.sum())
            return [int(token) for token in (*drawn, *generator.choice(drawn, 20))]

        calibration = [document() for _ in range(40)]
        profile = profile_of(tmp_path, calibration, [number % FOLDS for number in range(40)])
        ranking = RowRanking(spec_of(asked), base, {DE: profile})
        unseen = [token for _ in range(400) for token in document()]
        plan = choose_rows(spec_of(asked), base, {DE: profile})
        promised.append(np.isin(unseen, plan.rows.kept).mean())
        counts = np.bincount([token for each in calibration for token in each], minlength=ROWS)
        best = np.argsort(-counts, kind="stable")
        enough = 1 + int(np.searchsorted(np.cumsum(counts[best]) / counts.sum(), asked))
        covered.append(np.isin(unseen, best[:enough]).mean())
        assert ranking.plan(plan.rows.rows).rows == plan.rows
    assert sum(each >= asked for each in promised) >= 11, promised
    assert sum(each >= asked for each in covered) <= 2, "the coverage of the calibration text promises too much"
    assert isinstance(spec_of(asked).budget.vocabulary, Coverage)
