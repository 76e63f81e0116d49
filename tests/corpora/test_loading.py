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

from expertprune.corpora.batches import calibration_batches, make_batches, tokenize
from expertprune.corpora.catalogue import catalogue_sources, find_sources
from expertprune.corpora.documents import Corpus, CorpusName, Document, corpus_names
from expertprune.corpora.loading import load_corpora, load_corpus
from expertprune.errors import SpecError
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Source, Spec
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
    return load_corpus(GERMAN, Source(**source), make_spec(**changes))


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
        ({"field": "body"}, "der Körper"),
        ({"field": "nested.answers.1"}, "zweite"),
        ({"template": "F: {text}\nA: {nested.answers.0} ({body})"}, "F: die Frage\nA: erste (der Körper)"),
        ({"template": "{{literal}} {count}"}, "{literal} 3"),
    ],
    ids=["text is the default", "field", "dotted field", "template of several fields", "braces and numbers"],
)
def test_a_row_becomes_the_text_that_the_source_asks_for(tmp_path: Path, source: dict[str, str], expected: str) -> None:
    row = {"text": "die Frage", "body": "der Körper", "count": 3, "nested": {"answers": ["erste", "zweite"]}}
    path = write_rows(tmp_path / "a.jsonl", [row])
    own = write_rows(tmp_path / "e.jsonl", [{**row, "text": "other", "body": "other"}])
    corpus = load({"path": path, "evaluation": own, **source})
    assert texts(corpus.calibration) == [expected]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    first.write_text("Übung macht\n\nden Meister.\n", encoding="utf-8")
    second.write_text("Ende gut.", encoding="utf-8")
    corpus = load({"path": [str(first)], "evaluation": [str(second)]})
    assert texts(corpus.calibration) == ["Übung macht\n\nden Meister.\n"]
    assert texts(corpus.evaluation) == ["Ende gut."]


def test_several_files_of_both_kinds_make_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("three", encoding="utf-8")
    paths = [write_rows(tmp_path / "a.jsonl", ["one"]), write_rows(tmp_path / "b.jsonl", ["two"])]
    own = write_rows(tmp_path / "e.jsonl", ["four"])
    corpus = load({"path": [*paths, str(tmp_path / "c.txt")], "evaluation": own})
    assert texts(corpus.calibration) == ["one", "three", "two"]


def test_documents_equal_but_for_white_space_count_once(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / "a.jsonl", ["one two", " one  two\n", "one two three"]),
        write_rows(tmp_path / "b.jsonl", ["one\ttwo", "One two"]),
    ]
    own = write_rows(tmp_path / "e.jsonl", ["four", "four ", "five"])
    corpus = load({"path": paths, "evaluation": own})
    assert texts(corpus.calibration) == ["One two", "one two", "one two three"]
    assert len(corpus.evaluation) == 2


def test_blank_lines_and_blank_documents_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n{"text": " \\n "}\n{"text": ""}\n')
    corpus = load({"path": str(path), "evaluation": write_rows(tmp_path / "e.jsonl", ["two"])})
    assert texts(corpus.calibration) == ["one"]


def test_the_digest_of_a_document_is_of_its_words() -> None:
    assert Document(" ein  Haus\n").digest == hashlib.sha256(b"ein Haus").hexdigest()


# --- reading what cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2: not a JSON object: 'not json'"),
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: not a JSON object"),
        (b'{"text": "a"}\n\n\n["b"]\n', "line 4: not a JSON object"),
        (b'{"text": "a"}\n"b"\n', "line 2: not a JSON object"),
        (b'[{"text": "a"}]\n', "line 1: not a JSON object"),
        (b'{"text": "a"}\n{"txet": "b"}\n', "line 2: has no field 'text'; did you mean 'txet'?"),
        (b'{"text": "a"}\n{"body": "b", "id": 3}\n', "line 2: has no field 'text'; valid: body, id"),
        (b'{"text": null}\n', "line 1: field 'text' is null"),
        (b'{"text": "\xff"}\n', "line 1: not UTF-8 text"),
        pytest.param(
            b'{"text": "a"}\n\n\n{"txet": "b"}\n',
            "line 4: has no field",
            id="lacks a field after blank lines",
        ),
        pytest.param(
            b'{"text": "a"}\n{"text": "b"}\n{"text": "\xff"}\n',
            "line 3: not UTF-8 text",
            id="not UTF-8 on a later line",
        ),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    (problem,) = problems_of({"path": str(path)})
    assert problem.startswith(f"{path}, {words}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"field": "bdoy"}, "has no field 'bdoy'; did you mean 'body'?"),
        ({"field": "nested.answer"}, "has no field 'nested.answer'; did you mean 'answers'?"),
        ({"field": "nested.answers.2"}, "has no field 'nested.answers.2'"),
        ({"template": "{body} {titel}"}, "has no field 'titel'; did you mean 'title'?"),
        ({"template": "{body} {}"}, "has no field ''"),
    ],
)
def test_a_missing_field_names_the_nearest_one(tmp_path: Path, source: dict[str, str], words: str) -> None:
    row = {"body": "b", "title": "t", "nested": {"answers": ["x", "y"]}}
    path = write_rows(tmp_path / "a.jsonl", [row])
    (problem,) = problems_of({"path": path, **source})
    assert problem.startswith(f"{path}, line 1: {words}")


MESSAGES = [{"role": "user", "content": "Was ist ein Gong?"}, {"role": "assistant", "content": "Ein Becken."}]


@pytest.mark.parametrize("how", ["field", "template"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (MESSAGES, "is a list, not text; name a field inside it, such as given.0.content"),
        ({"de": "ja", "en": "certainly"}, "is a mapping, not text; name a field inside it, such as given.en"),
        ([1, [2]], "is a list, not text; name a field that holds text"),
        ([], "is a list, not text; name a field that holds text"),
        (None, "is null, not text; name a field that holds text"),
    ],
)
def test_a_field_that_is_not_text_is_refused_with_what_to_name_instead(
    tmp_path: Path, how: str, value: Any, words: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"given": value}])
    (problem,) = problems_of({"path": path, how: "given" if how == "field" else "Say {given}!"})
    assert problem == f"{path}, line 1: field 'given' {words}"


@pytest.mark.parametrize(
    ("value", "kind", "written"),
    [(3, "a number", "3"), (0.5, "a number", "0.5"), (True, "a boolean", "true")],
)
def test_a_number_is_text_in_a_template_alone(tmp_path: Path, value: Any, kind: str, written: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"given": value}])
    assert texts(load({"path": path, "template": "{given}!"}).calibration) == [f"{written}!"]
    (problem,) = problems_of({"path": path, "field": "given"})
    assert problem == f"{path}, line 1: field 'given' is {kind}, not text; template: '{{given}}' would write it as text"


@pytest.mark.parametrize("template", ["Q: {text", "Q: text}", "{text"])
def test_a_malformed_template_is_the_users_mistake(tmp_path: Path, template: str) -> None:
    assert "template" in problems_of({"path": write_rows(tmp_path / "a.jsonl", ["one"]), "template": template})[0]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc \xff")
    (problem,) = problems_of({"path": str(path)})
    assert problem.startswith(f"{path}: not UTF-8 text")
    assert "byte 4" in problem


@pytest.mark.parametrize("key", ["path", "evaluation", "questions"])
def test_a_missing_file_is_named(tmp_path: Path, key: str) -> None:
    source = {"path": write_rows(tmp_path / "a.jsonl", many(3)), key: str(tmp_path / "absent.jsonl")}
    assert problems_of(source) == [f"{tmp_path / 'absent.jsonl'}: no such file"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n'])
def test_an_empty_corpus_is_named_with_its_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    (problem,) = problems_of({"path": str(path)})
    assert problem == f"corpus language/de: {path}: holds no document to calibrate on"


def test_the_problems_of_several_corpora_come_together(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    sources = {
        "de": {"path": str(tmp_path / "absent.jsonl")},
        "qa": {"path": str(broken)},
        "medical": {"path": write_rows(tmp_path / "good.jsonl", many(3))},
    }
    spec = make_spec(dimensions={"language": "de", "domain": "medical", "task": "qa"}, corpora={"sources": sources})
    with pytest.raises(SpecError) as caught:
        load_corpora(spec)
    first, second = caught.value.problems
    assert "absent.jsonl: no such file" in first
    assert "broken.jsonl, line 1" in second


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_read_beside_the_documents(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "choices": ["3", 4], "answer": 1, "language": "en"}]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    corpus = load({"path": write_rows(tmp_path / "a.jsonl", many(3)), "questions": questions})
    (question,) = corpus.questions
    assert (question.question, question.choices, question.answer) == ("2 + 2?", ("3", "4"), 1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "choices": ["a"], "answer": 1}, "'answer' must be the index"),
        ({"question": "?", "choices": ["a"], "answer": -1}, "'answer' must be the index"),
        ({"question": "?", "choices": ["a", "b"], "answer": "a"}, "'answer' must be the index"),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, "'answer' must be the index"),
        (
            {"question": "?", "choices": ["a", ["b"]], "answer": 0},
            "field 'choices.1' is a list, not text; name a field",
        ),
        ({"question": ["?"], "choices": ["a"], "answer": 0}, "field 'question' is a list, not text"),
        ({"question": "?", "choices": "ab", "answer": 0}, "'answer' must be the index"),
        ({"question": "?", "choices": [], "answer": 0}, "'answer' must be the index"),
        ({"question": "?", "choice": ["a"], "answer": 0}, "has no field 'choices'; did you mean 'choice'?"),
        ({"question": "?", "choices": ["a"]}, "has no field 'answer'"),
        ({"choices": ["a"], "answer": 0}, "has no field 'question'"),
        (["?"], "not a JSON object"),
    ],
    ids=str,
)
def test_a_malformed_question_names_file_and_line(tmp_path: Path, row: Any, words: str) -> None:
    good = {"question": "?", "choices": ["a", "b"], "answer": 1}
    questions = write_rows(tmp_path / "q.jsonl", [good, row])
    (problem,) = problems_of({"path": write_rows(tmp_path / "a.jsonl", many(3)), "questions": questions})
    assert problem.startswith(f"{questions}, line 2: {words}")


# --- splitting ------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_by_digest(tmp_path: Path) -> None:
    documents = many(200)
    expected = [text for text in documents if held_out(text)]
    assert 10 <= len(expected) <= 30
    corpus = load({"path": write_rows(tmp_path / "a.jsonl", documents)}, calibration={"documents": 1000})
    assert corpus.set_aside
    assert texts(corpus.evaluation) == sorted(expected)
    assert texts(corpus.calibration) == sorted(set(documents) - set(expected))


def test_documents_once_held_out_stay_held_out_when_the_corpus_grows_and_moves(tmp_path: Path) -> None:
    before = load({"path": write_rows(tmp_path / "a.jsonl", many(100))})
    grown = many(300)
    random.Random(0).shuffle(grown)
    paths = [write_rows(tmp_path / "b.jsonl", grown[:120]), write_rows(tmp_path / "c.jsonl", grown[120:])]
    after = load({"path": paths}, evaluate={"documents": 300}, calibration={"documents": 300, "seed": 5})
    assert before.evaluation
    assert set(before.evaluation) <= set(after.evaluation)
    assert not set(before.evaluation) & set(after.calibration)
    assert set(before.calibration) <= set(after.calibration)


def test_a_small_corpus_without_such_a_digest_holds_out_one_document(tmp_path: Path) -> None:
    documents = [text for text in many(40) if not held_out(text)][:4]
    expected = min(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    corpus = load({"path": write_rows(tmp_path / "a.jsonl", documents)})
    assert texts(corpus.evaluation) == [expected]
    assert texts(corpus.calibration) == sorted(set(documents) - {expected})


def test_the_only_document_of_a_corpus_calibrates_whatever_its_digest(tmp_path: Path) -> None:
    for number, aside in enumerate((False, True)):
        text = next(text for text in many(100) if held_out(text) == aside)
        corpus = load({"path": write_rows(tmp_path / f"{number}.jsonl", [text])})
        assert texts(corpus.calibration) == [text]
        assert corpus.evaluation == ()


def test_with_an_evaluation_split_nothing_is_held_out(tmp_path: Path) -> None:
    documents, own = many(50), many(5, start=1000)
    source = {"path": write_rows(tmp_path / "a.jsonl", documents), "evaluation": write_rows(tmp_path / "e.jsonl", own)}
    corpus = load(source)
    assert not corpus.set_aside
    assert texts(corpus.calibration) == sorted(documents)
    assert texts(corpus.evaluation) == sorted(own)


def test_documents_limits_each_split(tmp_path: Path) -> None:
    source = {
        "path": write_rows(tmp_path / "a.jsonl", many(40)),
        "evaluation": write_rows(tmp_path / "e.jsonl", many(40, start=1000)),
    }
    corpus = load(source, calibration={"documents": 7}, evaluate={"documents": 9})
    assert (len(corpus.calibration), len(corpus.evaluation)) == (7, 9)
    assert set(texts(corpus.calibration)) <= set(many(40))
    assert set(texts(corpus.evaluation)) <= set(many(40, start=1000))


def test_held_out_documents_beyond_the_limit_do_not_calibrate(tmp_path: Path) -> None:
    documents = many(200)
    corpus = load(
        {"path": write_rows(tmp_path / "a.jsonl", documents)}, calibration={"documents": 999}, evaluate={"documents": 2}
    )
    assert len(corpus.evaluation) == 2
    assert not any(held_out(document.text) for document in corpus.calibration)


def test_the_seed_chooses_and_the_order_of_the_files_does_not(tmp_path: Path) -> None:
    documents = many(60)
    path, backwards = write_rows(tmp_path / "a.jsonl", documents), write_rows(tmp_path / "b.jsonl", documents[::-1])
    own = write_rows(tmp_path / "e.jsonl", ["apart"])

    def chosen(path: str, seed: int) -> tuple[Document, ...]:
        return load({"path": path, "evaluation": own}, calibration={"documents": 10, "seed": seed}).calibration

    assert chosen(path, 0) == chosen(backwards, 0)
    assert len({frozenset(chosen(path, seed)) for seed in range(5)}) == 5


def test_a_larger_limit_adds_documents_and_keeps_the_others(tmp_path: Path) -> None:
    source = {"path": write_rows(tmp_path / "a.jsonl", many(60))}
    few = load(source, calibration={"documents": 10}).calibration
    more = load(source, calibration={"documents": 20}).calibration
    assert set(few) < set(more)


def test_the_digest_of_a_corpus_changes_with_its_calibration_documents_only(tmp_path: Path) -> None:
    own = [write_rows(tmp_path / f"e{i}.jsonl", [f"evaluation {i}"]) for i in range(2)]

    def digest(name: str, rows: list[str], evaluation: str) -> str:
        return load({"path": write_rows(tmp_path / name, rows), "evaluation": evaluation}).digest

    first = digest("a.jsonl", ["one", "two"], own[0])
    assert digest("b.jsonl", ["two", "one"], own[1]) == first
    assert digest("c.jsonl", ["one", "two!"], own[0]) != first
    assert digest("d.jsonl", ["one"], own[0]) != first


# --- names and catalogues -------------------------------------------------------------------------------------------


def test_the_name_of_a_corpus_is_read_back_from_its_text() -> None:
    for text, dimension, value, general in (
        ("language/de", "language", "de", False),
        ("general/wiki", "general", "wiki", True),
        ("general/domain/legal", "general", "domain/legal", True),  # a corpus of the catalogue, measured as general
        ("task/general", "task", "general", False),
    ):
        name = CorpusName.parse(text)
        assert (name.dimension, name.value, name.is_general, str(name)) == (dimension, value, general, text)
        assert [name.answers_to(each) for each in (text, value, dimension)] == [True, True, dimension == value]
    for text in ("de", "/de", "language/", ""):
        with pytest.raises(ValueError, match="is no name of a corpus, such as language/de"):
            CorpusName.parse(text)


def test_the_corpora_of_a_spec_come_in_the_order_of_its_dimensions() -> None:
    spec = make_spec(dimensions={"task": "qa", "language": ["fr", "de"]}, general=["general", "legal"])
    assert [str(name) for name in corpus_names(spec)] == [
        "language/fr", "language/de", "task/qa", "general/general", "general/legal",
    ]  # fmt: skip


def make_catalogue(folder: Path) -> Path:
    """A catalogue of German, medicine and a general corpus."""
    folder.mkdir()
    (folder / "texts").mkdir()
    for name in ("de", "medical", "general"):
        write_rows(folder / "texts" / f"{name}.jsonl", [f"{name} {text}" for text in many(20)])
    write_rows(folder / "texts" / "q.jsonl", [{"question": "?", "choices": ["a", "b"], "answer": 0}])
    catalogue = {
        "language": {"de": {"about": "German", "path": "texts/de.jsonl", "questions": "texts/q.jsonl"}},
        "domain": {"medical": {"path": ["texts/medical.jsonl"]}},
        "general": {"general": {"path": "texts/general.jsonl", "evaluation": "texts/general.jsonl"}},
    }
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(catalogue))
    return folder


def test_a_catalogue_folder_gives_its_sources_with_absolute_paths(tmp_path: Path) -> None:
    folder = make_catalogue(tmp_path / "mine")
    sources = {str(name): source for name, source in catalogue_sources(folder).items()}
    assert sorted(sources) == ["domain/medical", "general/general", "language/de"]
    assert sources["language/de"].path == [str(folder / "texts" / "de.jsonl")]
    assert sources["language/de"].questions == str(folder / "texts" / "q.jsonl")
    assert sources["general/general"].evaluation == [str(folder / "texts" / "general.jsonl")]


def test_corpora_are_found_in_the_specs_own_catalogue(tmp_path: Path) -> None:
    make_catalogue(tmp_path / "mine")
    spec = make_spec(tmp_path, dimensions={"language": "de", "domain": "medical"}, general="general", corpora="mine")
    corpora = {str(name): corpus for name, corpus in load_corpora(spec).items()}
    assert sorted(corpora) == ["domain/medical", "general/general", "language/de"]
    for name, corpus in corpora.items():
        assert corpus.name == name
        assert all(d.text.startswith(name.partition("/")[2]) for d in corpus.calibration)
    assert len(corpora["language/de"].questions) == 1


@pytest.mark.parametrize("keys", [["de"], ["language/de"], ["de", "language/de"]], ids=str)
def test_an_inline_source_comes_before_the_catalogue_and_the_longer_name_first(tmp_path: Path, keys: list[str]) -> None:
    make_catalogue(tmp_path / "mine")
    sources = {key: {"path": write_rows(tmp_path / f"{key.replace('/', '-')}.jsonl", [key, "x"])} for key in keys}
    spec = make_spec(tmp_path, corpora={"catalogue": "mine", "sources": sources})
    source = find_sources(spec)[GERMAN]
    assert source.path == [sources[max(keys, key=len)]["path"]]


@pytest.mark.parametrize("name", ["domain/medical", "medical"])
def test_any_corpus_of_the_catalogue_can_be_general(tmp_path: Path, name: str) -> None:
    folder = make_catalogue(tmp_path / "mine")
    spec = make_spec(tmp_path, general=name, corpora="mine")
    source = find_sources(spec)[CorpusName("general", name)]
    assert source.path == [str(folder / "texts" / "medical.jsonl")]


def test_unknown_corpora_are_named_all_at_once_with_their_nearest_name(tmp_path: Path) -> None:
    make_catalogue(tmp_path / "mine")
    spec = make_spec(
        tmp_path,
        dimensions={"language": "ge", "domain": "medcal", "task": "qa"},
        general="genral",
        corpora={"catalogue": "mine", "sources": {"german": {"path": "x.jsonl"}}},
    )
    with pytest.raises(SpecError) as caught:
        find_sources(spec)
    assert caught.value.problems == [
        "dimensions.language: no corpus for 'ge'; valid: de, german",
        "dimensions.domain: no corpus for 'medcal'; did you mean 'medical'?",
        "dimensions.task: no corpus for 'qa'; valid: german",
        "general: no corpus for 'genral'; did you mean 'general'?",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("language: [", "not valid YAML"),
        ("- language", "must be a mapping"),
        ("language: {de: {path: a}, de: {path: b}}", "language.de: stands twice"),
        ("langauge: {de: {path: a}}", "'langauge' must be one of language, domain, task, general"),
        ("language: [de]", "'language' must be one of"),
        ("language: {de: {paht: a}}", "language.de:"),
        ("language: {de: a.jsonl}", "language.de:"),
        ("language: {de: {}}", "language.de:"),
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_dataset_with_an_evaluation_split_of_its_own_reads_both_splits(dataset: dict[str, Any], split: str) -> None:
    source = {**dataset, "split": split, "evaluation_split": "test"}
    corpus = load(source, calibration={"documents": 5}, evaluate={"documents": 50})
    beginning = "question" if split == "train" else "other"
    assert len(corpus.calibration) == 5
    assert all(document.text.startswith(beginning) for document in corpus.calibration)
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


def test_the_revision_of_a_dataset_goes_with_a_dataset_only() -> None:
    with pytest.raises(ValueError, match="revision does not go with 'path'"):
        Source(path=["a.jsonl"], revision="main")


def test_what_is_wrong_with_a_dataset_names_it_with_its_split(dataset: dict[str, Any], tmp_path: Path) -> None:
    where = f"dataset {dataset['dataset']!r}, split"
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "questoin"})
    assert problem == f"{where} 'train': has no field 'questoin'; did you mean 'question'?"
    (problem,) = problems_of({**dataset, "split": "trian"})
    assert problem.startswith(f"{where} 'trian': ")
    write_rows(tmp_path / "data" / "train.jsonl", [{"question": " ", "answers": {"text": [" "]}}])
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "question"})
    assert problem == f"corpus language/de: dataset {dataset['dataset']}: holds no document to calibrate on"


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
        assert rows == len(batch.documents) == len(batch.lengths)
        assert width == max(batch.lengths)
        assert rows * width <= limit or rows == 1
        assert batch.tokens == sum(batch.lengths)
        for row, document, length in zip(batch.ids.tolist(), batch.documents, batch.lengths, strict=True):
            assert length == lengths[document]
            assert row == tokens[document] + [99] * (width - length)


def test_documents_of_like_length_share_a_batch_so_that_little_is_padded() -> None:
    tokens = [[1] * length for length in (2, 9, 2, 9, 2, 9)]
    batches = make_batches(tokens, 27)
    assert [batch.lengths for batch in batches] == [(2, 2, 2), (9, 9, 9)]


def test_tokenize_cuts_at_the_limit_and_keeps_the_order() -> None:
    ids = tokenize([Document("the heart pumps blood"), Document("law")], tiny_tokenizer(), max_tokens=3)
    vocabulary = tiny_tokenizer().get_vocab()
    assert ids == [[vocabulary["the"], vocabulary["heart"], vocabulary["pumps"]], [vocabulary["law"]]]
    assert tokenize([], tiny_tokenizer(), 3) == []


def test_documents_of_one_token_are_left_out_of_calibration_and_the_rows_still_fit() -> None:
    documents = tuple(map(Document, ("law", "the heart", "blood", "a judge reads")))
    corpus = Corpus("language/de", documents, ())
    kept, batches = calibration_batches(corpus, tiny_tokenizer(), make_spec(calibration={"tokens_per_batch": 100}))
    assert [document.text for document in kept] == ["the heart", "a judge reads"]
    vocabulary = tiny_tokenizer().get_vocab()
    for batch in batches:
        for row, document, length in zip(batch.ids.tolist(), batch.documents, batch.lengths, strict=True):
            assert row[:length] == [vocabulary[word] for word in kept[document].text.split()]


def test_a_corpus_of_nothing_but_single_tokens_is_refused() -> None:
    corpus = Corpus("language/de", (Document("law"), Document("blood")), ())
    with pytest.raises(SpecError, match="corpus language/de: every document is shorter than two tokens"):
        calibration_batches(corpus, tiny_tokenizer(), make_spec())
