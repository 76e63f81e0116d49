"""Which rows are kept: scores by hand, budgets met exactly, and what cannot be met refused with what can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import expertprune
from expertprune.artifacts.plan import VocabularyPlan, load_plan
from expertprune.artifacts.profile import VOCABULARY, Profile, save_profile
from expertprune.composition.rows import CorpusRows, choose_rows, essentials, padding_rows, row_scores
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.profiling.rows import FOLDS
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import METRICS, Base, Spec
from expertprune.units import KeptRows, pack_indices, unpack_indices
from tests.oracle import read_json
from tests.profiles import made_up_about
from tests.vocabularies import save_worded, tokenizer_of, worded_spec

TOKENS = 404  # of the byte-level tokenizer: 400 and four added ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_worded(tmp_path_factory.mktemp("worded") / "base")


@pytest.fixture
def base(folder: Path, store: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(folder)), store)


def spec_of(budget: Any, **changes: Any) -> Spec:
    data = {"name": "n", "base": "b", "dimensions": {"language": "de"}, "general": [], "budget": {"vocabulary": budget}}
    return parse_spec({**data, **changes}, "spec", Path())


def stored(folder: Path, name: str, count: Tensor, mass: Tensor) -> Profile:
    """One document with these tokens; `mass` is the mean probability of each row."""
    row = count.nonzero()[:, 0]
    statistics = {
        "mass": torch.cat([mass[None] * count.sum(), torch.zeros(FOLDS - 1, len(mass))]).float(),
        "fold": torch.zeros(1, dtype=torch.int64),
        "document": torch.zeros(len(row), dtype=torch.int64),
        "row": row,
        "occurrences": count[row],
    }
    about = made_up_about(name, name, [name], tokens=int(count.sum()))
    save_profile(folder / f"{name}.vocabulary.safetensors", about, statistics)
    return save_profile(folder / f"{name}.safetensors", about, {"tokens": torch.zeros(1)})


def profiles_for(
    folder: Path, spec: Spec, **rows: tuple[dict[int, int], dict[int, float]]
) -> dict[CorpusName, Profile]:
    """Profiles of made-up counts and masses, `{row: value}`, by the corpus' value."""
    found = {}
    for name in corpus_names(spec):
        count, mass = torch.zeros(512, dtype=torch.int64), torch.zeros(512)
        for row, value in rows[name.value][0].items():
            count[row] = value
        for row, share in rows[name.value][1].items():
            mass[row] = share
        found[name] = stored(folder, str(name).replace("/", "-"), count, mass)
    return found


def test_a_row_scores_frequency_plus_mass_the_largest_over_dimensions_and_general_at_its_price(tmp_path: Path) -> None:
    """de: 3 of 4 tokens are row 1; medical: 1 of 2 is row 2; the general corpus counts half. Other mass is on row 9."""
    spec = spec_of(
        {"coverage": 0.5},
        dimensions={"language": ["de", "fr"], "domain": "medical"},
        general=["general"],
        compose={"fusion": {"rows": 0.5}},
    )
    profiles = profiles_for(
        tmp_path,
        spec,
        de=({1: 3, 0: 1}, {1: 0.5, 9: 0.5}),
        fr=({3: 1}, {1: 0.25, 9: 0.75}),
        medical=({2: 1, 1: 1}, {2: 0.125, 9: 0.875}),
        general=({4: 1, 2: 1}, {2: 0.875, 9: 0.125}),
    )
    parts = {name: CorpusRows(profile.part(VOCABULARY)) for name, profile in profiles.items()}
    score, source = row_scores(spec, parts)
    # row 0: de 1/4. row 1: de 3/4 + 1/2. row 2: medical 1/2 + 1/8, general half of 1/2 + 7/8. row 3: fr 1.
    # row 4: general 1/4.
    assert score[:6].tolist() == [0.25, 1.25, 0.6875, 1.0, 0.25, 0.0]
    assert source[:5].tolist() == [0, 0, 2, 0, 2]


def kept_texts(plan: VocabularyPlan, base: ResolvedBase) -> set[str]:
    vocabulary = essentials(base).vocabulary
    return {vocabulary.by_id[index] for index in plan.rows.kept}


def test_the_most_relevant_tokens_are_kept_with_the_parts_that_build_them(base: ResolvedBase, tmp_path: Path) -> None:
    must = essentials(base)
    free = [index for index in must.vocabulary.by_id if index not in must.ids]
    by_need = sorted(free, key=lambda index: len(must.vocabulary.needs(index) - must.ids))
    wanted = by_need[-1]  # built through the most other tokens, and the only one that the corpus has
    parts = must.vocabulary.needs(wanted)
    spec = spec_of({"keep": must.smallest + 64})
    plan = choose_rows(spec, base, profiles_for(tmp_path, spec, de=({wanted: 1}, {wanted: 1.0})))
    assert len(parts - must.ids) > 2
    assert parts <= set(plan.rows.kept)
    assert plan.rows.rows == len(plan.rows.kept) == must.smallest + 64  # filled up with tokens, so none is without one
    assert must.ids <= set(plan.rows.kept)
    assert plan.why.coverage == {"language/de": 1.0}
    assert plan.why.protected["language"] >= 1
    closed = must.vocabulary.closed(plan.rows.kept)
    assert closed == set(plan.rows.kept)
    # tokens that need no other ones, and are less relevant, would fill all room
    loners = [index for index in free if must.vocabulary.needs(index) <= {index, *must.ids} and index not in parts][:64]
    assert len(loners) == 64
    counts = {wanted: 2, **dict.fromkeys(loners, 1)}
    spec = spec_of({"keep": must.smallest})
    plan = choose_rows(spec, base, profiles_for(tmp_path / "other", spec, de=(counts, {})))
    assert parts <= set(plan.rows.kept)


@pytest.mark.parametrize(("asked", "rows"), [
        ({"keep": 320}, 320), ({"keep": 321}, 384), ({"keep": 383}, 384), ({"remove": 192}, 320), ({"remove": 191}, 384),
        (0.25, 384), ("30%", 384), ({"keep": "63%"}, 320),
    ],
)  # fmt: skip
def test_rows_stay_in_multiples_of_64_whatever_way_they_are_said(
    base: ResolvedBase, tmp_path: Path, asked: Any, rows: int
) -> None:
    """Of 512 rows: a quarter less is 384; 0.3 less, 358.4, is nearer to 384 than to 320; 0.37 less, 322.6, to 320."""
    spec = spec_of(asked)
    plan = choose_rows(spec, base, profiles_for(tmp_path, spec, de=({300: 1}, {})))
    assert plan.rows.rows == rows
    assert len(plan.rows.index) == rows
    assert plan.rows.of == 512


def test_padding_takes_rows_without_tokens_first_and_then_the_least_relevant(
    base: ResolvedBase, tmp_path: Path
) -> None:
    """448 rows and 404 tokens: 44 rows of the base's 108 spare ones. Without spare ones, the last kept one again."""
    spec = spec_of({"keep": 448})
    plan = choose_rows(spec, base, profiles_for(tmp_path, spec, de=({300: 1}, {})))
    assert plan.rows.kept == tuple(range(TOKENS))
    assert plan.rows.padding == tuple(range(TOKENS, 448))


def test_padding_repeats_the_least_relevant_where_no_row_is_spare(tmp_path: Path, store: Path) -> None:
    base = resolve_base(Base(model=str(save_worded(tmp_path / "base", rows=TOKENS))), store)
    score = torch.full((TOKENS,), 0.001)
    score[7] = 0
    assert padding_rows(essentials(base), score, {5, 7, 9}, TOKENS, 5) == (7, 7)


def test_fewer_rows_than_must_be_kept_names_the_smallest_legal_number(base: ResolvedBase, tmp_path: Path) -> None:
    smallest = essentials(base).smallest
    assert 64 * 4 < smallest < TOKENS
    with pytest.raises(PlanError, match=rf"smallest legal number is {smallest}\b"):
        choose_rows(spec_of({"keep": smallest - 64}), base, {})
    spec = spec_of({"keep": smallest})
    choose_rows(spec, base, profiles_for(tmp_path, spec, de=({300: 1}, {})))


@pytest.mark.parametrize("asked", [{"keep": 512}, {"keep": 513}, {"keep": 100_000}, 0.01, {"remove": 63}])
def test_a_number_that_keeps_every_row_is_no_cut(base: ResolvedBase, asked: Any) -> None:
    with pytest.raises(PlanError, match="nothing would go: the base has 512 rows"):
        choose_rows(spec_of(asked), base, {})


def test_fewer_rows_than_tokens_is_an_error(tmp_path: Path, store: Path) -> None:
    folder = save_worded(tmp_path / "base", rows=400, pad_token_id=None)
    base = resolve_base(Base(model=str(folder)), store)
    with pytest.raises(CheckpointError, match=r"ids up to 403.*rows for 400 only"):
        choose_rows(spec_of({"keep": 320}), base, {})


def test_rows_that_disagree_with_the_config_are_an_error(tmp_path: Path, store: Path) -> None:
    folder = save_worded(tmp_path / "base")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 448}))
    with pytest.raises(
        CheckpointError, match=r"model.embed_tokens.weight is \[512, 24\], the config makes it \[448, 24\]"
    ):
        resolve_base(Base(model=str(folder)), store)


def test_a_profile_without_the_pass_says_so(base: ResolvedBase, tmp_path: Path) -> None:
    spec = spec_of({"keep": 320})
    profiles = profiles_for(tmp_path, spec, de=({300: 1}, {}))
    for path in tmp_path.glob("*.vocabulary.safetensors"):
        path.unlink()
    with pytest.raises(SpecError, match="language/de lacks the vocabulary pass"):
        choose_rows(spec, base, profiles)


@pytest.mark.parametrize(("tokens", "warned"), [(9_999, True), (10_000, False)])
def test_a_corpus_of_few_tokens_is_warned_about_with_its_count(
    base: ResolvedBase, tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: int, warned: bool
) -> None:
    spec = spec_of({"keep": 320})
    choose_rows(spec, base, profiles_for(tmp_path, spec, de=({300: tokens}, {})))
    assert any("language/de" in m and "9,999" in m for m in caplog.messages) == warned
    assert len(caplog.messages) == int(warned)


# --- from a spec to a plan ------------------------------------------------------------------------------------------


def test_a_composed_plan_says_what_is_left_and_comes_back_from_its_file(folder: Path, tmp_path: Path) -> None:
    data = worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 320}, "ffn": 0.25})
    spec = parse_spec(data, "spec", tmp_path)
    plan = expertprune.compose(spec)
    assert plan.vocabulary is not None
    # 192 rows of 24, twice: embedding and head are not tied here; and 8 of 32 neurons with three rows or columns each
    assert plan.parameters.before - plan.parameters.after == 192 * 24 * 2 + 3 * 8 * 3 * 24
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert set(plan.vocabulary.why.protected) >= {"alphabet", "special and added tokens", "language", "general"}
    assert (tmp_path / "plan.json").stat().st_size < 60_000
    german = tokenizer_of("byte_level").encode("Die Ärzte hören das Gesetz").ids
    kept = set(plan.vocabulary.rows.kept)
    assert len([index for index in german if index in kept]) > len(german) / 2


def test_parameters_count_the_rows_that_go(folder: Path, tmp_path: Path, store: Path) -> None:
    """What the rows remove, no neuron need; beyond that, neurons make up the rest."""
    total = resolve_base(Base(model=str(folder)), store).checkpoint.parameters
    rows = 192 * 24 * 2 / total
    for wanted, cut in ((rows * 0.9, False), (rows * 1.05, True)):
        data = worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 320}, "parameters": wanted})
        plan = expertprune.compose(parse_spec(data, "spec", tmp_path))
        assert plan.cuts_layers == cut
        assert plan.parameters.after <= total * (1 - wanted)
        assert plan.parameters.after >= total * (1 - wanted) - max(192 * 24 * 2, 4 * 3 * 3 * 24)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_rows_are_the_same_however_layers_are_cut(folder: Path, tmp_path: Path, allocation: str) -> None:
    changes = {"compose": {"allocation": allocation}}
    budget = {"vocabulary": {"keep": 384}, "ffn": 0.5}
    found = expertprune.compose(parse_spec(worded_spec(folder, tmp_path / "spec", budget, **changes), "spec", tmp_path))
    alone = expertprune.compose(
        parse_spec(worded_spec(folder, tmp_path / "spec", {"vocabulary": {"keep": 384}}), "spec", tmp_path)
    )
    assert found.vocabulary is not None
    assert alone.vocabulary is not None
    assert found.vocabulary.rows == alone.vocabulary.rows
    assert found.cuts_layers
    assert not alone.cuts_layers


def test_a_tokenizer_of_another_kind_is_refused_before_any_work(
    tiny_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertprune.models.running.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(
        CheckpointError, match=r"^budget\.vocabulary: .*tokenizer\.json: a WordLevel tokenizer cannot be cut"
    ):
        expertprune.build(tiny_spec, "out", overrides={"budget.vocabulary": {"keep": 64}})


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"vocabulary": 32768}, "write keep: 32768 if so many rows stay, or remove: 32768 if so many go"),
        ({"vocabulary": 0.0}, "must remove something"),
        ({"vocabulary": -5}, "a count of at least 0"),
        ({"vocabulary": 1.0}, "below 1"),
        ({"vocabulary": True}, "what stays"),
        ({"vocabulary": "many"}, "what stays"),
        ({"vocabulary": {"covers": 0.9}}, "what stays"),
        ({"vocabulary": {"coverage": 0}}, "above 0 and below 1"),
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


def test_packed_indices_come_back_and_damage_is_told() -> None:
    for indices, of in (((), 1), ((0,), 1), ((0, 7, 8, 63), 64), (tuple(range(100)), 100), ((99_999,), 100_000)):
        assert unpack_indices(pack_indices(indices, of), of) == indices
    text = pack_indices((3, 70), 71)
    for wrong, of in ((text[:-8], 71), ("!" + text, 71), (text, 63), (text, 100), (pack_indices((70,), 72), 70)):
        with pytest.raises(ValueError, match=r"bitmap|index"):
            unpack_indices(wrong, of)
    assert KeptRows(64, (3, 5), (7,)).index == (3, 5, 7)
