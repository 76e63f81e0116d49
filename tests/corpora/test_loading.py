"""Corpora: where documents come from, how they are split, and how they become batches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from expertprune.corpora.batches import corpus_text, encode, make_batches
from expertprune.corpora.catalogue import catalogue_sources, find_sources, other_sources, unnamed
from expertprune.corpora.chat import Rendered
from expertprune.corpora.documents import Corpus, CorpusName, Document, corpus_names
from expertprune.corpora.loading import load_corpora, load_corpus, load_others
from expertprune.errors import SpecError
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from tests.tiny import tiny_tokenizer

GERMAN = CorpusName("language", "de")


def make_spec(folder: Path = Path("/nowhere"), **changes: Any) -> Spec:
    data = {"name": "small", "base": "a/b", "dimensions": {"language": "de"}, "general": [], "budget": {"ffn": 0.25}}
    return parse_spec({**data, **changes}, "my.yaml", folder)


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """A JSONL file; strings are rows with the field `text`."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: dict[str, Any], **changes: Any) -> Corpus:
    spec = make_spec(**changes, corpora={"sources": {"language/de": source}})
    return load_corpus(GERMAN, spec.corpora.sources["language/de"], spec)


def load_rows(folder: Path, rows: Iterable[Any], own: Iterable[Any] = (), **changes: Any) -> Corpus:
    """The corpus of a file, with an evaluation split of its own if there are rows for it."""
    source: dict[str, Any] = {"path": write_rows(folder / "a.jsonl", rows)}
    if own:
        source["evaluation"] = write_rows(folder / "e.jsonl", own)
    return load(source, **changes)


def problems_of(source: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(source, **changes)
    return caught.value.problems


def texts(documents: Iterable[Document]) -> list[str]:
    return sorted(document.text for document in documents)


def held_out(text: str) -> bool:
    """The split, computed apart from the source: one digest in ten."""
    return int(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), 16) % 10 == 0


def many(count: int, start: int = 0) -> list[str]:
    return [f"document number {i}" for i in range(start, start + count)]


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, "die Frage"),
        ({"field": "nested.answers.1"}, "zweite"),
        ({"template": "F: {text}\nA: {nested.answers.0} ({body})"}, "F: die Frage\nA: erste (der Körper)"),
        ({"template": "{{literal}} {count} {share} {sure}"}, "{literal} 3 0.5 true"),
    ],
)
def test_a_row_becomes_the_text_that_the_source_asks_for(tmp_path: Path, source: dict[str, str], expected: str) -> None:
    row = {"text": "die Frage", "body": "der Körper", "nested": {"answers": ["erste", "zweite"]}}
    path = write_rows(tmp_path / "a.jsonl", [{**row, "count": 3, "share": 0.5, "sure": True}])
    assert texts(load({"path": path, **source}).calibration) == [expected]


def test_a_text_file_is_one_document_and_several_files_make_one_corpus(tmp_path: Path) -> None:
    for name, text in (("c.txt", "Übung macht\n\nden Meister.\n"), ("d.md", "three"), ("e.txt", "Ende gut.")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = write_rows(tmp_path / "a.jsonl", ["one"])
    corpus = load(
        {"path": [rows, *(str(tmp_path / n) for n in ("c.txt", "d.md"))], "evaluation": str(tmp_path / "e.txt")}
    )
    assert texts(corpus.calibration) == ["one", "three", "Übung macht\n\nden Meister.\n"]
    assert texts(corpus.evaluation) == ["Ende gut."]


def test_documents_equal_but_for_white_space_count_once_and_blank_ones_are_none(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, ["one two", " one  two\n", "one two three", " \n ", ""])
    second.write_text('\n{"text": "one\\ttwo"}\n\n{"text": "One two"}\n')
    own = write_rows(tmp_path / "e.jsonl", ["four", "four ", "five"])
    corpus = load({"path": [str(first), str(second)], "evaluation": own})
    assert texts(corpus.calibration) == ["One two", "one two", "one two three"]
    assert len(corpus.evaluation) == 2
    assert Document(" ein  Haus\n").digest == hashlib.sha256(b"ein Haus").hexdigest()


# --- reading what cannot be read ------------------------------------------------------------------------------------


WANTED = "not text; name a field that holds text"
ROW = {
    "body": "b",
    "nested": {"answers": [1, [2]]},
    "messages": [{"role": "user", "content": "Was ist ein Gong?"}],
    "two": {"de": "ja", "en": "certainly"},
    "empty": [],
    "nothing": None,
    "number": 3,
    "sure": True,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\nnot json\n', ", line 2: not valid JSON"),
        (b'{"text": "a"}\n\n\n["b"]\n', ", line 4: not a JSON object"),
        (b'{"text": "a"}\n\n\n{"txet": "b"}\n', ", line 4: has no field 'text'; did you mean 'txet'?"),
        (b'{"text": "a"}\n{"body": "b", "id": 3}\n', ", line 2: has no field 'text'; valid: body, id"),
        (b'{"text": "a"}\n{"text": "b"}\n{"text": "\xff"}\n', ", line 3: not UTF-8 text"),
        (b'{"text": " "}\n', ": holds no document to calibrate on"),
        (b"abc \xff", ": not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / ("a.jsonl" if content.startswith(b"{") else "a.txt")
    path.write_bytes(content)
    (problem,) = problems_of({"path": str(path)})
    assert f"{path}{words}" in problem


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("bdoy", "has no field 'bdoy'; did you mean 'body'?"),
        ("nested.answer", "has no field 'nested.answer'; did you mean 'answers'?"),
        ("nested.answers.2", "has no field 'nested.answers.2'"),
        ("messages", "field 'messages' is a list, not text; name a field inside it, such as messages.0.content"),
        ("two", "field 'two' is a mapping, not text; name a field inside it, such as two.en"),
        ("nested.answers", f"field 'nested.answers' is a list, {WANTED}"),
        ("empty", f"field 'empty' is a list, {WANTED}"),
        ("nothing", f"field 'nothing' is null, {WANTED}"),
        ("number", "field 'number' is a number, not text; template: '{number}' would write it as text"),
        ("sure", "field 'sure' is a boolean, not text; template: '{sure}' would write it as text"),
    ],
)
def test_a_field_that_is_missing_or_no_text_is_refused_with_what_to_name_instead(
    tmp_path: Path, field: str, words: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [ROW])
    templates = [] if "template" in words else [{"template": f"Say {{{field}}}!"}]
    for source in ({"field": field}, *templates):
        (problem,) = problems_of({"path": path, **source})
        assert problem.startswith(f"corpora.sources.language/de.path: {path}, line 1: {words}")


@pytest.mark.parametrize(("template", "words"), [("{text", "template"), ("text}", "template"), ("{}", "no field ''")])
def test_a_malformed_template_is_the_users_mistake(tmp_path: Path, template: str, words: str) -> None:
    assert words in problems_of({"path": write_rows(tmp_path / "a.jsonl", ["one"]), "template": template})[0]


@pytest.mark.parametrize("key", ["path", "evaluation", "questions"])
def test_a_missing_file_is_named(tmp_path: Path, key: str) -> None:
    source = {"path": write_rows(tmp_path / "a.jsonl", many(3)), key: str(tmp_path / "absent.jsonl")}
    assert problems_of(source) == [f"corpora.sources.language/de.{key}: {tmp_path / 'absent.jsonl'}: no such file"]


def test_the_problems_of_several_corpora_come_together(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "a.jsonl", many(3))
    sources = {"de": {"path": "/absent.jsonl"}, "qa": {"path": good, "field": "b"}, "medical": {"path": good}}
    dimensions = {"language": "de", "domain": "medical", "task": "qa"}
    with pytest.raises(SpecError) as caught:
        load_corpora(make_spec(dimensions=dimensions, corpora={"sources": sources}))
    first, second = caught.value.problems
    assert first == "corpora.sources.de.path: /absent.jsonl: no such file"
    assert second.startswith(f"corpora.sources.qa.path: {good}, line 1")


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_read_beside_the_documents(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "choices": ["3", 4], "answer": 1, "language": "en"}]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    (question,) = load({"path": write_rows(tmp_path / "a.jsonl", many(3)), "questions": questions}).questions
    assert (question.question, question.choices, question.answer) == ("2 + 2?", ("3", "4"), 1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": 2}, "'answer' must be the index"),
        ({"answer": -1}, "'answer' must be the index"),
        ({"answer": True}, "'answer' must be the index"),
        ({"choices": []}, "'answer' must be the index"),
        ({"choices": ["a", ["b"]]}, "field 'choices.1' is a list, not text; name a field"),
        ({"question": ["?"]}, "field 'question' is a list, not text"),
        ({"choices": None, "choice": ["a"]}, "has no field 'choices'; did you mean 'choice'?"),
        ({"answer": None}, "has no field 'answer'"),
    ],
    ids=str,
)
def test_a_malformed_question_names_file_and_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 0}
    bad = {key: value for key, value in {**good, **row}.items() if value is not None}
    questions = write_rows(tmp_path / "q.jsonl", [good, bad])
    (problem,) = problems_of({"path": write_rows(tmp_path / "a.jsonl", many(3)), "questions": questions})
    assert problem.startswith(f"corpora.sources.language/de.questions: {questions}, line 2: {words}")


# --- splitting ------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_by_digest_and_none_of_it_calibrates(tmp_path: Path) -> None:
    documents = many(200)
    expected = [text for text in documents if held_out(text)]
    assert 10 <= len(expected) <= 30
    for limit in (64, 2):
        corpus = load_rows(tmp_path, documents, calibration={"documents": 999}, evaluate={"documents": limit})
        assert corpus.set_aside
        assert len(corpus.evaluation) == min(limit, len(expected))
        assert set(texts(corpus.evaluation)) <= set(expected)
        assert texts(corpus.calibration) == sorted(set(documents) - set(expected))


def test_documents_once_held_out_stay_held_out_when_the_corpus_grows_and_moves(tmp_path: Path) -> None:
    before = load_rows(tmp_path, many(100))
    grown = many(300)
    random.Random(0).shuffle(grown)
    paths = [write_rows(tmp_path / "b.jsonl", grown[:120]), write_rows(tmp_path / "c.jsonl", grown[120:])]
    after = load({"path": paths}, evaluate={"documents": 300}, calibration={"documents": 300, "seed": 5})
    assert before.evaluation
    assert set(before.evaluation) <= set(after.evaluation)
    assert not set(before.evaluation) & set(after.calibration)
    assert set(before.calibration) <= set(after.calibration)


def test_a_small_corpus_without_such_a_digest_holds_out_one_document_unless_it_is_the_only_one(tmp_path: Path) -> None:
    documents = [text for text in many(40) if not held_out(text)][:4]
    expected = min(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    corpus = load_rows(tmp_path, documents)
    assert texts(corpus.evaluation) == [expected]
    assert texts(corpus.calibration) == sorted(set(documents) - {expected})
    for text in (documents[0], next(filter(held_out, many(100)))):
        corpus = load_rows(tmp_path, [text])
        assert (texts(corpus.calibration), corpus.evaluation) == ([text], ())


def test_with_an_evaluation_split_nothing_is_held_out_and_each_split_has_its_limit(tmp_path: Path) -> None:
    documents, own = many(40), many(40, start=1000)
    corpus = load_rows(tmp_path, documents, own)
    assert not corpus.set_aside
    assert (texts(corpus.calibration), texts(corpus.evaluation)) == (sorted(documents), sorted(own))
    corpus = load_rows(tmp_path, documents, own, calibration={"documents": 7}, evaluate={"documents": 9})
    assert (len(corpus.calibration), len(corpus.evaluation)) == (7, 9)
    assert set(texts(corpus.calibration)) <= set(documents)
    assert set(texts(corpus.evaluation)) <= set(own)


def test_the_seed_chooses_the_order_of_the_files_does_not_and_a_larger_limit_adds(tmp_path: Path) -> None:
    def chosen(rows: list[str], seed: int, limit: int = 10) -> tuple[Document, ...]:
        return load_rows(tmp_path, rows, ["apart"], calibration={"documents": limit, "seed": seed}).calibration

    documents = many(60)
    assert chosen(documents, 0) == chosen(documents[::-1], 0)
    assert len({frozenset(chosen(documents, seed)) for seed in range(5)}) == 5
    assert set(chosen(documents, 0)) < set(chosen(documents, 0, 20))


def test_the_digest_of_a_corpus_changes_with_its_calibration_documents_only(tmp_path: Path) -> None:
    first = load_rows(tmp_path, ["one", "two"], ["evaluation"]).digest
    assert load_rows(tmp_path, ["two", "one"], ["another evaluation"]).digest == first
    assert load_rows(tmp_path, ["one", "two!"], ["evaluation"]).digest != first
    assert load_rows(tmp_path, ["one"], ["evaluation"]).digest != first


# --- names and catalogues -------------------------------------------------------------------------------------------


def test_the_name_of_a_corpus_is_read_back_from_its_text() -> None:
    for text, dimension, value in (
        ("language/de", "language", "de"),
        ("general/domain/legal", "general", "domain/legal"),  # a corpus of the catalogue, measured as general
        ("task/general", "task", "general"),
    ):
        name = CorpusName.parse(text)
        assert (name.dimension, name.value, str(name)) == (dimension, value, text)
        assert name.is_general == (dimension == "general")
        assert [name.answers_to(each) for each in (text, value, dimension)] == [True, True, False]
    for text in ("de", "/de", "language/"):
        with pytest.raises(ValueError, match="is no name of a corpus, such as language/de"):
            CorpusName.parse(text)


def test_the_corpora_of_a_spec_come_in_the_order_of_its_dimensions() -> None:
    spec = make_spec(dimensions={"task": "qa", "language": ["fr", "de"]}, general=["general", "legal"])
    assert [str(name) for name in corpus_names(spec)] == [
        "language/fr", "language/de", "task/qa", "general/general", "general/legal",
    ]  # fmt: skip


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A catalogue of German, medicine and a general corpus, in the folder `mine`."""
    folder = tmp_path / "mine"
    (folder / "texts").mkdir(parents=True)
    for name in ("de", "medical", "general"):
        write_rows(folder / "texts" / f"{name}.jsonl", [f"{name} {text}" for text in many(20)])
    write_rows(folder / "texts" / "q.jsonl", [{"question": "?", "choices": ["a", "b"], "answer": 0}])
    entries = {
        "language": {"de": {"about": "German", "path": "texts/de.jsonl", "questions": "texts/q.jsonl"}},
        "domain": {"medical": {"path": ["texts/medical.jsonl"]}},
        "general": {"general": {"path": "texts/general.jsonl", "evaluation": "texts/general.jsonl"}},
    }
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(entries))
    return folder


def test_corpora_are_found_in_the_specs_own_catalogue(catalogue: Path) -> None:
    sources = {str(name): source for name, source in catalogue_sources(catalogue).items()}
    assert sources["language/de"].path == [str(catalogue / "texts" / "de.jsonl")]
    assert sources["general/general"].evaluation == [str(catalogue / "texts" / "general.jsonl")]
    dimensions = {"language": "de", "domain": "medical"}
    spec = make_spec(catalogue.parent, dimensions=dimensions, general="general", corpora="mine")
    corpora = {str(name): corpus for name, corpus in load_corpora(spec).items()}
    assert sorted(corpora) == sorted(sources) == ["domain/medical", "general/general", "language/de"]
    for name, corpus in corpora.items():
        assert str(corpus.name) == name
        assert all(d.text.startswith(name.partition("/")[2]) for d in corpus.calibration)
    assert len(corpora["language/de"].questions) == 1
    write_rows(catalogue / "texts" / "de.jsonl", [])
    (catalogue / "texts" / "medical.jsonl").unlink()
    with pytest.raises(SpecError) as caught:
        load_corpora(spec)
    where, texts_in = catalogue / "catalogue.yaml", catalogue / "texts"
    assert caught.value.problems == [
        f"{where}: de.path: {texts_in / 'de.jsonl'}: holds no document to calibrate on",
        f"{where}: medical.path: {texts_in / 'medical.jsonl'}: no such file",
    ]
    for name in ("domain/medical", "medical"):  # any corpus can be general
        found = find_sources(make_spec(catalogue.parent, general=name, corpora="mine"))[CorpusName("general", name)]
        assert found.path == [str(catalogue / "texts" / "medical.jsonl")]


def test_an_inline_source_comes_before_the_catalogue_and_the_longer_name_first(catalogue: Path) -> None:
    for keys in (["de"], ["language/de"], ["de", "language/de"]):
        sources = {key: {"path": f"/data/{key}.jsonl"} for key in keys}
        spec = make_spec(catalogue.parent, corpora={"catalogue": "mine", "sources": sources})
        assert find_sources(spec)[GERMAN].path == [f"/data/{keys[-1]}.jsonl"]


def test_other_corpora_are_found_by_their_names_and_calibrate_nothing() -> None:
    spec = make_spec(evaluate={"others": ["math", "language/zh"]})
    found = {str(corpus.name): corpus for corpus in load_others(spec)}
    assert [*found] == ["other/math", "other/language/zh"]
    for corpus in found.values():
        assert (len(corpus.calibration), len(corpus.evaluation)) == (0, 8)
    assert {str(name) for name in load_corpora(spec)} == {"language/de"}
    assert unnamed(spec) == ["math", "software", "zh"]
    assert len(load_others(make_spec(evaluate={"others": unnamed(spec, 9)}))) == 5  # all of them ship


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ("de", "evaluate.others: 'de' is language/de, which the spec names already: take it out"),
        ("language/de", "evaluate.others: 'language/de' is language/de, which"),
        ("task/math", "evaluate.others: 'task/math' is general/math, which"),  # the same files under another name
        (["zh", "language/zh"], "evaluate.others: 'language/zh' is other/zh, which"),
        ("sofware", "evaluate.others: no corpus for 'sofware'; did you mean 'software'?"),
    ],
)
def test_other_corpora_are_those_that_the_spec_does_not_name(other: Any, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        other_sources(make_spec(general="math", evaluate={"others": other}))
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_unknown_corpora_are_named_all_at_once_with_their_nearest_name(catalogue: Path) -> None:
    spec = make_spec(
        catalogue.parent,
        dimensions={"language": "ge", "domain": "medcal", "task": "qa"},
        general="genral",
        corpora={"catalogue": "mine", "sources": {"german": {"path": "x.jsonl"}}},
    )
    with pytest.raises(SpecError) as caught:
        find_sources(spec)
    assert caught.value.problems == [
        "dimensions.language: no corpus for 'ge'; valid: de, german; give your own documents, "
        "corpora: {sources: {language/ge: {path: ge.jsonl}}}, or a few openings for the base to go on from, "
        "corpora: {sources: {language/ge: {path: ge.jsonl, generate: {from: continuation, tokens: 200k}}}}",
        "dimensions.domain: no corpus for 'medcal'; did you mean 'medical'?",
        "dimensions.task: no corpus for 'qa'; valid: german; give your own documents, "
        "corpora: {sources: {task/qa: {path: qa.jsonl}}}, or a few openings for the base to go on from, "
        "corpora: {sources: {task/qa: {path: qa.jsonl, generate: {from: continuation, tokens: 200k}}}}",
        "general: no corpus for 'genral'; did you mean 'general'?",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("language: [", "not valid YAML"),
        ("language: {de: {path: a}, de: {path: b}}", "language.de: stands twice"),
        ("langauge: {de: {path: a}}", "'langauge' must be one of language, domain, task, general"),
        ("language: [de]", "'language' must be one of"),
        ("language: {de: {paht: a}}", "language.de: unknown key 'paht'; did you mean 'path'?"),
        ("language: {de: a.jsonl}", "language.de: must be a mapping of keys and values"),
    ],
)
def test_a_damaged_catalogue_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "catalogue.yaml").write_text(content)
    with pytest.raises(SpecError) as caught:
        catalogue_sources(tmp_path)
    assert str(tmp_path / "catalogue.yaml") in str(caught.value)
    assert words in str(caught.value)


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """A source of 3,000 rows in order, and an evaluation split of 40, which datasets reads from a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, beginning, count in (("train", "question", 3000), ("test", "other", 40)):
        rows = [{"question": f"{beginning} {i}", "answers": {"text": [f"answer {i}"]}} for i in range(count)]
        write_rows(folder / f"{split}.jsonl", rows)
    return {"dataset": str(folder), "template": "{question}: {answers.text.0}"}


def numbers(documents: Iterable[Document]) -> list[int]:
    return [int(document.text.rpartition(" ")[2]) for document in documents]


def test_the_seed_chooses_among_the_rows_of_a_dataset_and_leaves_the_evaluation_alone(dataset: dict[str, Any]) -> None:
    first, again, other = (
        load(dataset, calibration={"documents": 100, "seed": seed}, evaluate={"documents": 10}) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.set_aside
    assert (len(first.calibration), len(first.evaluation)) == (100, 10)
    assert all(held_out(document.text) for document in first.evaluation)
    assert not any(held_out(document.text) for document in (*first.calibration, *other.calibration))
    assert other.evaluation == first.evaluation
    assert len({*numbers(first.calibration)} & {*numbers(other.calibration)}) < 20
    for corpus in (first, other):  # from the whole window of 2,048 rows, of which the mean is about 1,000
        assert 800 < sum(numbers(corpus.calibration)) / 100 < 1300


@pytest.mark.parametrize(("split", "beginning"), [("train", "question"), ("test", "other")])
def test_a_dataset_with_an_evaluation_split_of_its_own_reads_both_splits(
    dataset: dict[str, Any], split: str, beginning: str
) -> None:
    source = {**dataset, "split": split, "evaluation_split": "test"}
    corpus = load(source, calibration={"documents": 5}, evaluate={"documents": 50})
    assert [document.text.partition(" ")[0] for document in corpus.calibration] == [beginning] * 5
    assert texts(corpus.evaluation) == sorted(f"other {i}: answer {i}" for i in range(40))
    assert not corpus.set_aside
    assert len(load(source, calibration={"documents": 5}, evaluate={"documents": 7}).evaluation) == 7


def test_a_dataset_is_opened_as_the_source_says_and_read_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    calls: list[Any] = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(10**6):
            read.append(i)
            yield {"text": f"document number {i}"}

    def load_dataset(*names: Any, **settings: Any) -> Any:
        calls.append((names, settings))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load({"dataset": "owner/data", "config": "de", "revision": "v2"}, calibration={"documents": 12})
    assert calls == [(("owner/data", "de"), {"split": "train", "revision": "v2", "streaming": True})] * 2
    assert max(read) < 2048 + 2000  # a tenth of the rows may evaluate, and 64 of them do


def test_what_is_wrong_with_a_dataset_names_it_with_its_split(dataset: dict[str, Any], tmp_path: Path) -> None:
    where = f"corpora.sources.language/de.dataset: dataset {dataset['dataset']!r}, split"
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "questoin"})
    assert problem == f"{where} 'train': has no field 'questoin'; did you mean 'question'?"
    (problem,) = problems_of({**dataset, "split": "trian"})
    assert problem.startswith(f"{where} 'trian': ")
    write_rows(tmp_path / "data" / "train.jsonl", [{"question": " ", "answers": {"text": [" "]}}])
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "question"})
    assert problem == f"corpora.sources.language/de.dataset: {dataset['dataset']}: holds no document to calibrate on"


# --- batches --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=40), limit=st.integers(1, 40))
def test_batches_hold_every_document_once_padded_on_the_right_within_the_limit(lengths: list[int], limit: int) -> None:
    tokens = [[1 + (i * 7 + j) % 50 for j in range(length)] for i, length in enumerate(lengths)]
    batches = make_batches(tokens, limit, pad=99)
    seen = sorted(document for batch in batches for document in batch.documents)
    assert seen == [i for i, length in enumerate(lengths) if length >= 2]
    for batch in batches:
        rows, width = batch.ids.shape
        assert (rows, width) == (len(batch.documents), max(batch.lengths))
        assert rows * width <= limit or rows == 1
        assert batch.tokens == sum(batch.lengths)
        for row, document, length in zip(batch.ids.tolist(), batch.documents, batch.lengths, strict=True):
            assert length == lengths[document]
            assert row == tokens[document] + [99] * (width - length)


def test_documents_of_like_length_share_a_batch_so_that_little_is_padded() -> None:
    tokens = [[1] * length for length in (2, 9, 2, 9, 2, 9)]
    batches = make_batches(tokens, 27)
    assert [batch.lengths for batch in batches] == [(2, 2, 2), (9, 9, 9)]


def test_documents_of_one_token_are_left_out_of_calibration_and_the_rows_still_fit() -> None:
    documents = tuple(map(Document, ("law", "the heart", "blood", "a judge reads")))
    text = corpus_text(Corpus(GERMAN, documents, ()), tiny_tokenizer(), make_spec())
    kept = text.documents
    assert [document.text for document in kept] == ["the heart", "a judge reads"]
    vocabulary = tiny_tokenizer().get_vocab()
    ids = encode([Rendered("the heart pumps blood"), Rendered("law")], tiny_tokenizer(), max_tokens=3)
    assert [each.ids for each in ids] == [
        tuple(map(vocabulary.get, words.split())) for words in ("the heart pumps", "law")
    ]
    for batch in text.batches:
        for row, document, length in zip(batch.ids.tolist(), batch.documents, batch.lengths, strict=True):
            assert row[:length] == [vocabulary[word] for word in kept[document].text.split()]
    with pytest.raises(SpecError, match="every document is shorter than two tokens"):
        corpus_text(Corpus(GERMAN, (Document("law"), Document("blood")), ()), tiny_tokenizer(), make_spec())
