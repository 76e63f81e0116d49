"""Which rows are kept: scores by hand, budgets met exactly or refused, and promises that hold on text drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expertprune
from expertprune.artifacts.plan import load_plan
from expertprune.artifacts.profile import VOCABULARY, Profile, save_profile
from expertprune.composition.coverage import UnseenTokens, check_enough, missing_interval, rows_for
from expertprune.composition.rows import CorpusRows, RowRanking, choose_rows, essentials, padding_rows, row_scores
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.profiling.rows import FOLDS
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import METRICS, Base, Spec
from expertprune.units import KeptRows, pack_indices, unpack_indices
from tests.oracle import change_config
from tests.profiles import made_up_about
from tests.vocabularies import counted_profile, save_worded, tokenizer_of, worded_spec

TOKENS = 404  # of the byte-level tokenizer: 400 and four added ones
DE = CorpusName("language", "de")


def resolved(folder: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(folder)), folder.parent / "store")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ResolvedBase:
    return resolved(save_worded(tmp_path_factory.mktemp("worded") / "base"))


def spec_of(budget: Any, **changes: Any) -> Spec:
    data = {"name": "n", "base": "b", "dimensions": {"language": "de"}, "general": [], "budget": {"vocabulary": budget}}
    return parse_spec({**data, **changes}, "spec", Path())


def profile_of(folder: Path, name: str, count: dict[int, int], mass: dict[int, float]) -> Profile:
    """One document with these tokens; `mass` is the mean probability of each row."""
    total, masses = sum(count.values()), torch.zeros(FOLDS, 512)
    masses[0, list(mass)] = torch.tensor(list(mass.values())) * total
    statistics = {
        "mass": masses,
        "fold": torch.zeros(1, dtype=torch.int64),
        "document": torch.zeros(len(count), dtype=torch.int64),
        "row": torch.tensor(list(count)),
        "occurrences": torch.tensor(list(count.values())),
    }
    about = made_up_about(name, name, [name], tokens=total)
    save_profile(folder / f"{name}.vocabulary.safetensors", about, statistics)
    return save_profile(folder / f"{name}.safetensors", about, {"tokens": torch.zeros(1)})


def german(folder: Path, count: dict[int, int]) -> dict[CorpusName, Profile]:
    """The same of a model that finds every row equally probable."""
    document = [index for index, number in count.items() for _ in range(number)]
    return {DE: counted_profile(folder, "de", 512, [document], [0])}


def alone(base: ResolvedBase) -> list[int]:
    """Tokens that need not stay and need no others: a row each."""
    must = essentials(base)
    free = sorted(index for index in must.vocabulary.by_id if index not in must.ids)
    return [index for index in free if must.vocabulary.needs(index) <= {index, *must.ids}]


def test_a_row_scores_frequency_plus_mass_the_largest_over_dimensions_and_general_at_its_price(tmp_path: Path) -> None:
    """de: 3 of 4 tokens are row 1; medical: 1 of 2 is row 2; the general corpus counts half. Other mass is on row 9."""
    dimensions = {"language": ["de", "fr"], "domain": "medical"}
    compose = {"fusion": {"rows": 0.5}}
    spec = spec_of({"coverage": 0.5}, dimensions=dimensions, general=["general"], compose=compose)
    rows: dict[str, tuple[dict[int, int], dict[int, float]]] = {
        "de": ({1: 3, 0: 1}, {1: 0.5, 9: 0.5}),
        "fr": ({3: 1}, {1: 0.25, 9: 0.75}),
        "medical": ({2: 1, 1: 1}, {2: 0.125, 9: 0.875}),
        "general": ({4: 1, 2: 1}, {2: 0.875, 9: 0.125}),
    }
    profiles = {name: profile_of(tmp_path, name.value, *rows[name.value]) for name in corpus_names(spec)}
    parts = {name: CorpusRows(part) for name, each in profiles.items() if (part := each.part(VOCABULARY)) is not None}
    score, source = row_scores(spec, parts)
    # row 0: de 1/4. row 1: de 3/4 + 1/2. row 2: medical 1/2 + 1/8, general half of 1/2 + 7/8. row 3: fr 1.
    # row 4: general 1/4.
    assert score[:6].tolist() == [0.25, 1.25, 0.6875, 1.0, 0.25, 0.0]
    assert source[:5].tolist() == [0, 0, 2, 0, 2]


@pytest.mark.parametrize(
    ("rule", "score", "source"),
    [
        ("intersection", [0.75, 0.75, 0.375, 0.125], [1, 0, 2, 2]),
        ("union", [0.25, 0.25, 0.375, 0.125], [0, 2, 2, 2]),
        ("mean", [0.5, 0.375, 0.375, 0.125], [1, 0, 2, 2]),  # a mean is due to the larger score
    ],
)
def test_rows_follow_the_rule_and_the_largest_of_several_general_corpora(
    tmp_path: Path, rule: str, score: list[float], source: list[int]
) -> None:
    """Of rows 1 to 4, de has 1/4, 3/4, 0, 0; medical 3/4, 0, 1/4, 0; general half of 0, 1/2, 3/4, 1/4."""
    dimensions = {"language": "de", "domain": "medical"}
    compose = {"rule": rule, "fusion": {"rows": 0.5}}
    spec = spec_of({"coverage": 0.5}, dimensions=dimensions, general=["news", "chat"], compose=compose)
    counts = {"de": {1: 1, 2: 3}, "medical": {1: 3, 3: 1}, "news": {2: 1, 3: 1}, "chat": {3: 3, 4: 1}}
    profiles = [profile_of(tmp_path, name.value, counts[name.value], {9: 1.0}) for name in corpus_names(spec)]
    found_parts = zip(corpus_names(spec), (each.part(VOCABULARY) for each in profiles), strict=True)
    parts = {name: CorpusRows(part) for name, part in found_parts if part is not None}
    found, sources = row_scores(spec, parts)
    assert (found[1:5].tolist(), sources[1:5].tolist()) == (score, source)


def test_a_fold_that_does_not_count_takes_its_tokens_and_its_mass_along(tmp_path: Path) -> None:
    """Of fold 0, row 1 alone; of fold 2, rows 2 and 3."""
    mass = torch.zeros(FOLDS, 8)
    mass[0, 1], mass[2, 2], mass[2, 3] = 5.0, 1.0, 3.0
    statistics = {
        "mass": mass, "fold": torch.tensor([0, 2]), "document": torch.tensor([0, 1, 1]),
        "row": torch.tensor([1, 2, 3]), "occurrences": torch.tensor([6, 1, 1]),
    }  # fmt: skip
    rows = CorpusRows(save_profile(tmp_path / "p.safetensors", made_up_about(documents=["a", "b"]), statistics))
    assert rows.relevance()[:4].tolist() == pytest.approx([0, 6 / 8 + 5 / 9, 1 / 8 + 1 / 9, 1 / 8 + 3 / 9])
    assert rows.relevance(without=0)[:4].tolist() == pytest.approx([0, 0, 1 / 2 + 1 / 4, 1 / 2 + 3 / 4])
    assert rows.relevance(without=2)[:4].tolist() == pytest.approx([0, 2, 0, 0])


def test_a_document_that_lies_in_two_folds_is_tested_in_neither(base: ResolvedBase, tmp_path: Path) -> None:
    """Its other corpus has shown it to the ranking. Documents of one number are the same: 1 and 2 are in two folds."""
    a, b, *_ = alone(base)
    tokens = [[a], [b, b], [b, b, b], [a, b]]
    names = [DE, CorpusName("domain", "medical")]
    profiles = {
        name: counted_profile(tmp_path, name.value, 512, tokens, folds)
        for name, folds in zip(names, ([0, 1, 2, 2], [0, 2, 1, 2]), strict=True)
    }
    spec = spec_of({"coverage": 0.5}, dimensions={"language": "de", "domain": "medical"})
    for tested in RowRanking(spec, base, profiles).tested.values():
        assert tested is not None
        found = tested.coverage(512)
        assert (found.documents, found.tokens) == (2, 3)


def test_the_most_relevant_tokens_are_kept_with_the_parts_that_build_them(base: ResolvedBase, tmp_path: Path) -> None:
    must = essentials(base)
    free = [index for index in must.vocabulary.by_id if index not in must.ids]
    by_need = sorted(free, key=lambda index: len(must.vocabulary.needs(index) - must.ids))
    wanted = by_need[-1]  # built through the most other tokens, and the only one that the corpus has
    parts = must.vocabulary.needs(wanted)
    plan = choose_rows(spec_of({"keep": must.smallest + 64}), base, german(tmp_path, {wanted: 1}))
    assert len(parts - must.ids) > 2
    assert parts | must.ids <= set(plan.rows.kept)
    assert plan.rows.rows == len(plan.rows.kept) == must.smallest + 64  # filled up with tokens, so none is without one
    assert plan.why.coverage == {"language/de": 1.0}
    assert plan.why.protected["language"] >= 1
    assert must.vocabulary.closed(plan.rows.kept) == set(plan.rows.kept)
    # tokens that need no other ones, and are less relevant, would fill all room
    loners = [index for index in alone(base) if index not in parts][:64]
    assert len(loners) == 64
    counts = {wanted: 2, **dict.fromkeys(loners, 1)}
    plan = choose_rows(spec_of({"keep": must.smallest}), base, german(tmp_path, counts))
    assert parts <= set(plan.rows.kept)


def test_rows_stay_in_multiples_of_64_whatever_way_they_are_said(base: ResolvedBase, tmp_path: Path) -> None:
    """Of 512 rows: 0.3 less, 358.4, is nearer to 384 than to 320; 448 are 404 tokens and spare rows without one."""
    profiles = german(tmp_path, {300: 1})
    for asked, rows in (({"keep": 320}, 320), ({"keep": 321}, 384), ({"remove": 191}, 384), ("30%", 384),
                        ({"keep": "63%"}, 320), ({"keep": 448}, 448)):  # fmt: skip
        plan = choose_rows(spec_of(asked), base, profiles)
        assert plan.rows.rows == len(plan.rows.index) == rows
        assert plan.rows.of == 512
        assert plan.rows.padding == tuple(range(TOKENS, rows))
        assert rows < TOKENS or plan.rows.kept == tuple(range(TOKENS))


def test_padding_repeats_the_least_relevant_where_no_row_is_spare(tmp_path: Path) -> None:
    base = resolved(save_worded(tmp_path / "base", rows=TOKENS))
    score = torch.full((TOKENS,), 0.001)
    score[7] = 0
    assert padding_rows(essentials(base), score, {5, 7, 9}, TOKENS, 5) == (7, 7)


def test_what_cannot_be_kept_is_refused(base: ResolvedBase, tmp_path: Path) -> None:
    smallest = essentials(base).smallest
    assert 64 * 4 < smallest < TOKENS
    with pytest.raises(PlanError, match=rf"smallest legal number is {smallest}\b"):
        choose_rows(spec_of({"keep": smallest - 64}), base, {})
    profiles = german(tmp_path, {300: 1})
    choose_rows(spec_of({"keep": smallest}), base, profiles)
    for asked in ({"keep": 512}, {"keep": 100_000}, 0.01, {"remove": 63}):
        with pytest.raises(PlanError, match="nothing would go: the base has 512 rows"):
            choose_rows(spec_of(asked), base, {})
    (tmp_path / "de.vocabulary.safetensors").unlink()
    with pytest.raises(SpecError, match="language/de lacks the vocabulary pass"):
        choose_rows(spec_of({"keep": 320}), base, profiles)
    few = resolved(save_worded(tmp_path / "few", rows=400, pad_token_id=None))
    with pytest.raises(CheckpointError, match=r"ids up to 403.*rows for 400 only"):
        choose_rows(spec_of({"keep": 320}), few, {})
    change_config(few.folder, vocab_size=384)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[400, 24\], the config makes it \[384, 24\]"):
        resolved(few.folder)


def test_a_corpus_of_few_tokens_is_warned_about_with_its_count(
    base: ResolvedBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for tokens in (10_000, 9_999):
        assert caplog.messages == []
        choose_rows(spec_of({"keep": 320}), base, german(tmp_path, {300: tokens}))
    (message,) = caplog.messages
    assert "language/de" in message
    assert "9,999" in message


def test_a_composed_plan_says_what_is_left_and_comes_back_from_its_file(base: ResolvedBase, tmp_path: Path) -> None:
    def composed(allocation: str, **budget: Any) -> Any:
        data = worded_spec(base.folder, tmp_path / "spec", {"vocabulary": {"keep": 320}, **budget})
        return expertprune.compose(parse_spec({**data, "compose": {"allocation": allocation}}, "spec", tmp_path))

    plan = composed("uniform", ffn=0.25)
    # 192 rows of 24, twice: embedding and head are not tied here; and 8 of 32 neurons with three rows or columns each
    rows = 192 * 24 * 2
    assert plan.parameters.before - plan.parameters.after == rows + 3 * 8 * 3 * 24
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert set(plan.vocabulary.why.protected) >= {"alphabet", "special and added tokens", "language", "general"}
    assert (tmp_path / "plan.json").stat().st_size < 60_000
    german = tokenizer_of("byte_level").encode("Die Ärzte hören das Gesetz").ids
    kept = set(plan.vocabulary.rows.kept)
    assert len([index for index in german if index in kept]) > len(german) / 2
    # Rows are the same however layers are cut.
    others = [composed("global", ffn=0.5), composed("uniform")]
    assert [other.vocabulary.rows == plan.vocabulary.rows for other in others] == [True, True]
    assert [other.cuts_layers for other in others] == [True, False]
    # What the rows remove, no neuron need; beyond that, neurons make up the rest.
    total = base.checkpoint.parameters
    for wanted, cut in ((rows / total * 0.9, False), (rows / total * 1.05, True)):
        plan = composed("uniform", parameters=wanted)
        assert plan.cuts_layers == cut
        least = total * (1 - wanted)
        assert least - max(rows, 4 * 3 * 3 * 24) <= plan.parameters.after <= least


@pytest.mark.usefixtures("no_model")
def test_a_tokenizer_of_another_kind_is_refused_before_any_work(tiny_spec: Spec) -> None:
    words = r"^budget\.vocabulary: .*tokenizer\.json: a WordLevel tokenizer cannot be cut"
    with pytest.raises(CheckpointError, match=words):
        expertprune.build(tiny_spec, "out", overrides={"budget.vocabulary": {"keep": 64}})


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"vocabulary": 32768}, "write keep: 32768 if so many rows stay, or remove: 32768 if so many go"),
        ({"vocabulary": 0.0}, "must remove something"),
        ({"vocabulary": 1.0}, "below 1"),
        ({"vocabulary": {"covers": 0.9}}, "what stays"),
        ({"vocabulary": {"coverage": 1.0}}, "above 0 and below 1"),
        ({"vocabulary": {"coverage": 0.9}, "parameters": 0.3}, "as keep: or remove:"),
        ({"vocabulary": {"keep": 320}, "retention": {"expert": 0.9}}, "'vocabulary' or 'retention', not both"),
    ],
)
def test_a_wrong_budget_is_told(budget: dict[str, Any], said: str) -> None:
    data = {"name": "n", "base": "b", "dimensions": {"language": "de"}, "budget": budget}
    with pytest.raises(SpecError, match=said) as error:
        parse_spec(data, "spec", Path())
    assert len(error.value.problems) == 1


def test_metrics_per_token_are_refused_with_a_vocabulary_and_left_out_where_none_is_named() -> None:
    again = parse_spec(spec_of({"keep": 320}).document(), "spec", Path())
    assert again.evaluate.metrics is None
    assert again.evaluate.chosen_metrics(other_tokens=True) == ["bits_per_byte", "questions"]
    assert spec_of({"keep": 320}, evaluate={"metrics": ["questions"]}).evaluate.metrics == ["questions"]
    everything = list(METRICS)  # what a user lists is what the user wants
    for metrics, wrong in ((everything, "perplexity, kl, agreement"), (everything[:2], "perplexity")):
        with pytest.raises(SpecError, match=rf"evaluate.metrics: {wrong} cannot be measured"):
            spec_of({"keep": 320}, evaluate={"metrics": metrics})


def test_the_interval_is_poissons_for_events_of_equal_weight() -> None:
    """Poisson limits as printed, 95% each (Garwood, 1936): of 0, of 1, of 10 events, of one token or of five."""
    for events, low, high in ((0, 0.0, 2.996), (1, 0.0513, 4.744), (10, 5.425, 16.962)):
        missing = np.array([1.0] * events + [0.0] * 3)
        assert missing_interval(missing) == pytest.approx((low, high), rel=1e-3)
        assert not events or missing_interval(5 * missing) == pytest.approx((5 * low, 5 * high), rel=1e-3)
    # Tokens that cluster tell less.
    assert missing_interval(np.array([17.0, 1, 1, 1]))[1] > 1.5 * missing_interval(np.ones(20))[1]


def test_a_document_is_tested_on_what_the_other_folds_chose(base: ResolvedBase, tmp_path: Path) -> None:
    """Three folds. `a` is everywhere; `b` twice in one document, and nowhere in other folds; `c` in two folds."""
    a, b, c, *_ = alone(base)
    documents, folds = [[a, a, b, b], [a, c], [a, a, a, c], [a]], [0, 1, 2, 2]
    ranking = RowRanking(spec_of({"coverage": 0.5}), base, {DE: counted_profile(tmp_path, "de", 512, documents, folds)})
    must, tested = len(essentials(base).ids), ranking.tested[DE]
    assert tested is not None
    found = tested.coverage(must + 2)
    assert (found.documents, found.tokens) == (4, 11)
    # Without fold 0, a and c are kept, and its two b are missed; without fold 1 or 2, a and b, and their c are missed.
    assert found.estimate == pytest.approx(1 - 4 / 11)
    assert tested.coverage(must).estimate == 0, "no token of the text must stay"
    assert tested.coverage(512).estimate == 1
    plan = ranking.plan(essentials(base).smallest + 64)
    assert {a, b, c} <= set(plan.rows.kept)
    assert plan.why.coverage == {"language/de": 1.0}
    assert plan.why.unseen["language/de"].high <= 1
    # One fold leaves nothing to test on.
    profiles = {DE: counted_profile(tmp_path, "de", 512, [[a] * 9, [a]], [3, 3])}
    assert RowRanking(spec_of({"coverage": 0.5}), base, profiles).tested == {DE: None}
    with pytest.raises(PlanError, match="language/de has too few documents to test on"):
        choose_rows(spec_of({"coverage": 0.5}), base, profiles)


def evenly(needed: list[int]) -> UnseenTokens:
    """Documents of one token each."""
    count = len(needed)
    return UnseenTokens(np.arange(count), np.ones(count, dtype=np.int64), np.array(needed))


def test_the_fewest_rows_that_every_corpus_can_promise() -> None:
    """Of 1,000 tokens none may be left out for 0.997 (2.996 in 1,000), one for 0.9952 (4.744 in 1,000)."""
    one, other, none = evenly([0] * 999 + [300]), evenly([0] * 998 + [130, 200]), evenly([0] * 1000)
    assert rows_for(0.997, {DE: one}, 128, 1024) == 320
    assert rows_for(0.9952, {DE: one}, 128, 1024) == 128
    assert rows_for(0.9952, {DE: other}, 128, 1024) == 192
    assert rows_for(0.997, {DE: other, CorpusName("task", "qa"): one}, 128, 1024) == 320
    assert rows_for(0.997, {DE: none}, 128, 1024) == 128
    assert rows_for(0.997, {DE: evenly([0] * 999 + [320])}, 128, 1024) == 320, "the 320th row is one of 320"
    told = r"1,000 calibration tokens of language/de promise at most coverage: 0\.997; give it about 30,000 tokens"
    with pytest.raises(PlanError, match=f"^budget.vocabulary: coverage: 0.9999 cannot be promised .*{told}"):
        rows_for(0.9999, {DE: none}, 128, 1024)
    with pytest.raises(PlanError, match="1,024 of 1,024 rows must be kept"):
        rows_for(0.9, {DE: none}, 1024, 1024)


@pytest.mark.usefixtures("no_model")
def test_too_little_text_is_told_before_any_model_runs(base: ResolvedBase, tmp_path: Path) -> None:
    data = worded_spec(base.folder, tmp_path / "spec", {"vocabulary": {"coverage": 0.9999}})
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
        profiles = {DE: counted_profile(tmp_path, "de", 512, calibration, [number % FOLDS for number in range(40)])}
        unseen = [token for _ in range(400) for token in document()]
        plan = choose_rows(spec_of({"coverage": asked}), base, profiles)
        promised.append(np.isin(unseen, plan.rows.kept).mean())
        counts = np.bincount([token for each in calibration for token in each], minlength=512)
        best = np.argsort(-counts, kind="stable")
        enough = 1 + int(np.searchsorted(np.cumsum(counts[best]) / counts.sum(), asked))
        covered.append(np.isin(unseen, best[:enough]).mean())
    assert sum(each >= asked for each in promised) >= 11, promised
    assert sum(each >= asked for each in covered) <= 2, "the coverage of the calibration text promises too much"


def test_packed_indices_come_back_and_damage_is_told() -> None:
    for indices, of in (((), 1), ((0,), 1), ((0, 7, 8, 63), 64), (tuple(range(100)), 100), ((99_999,), 100_000)):
        assert unpack_indices(pack_indices(indices, of), of) == indices
    text = pack_indices((3, 70), 71)
    for wrong, of in ((text[:-8], 71), ("!" + text, 71), (text, 63), (text, 100), (pack_indices((70,), 72), 70)):
        with pytest.raises(ValueError, match=r"bitmap|index"):
            unpack_indices(wrong, of)
    assert KeptRows(64, (3, 5), (7,)).index == (3, 5, 7)
