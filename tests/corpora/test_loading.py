"""Corpora: where documents come from, how they are split, and how they become batches."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from expertprune.corpora import tables
from expertprune.corpora.batches import corpus_text, make_batches
from expertprune.corpora.catalogue import catalogue_sources, find_sources, other_sources, unnamed
from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
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


def test_a_row_becomes_the_text_that_the_source_asks_for(tmp_path: Path) -> None:
    row = {"text": "die Frage", "nested": {"answers": ["erste", "zweite"]}, "count": 3, "share": 0.5, "sure": True,
           "a.b": "Punkt"}  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", [row])
    template = "{{F}}: {text}\n{nested.answers.0} {count} {share} {sure}"
    for source, expected in (({}, "die Frage"), ({"field": "nested.answers.1"}, "zweite"),
                             ({"template": template}, "{F}: die Frage\nerste 3 0.5 true"),
                             ({"field": "a.b"}, "Punkt"), ({"template": "{a.b}!"}, "Punkt!")):  # fmt: skip
        assert texts(load({"path": path, **source}).calibration) == [expected]


def test_endings_in_capitals_count_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("A.CSV", "text\neins\n"), ("N.TXT", "\ufeffeins"), ("n.md", "\ufeffeins"),
                          ("R.JSONL", '{"text": "eins"}')):  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert texts(load({"path": str(tmp_path / name)}).calibration) == ["eins"], name


def test_documents_of_several_files_count_once_and_a_text_file_is_one(tmp_path: Path) -> None:
    """Those are equal that differ in white space alone; blank ones are none."""
    first = write_rows(tmp_path / "a.jsonl", ["one two", " one  two\n", "one two three", " \n ", ""])
    second, text, own = tmp_path / "b.jsonl", tmp_path / "c.txt", tmp_path / "d.md"
    second.write_text('\n{"text": "one\\ttwo"}\n\n{"text": "One two"}\n')
    text.write_text("Übung macht\n\nden Meister.\n", encoding="utf-8")
    own.write_text("Ende gut.")
    corpus = load({"path": [first, str(second), str(text)], "evaluation": [str(own), str(own)]})
    assert texts(corpus.calibration) == ["One two", "one two", "one two three", "Übung macht\n\nden Meister.\n"]
    assert texts(corpus.evaluation) == ["Ende gut."]


ROW = {"messages": [{"role": "user", "content": "Was ist ein Gong?"}], "two": {"de": "ja", "en": "certainly"},
       "nested": {"answers": [1, [2]]}, "nothing": None, "number": 3}  # fmt: skip
ROWS = json.dumps(ROW).encode()
DAMAGED: list[tuple[str, bytes, dict[str, str], str]] = [
    ("a.jsonl", b'{"text": "a"}\nnot json\n', {}, ", line 2: not valid JSON"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "text": "c"}\n',
        {},
        ", line 2: has the key 'text' twice",
    ),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', {}, ", line 2: not a JSON object"),
    ("a.json", b'\xef\xbb\xbf [\n{"text": "a"}\n]', {}, ": a JSON array; write one object a line"),
    ("a.tsv", b"text\none\n", {}, ": .tsv files are not read; give JSONL"),
    ("a.jsonl", b'{"text": "a"}\n\n\n{"txet": "b"}\n', {}, ", line 4: has no field 'text'; did you mean 'txet'?"),
    ("a.jsonl", b'{"text": "\xff"}\n', {}, ", line 1: not UTF-8 text"),
    ("a.jsonl", b'{"text": " "}\n', {}, ": holds no document to calibrate on"),
    ("a.jsonl", b'{"text": "' + b"two " * 300, {}, ", line 1: longer than"),
    ("a.txt", b"abc \xff", {}, ": not UTF-8 text"),
    ("a.txt", b"one", {"messages": "talk"}, ": a text file has no fields"),
    ("a.md", b"one", {"template": "Recipe: {text}"}, ": a text file has no fields, and so nothing for a template"),
    (
        "a.jsonl",
        b'{"talk": [{"role": "user", "content": "?"}]}',
        {"messages": "talk"},
        ", line 1: a conversation without",
    ),
    ("a.jsonl", ROWS, {"field": "nested.answer"}, ", line 1: has no field 'nested.answer'; did you mean 'answers'?"),
    ("a.jsonl", ROWS, {"field": "messages"}, "is a list, not text; name a field inside it, such as messages.0.content"),
    ("a.jsonl", ROWS, {"template": "{two}"}, "'two' is a mapping, not text; name a field inside it, such as two.en"),
    ("a.jsonl", ROWS, {"template": "{nested.answers}"}, "is a list, not text; name a field that holds text"),
    ("a.jsonl", ROWS, {"field": "nothing"}, "field 'nothing' is null, not text; name a field that holds text"),
    ("a.jsonl", ROWS, {"field": "number"}, "is a number, not text; template: '{number}' would write it as text"),
    ("a.jsonl", ROWS, {"template": "{}"}, ", line 1: has no field ''"),
    ("a.jsonl", ROWS, {"template": "{text"}, "template '{text': expected '}'"),
    ("a.jsonl", ROWS, {"template": "{number:>9}"}, "number: formats, such as '>9' here, are not supported"),
    ("a.csv", b"text\none\ntwo,three\n", {}, ", line 3: has more fields than the header"),
    ("a.csv", b'text\n"one\n', {}, ", line 1: not CSV: unexpected end of data"),
    ("a.csv", b"text\n\xff\n", {}, ": not UTF-8 text"),
    ("a.csv", b"text,text\none,two\n", {}, ", line 1: two columns are named 'text'"),
    ("a.csv", b"text\none\n" + b"two " * 300, {}, ", line 3: longer than"),
    ("a.csv", b'text\n"one\n' + b"two\n" * 300 + b'"', {}, "not CSV: field larger than field limit"),
    ("a.parquet", b"PAR1 and no more", {}, ": not a parquet file"),
]


@pytest.mark.parametrize(("name", "content", "source", "words"), DAMAGED, ids=[each[-1] for each in DAMAGED])
def test_a_malformed_file_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, source: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(tables, "LONGEST", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = problems_of({"path": str(path), **source})
    assert f"{path}{words}" in problem if words[0] in ":," else words in problem


def test_a_table_with_many_columns_is_read_at_once(tmp_path: Path) -> None:
    """Its names are compared by hashing: each against each takes minutes."""
    path = tmp_path / "wide.csv"
    path.write_text(",".join(["text", *map(str, range(100_000))]) + "\none" + "," * 100_000 + "\n")
    started = time.monotonic()
    assert texts(load({"path": str(path)}).calibration) == ["one"]
    assert time.monotonic() - started < 20


def test_questions_are_read_and_a_malformed_one_names_file_and_line(tmp_path: Path) -> None:
    good = {"question": "2 + 2?", "choices": ["3", 4], "answer": 1, "language": "en"}
    questions = write_rows(tmp_path / "q.jsonl", [good])
    source = {"path": write_rows(tmp_path / "a.jsonl", many(3)), "questions": questions}
    assert load(source).questions == (Question("2 + 2?", ("3", "4"), 1),)
    for key in ("path", "evaluation", "questions"):
        absent = str(tmp_path / "absent.jsonl")
        assert problems_of({**source, key: absent}) == [f"corpora.sources.language/de.{key}: {absent}: no such file"]
    for bad, words in (
        ({**good, "answer": 2}, "'answer' must be the index"),
        ({**good, "answer": -1}, "'answer' must be the index"),
        ({**good, "choices": ["a"], "answer": 0}, "a question needs two choices or more"),
        ({**good, "choices": ["a", " "]}, "a choice is empty"),
        ({**good, "choices": ["a", "b", "a "]}, "two choices are the same"),
        ({**good, "question": " "}, "the question is empty"),
        ({**good, "choices": ["a", ["b"]]}, "field 'choices.1' is a list, not text; name a field"),
        ({"question": "?", "choice": ["a"]}, "has no field 'choices'; did you mean 'choice'?"),
    ):
        write_rows(tmp_path / "q.jsonl", [good, bad])
        (problem,) = problems_of(source)
        assert problem.startswith(f"corpora.sources.language/de.questions: {questions}, line 2: {words}")


# --- splitting ------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_by_digest_however_the_corpus_grows_and_none_of_it_calibrates(tmp_path: Path) -> None:
    documents = many(200)
    expected = [text for text in documents if held_out(text)]
    assert 10 <= len(expected) <= 30
    random.Random(0).shuffle(documents)
    paths = [write_rows(tmp_path / "b.jsonl", documents[:70]), write_rows(tmp_path / "c.jsonl", documents[70:])]
    for limit, seed in ((64, 0), (2, 5)):
        settings = {"calibration": {"documents": 999, "seed": seed}, "evaluate": {"documents": limit}}
        corpus = load({"path": paths}, **settings)
        assert corpus.set_aside
        assert len(corpus.evaluation) == min(limit, len(expected))
        assert set(texts(corpus.evaluation)) <= set(expected)
        assert texts(corpus.calibration) == sorted(set(documents) - set(expected))


def test_a_small_corpus_without_such_a_digest_holds_out_one_document_unless_it_is_the_only_one(tmp_path: Path) -> None:
    documents = [text for text in many(40) if not held_out(text)][:4]
    expected = min(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    corpus = load_rows(tmp_path, documents)
    assert texts(corpus.evaluation) == [expected]
    assert texts(corpus.calibration) == sorted(set(documents) - {expected})
    for text in (documents[0], next(filter(held_out, many(100)))):
        corpus = load_rows(tmp_path, [text])
        assert (texts(corpus.calibration), corpus.evaluation) == ([text], ())


def test_a_small_corpus_of_such_digests_alone_keeps_a_document_to_calibrate_on(tmp_path: Path) -> None:
    some = [text for text in many(60) if held_out(text)][:2]
    corpus = load_rows(tmp_path, some)
    assert texts([*corpus.calibration, *corpus.evaluation]) == some
    assert len(corpus.calibration) == 1


def test_with_an_evaluation_split_nothing_is_held_out_and_the_seed_chooses_within_the_limit(tmp_path: Path) -> None:
    documents, own = many(40), many(40, start=1000)
    whole = load_rows(tmp_path, documents, own)
    assert not whole.set_aside
    assert (texts(whole.calibration), texts(whole.evaluation)) == (sorted(documents), sorted(own))

    def chosen(rows: list[str], seed: int, limit: int = 7) -> tuple[Document, ...]:
        settings = {"calibration": {"documents": limit, "seed": seed}, "evaluate": {"documents": 9}}
        corpus = load_rows(tmp_path, rows, own, **settings)
        assert (len(corpus.calibration), len(corpus.evaluation)) == (limit, 9)
        assert set(corpus.evaluation) < set(whole.evaluation)
        return corpus.calibration

    assert chosen(documents, 0) == chosen(documents[::-1], 0)
    assert len({frozenset(chosen(documents, seed)) for seed in range(5)}) == 5
    assert set(chosen(documents, 0)) < set(chosen(documents, 0, 20)) < set(whole.calibration)
    measured = [
        load_rows(tmp_path, documents, own, calibration={"seed": seed}, evaluate={"documents": 9}).evaluation
        for seed in range(3)
    ]
    assert measured[0] == measured[1] == measured[2], "the seed is of what calibrates alone"


# --- names and catalogues -------------------------------------------------------------------------------------------


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
    dimensions = {"language": "de", "domain": "medical"}
    spec = make_spec(catalogue.parent, dimensions=dimensions, general="general", corpora="mine")
    corpora = {str(name): corpus for name, corpus in load_corpora(spec).items()}
    assert [*corpora] == ["language/de", "domain/medical", "general/general"]
    for name, corpus in corpora.items():
        assert str(corpus.name) == name
        assert all(d.text.startswith(name.partition("/")[2]) for d in corpus.calibration)
    assert len(corpora["language/de"].questions) == 1
    assert len(corpora["general/general"].evaluation) == 20
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


def test_other_corpora_are_those_that_the_spec_does_not_name_and_calibrate_nothing() -> None:
    spec = make_spec(evaluate={"others": ["math", "language/zh"]})
    found = {str(corpus.name): corpus for corpus in load_others(spec)}
    assert [*found] == ["other/math", "other/language/zh"]
    assert [(len(corpus.calibration), len(corpus.evaluation)) for corpus in found.values()] == [(0, 8)] * 2
    assert unnamed(spec) == ["math", "software", "zh"]
    assert len(load_others(make_spec(evaluate={"others": unnamed(spec, 9)}))) == 5  # all of them ship
    for others, problem in (
        ("de", "evaluate.others: 'de' is language/de, which the spec names already: take it out"),
        ("task/math", "evaluate.others: 'task/math' is general/math, which"),  # the same files under another name
        (["zh", "language/zh"], "evaluate.others: 'language/zh' is other/zh, which"),
        ("sofware", "evaluate.others: no corpus for 'sofware'; did you mean 'software'?"),
    ):
        with pytest.raises(SpecError) as caught:
            other_sources(make_spec(general="math", evaluate={"others": others}))
        (told,) = caught.value.problems
        assert told.startswith(problem)


def test_unknown_corpora_are_named_all_at_once_with_their_nearest_name(catalogue: Path) -> None:
    dimensions = {"language": "ge", "domain": "medcal"}
    with pytest.raises(SpecError) as caught:
        find_sources(make_spec(catalogue.parent, dimensions=dimensions, general="genral", corpora="mine"))
    assert [problem.partition("; give your own documents, ")[0] for problem in caught.value.problems] == [
        "dimensions.language: no corpus for 'ge'; valid: de",
        "dimensions.domain: no corpus for 'medcal'; did you mean 'medical'?",
        "general: no corpus for 'genral'; did you mean 'general'?",
    ]


def test_a_damaged_catalogue_is_named(tmp_path: Path) -> None:
    for content, words in (
        ("language: {de: {path: a}, de: {path: b}}", "language.de: stands twice"),
        ("[]", "must be a mapping of dimensions"),
        ("langauge: {de: {path: a}}", "'langauge' must be one of language, domain, task, general"),
        ("language: [de]", "'language' must be one of"),
        ("language: {de: {paht: a}}", "language.de: unknown key 'paht'; did you mean 'path'?"),
        ("language: {de: a.jsonl}", "language.de: must be a mapping of keys and values"),
    ):
        (tmp_path / "catalogue.yaml").write_text(content)
        with pytest.raises(SpecError) as caught:
            catalogue_sources(tmp_path)
        assert str(tmp_path / "catalogue.yaml") in str(caught.value)
        assert words in str(caught.value)


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """A source of 3,000 rows in order, which datasets reads from a folder."""
    (tmp_path / "data").mkdir()
    rows = [{"question": f"question {i}", "answers": {"text": [f"answer {i}"]}} for i in range(3000)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    return {"dataset": str(tmp_path / "data"), "template": "{question}: {answers.text.0}"}


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
    numbers = [[int(each.text.rpartition(" ")[2]) for each in corpus.calibration] for corpus in (first, other)]
    assert len({*numbers[0]} & {*numbers[1]}) < 20
    for each in numbers:  # from the whole window of 2,048 rows, of which the mean is about 1,000
        assert 800 < sum(each) / 100 < 1300


def test_a_dataset_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(10**6):
            read.append(i)
            yield {"text": f"document number {i}"}

    endless = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: endless)
    load({"dataset": "owner/data", "revision": "v2"}, calibration={"documents": 12})
    assert max(read) < 2048 + 2000  # a tenth of the rows may evaluate, and 64 of them do


def test_rows_that_the_store_keeps_are_of_as_many_documents_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data set on the hub, whose rows a second run need not read again."""
    rows = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in many(300)))
    loaded: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: (loaded.append(name), rows)[1])
    found = []
    for number, (documents, seed, evaluated) in enumerate(((9, 0, 3), (9, 0, 3), (9, 0, 6), (5, 0, 6), (5, 1, 6))):
        settings = {"calibration": {"documents": documents, "seed": seed}, "evaluate": {"documents": evaluated}}
        spec = make_spec(**settings, corpora={"sources": {"language/de": {"dataset": "owner/data", "revision": "v2"}}})
        corpus = load_corpus(GERMAN, spec.corpora.sources["language/de"], spec, tmp_path / "store")
        assert (len(corpus.calibration), len(corpus.evaluation)) == (documents, evaluated), number
        found.append(corpus)
    assert found[0] == found[1]
    assert len(loaded) == 2 * 4, "both splits, but not again for the second"
    assert set(found[3].calibration) != set(found[4].calibration)


def test_what_is_wrong_with_a_dataset_names_it_with_its_split(dataset: dict[str, Any], tmp_path: Path) -> None:
    where = f"corpora.sources.language/de.dataset: dataset {dataset['dataset']!r}, split"
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "questoin"})
    assert problem == f"{where} 'train': has no field 'questoin'; did you mean 'question'?"
    (problem,) = problems_of({**dataset, "split": "trian"})
    assert problem.startswith(f"{where} 'trian': ")
    write_rows(tmp_path / "data" / "train.jsonl", [{"question": " ", "answers": {"text": [" "]}}])
    (problem,) = problems_of({"dataset": dataset["dataset"], "field": "question"})
    assert problem == f"corpora.sources.language/de.dataset: {dataset['dataset']}: holds no document to calibrate on"
    (tmp_path / "rows.pkl").write_bytes(b"")  # `datasets` of some versions would load it
    (problem,) = problems_of({"dataset": "pandas", "data_files": {"train": [str(tmp_path / "rows.pkl")]}, "field": "a"})
    assert "dataset 'pandas', split 'train': 'pandas' reads pickles, which can run any code" in problem


@settings(deadline=None, max_examples=50)
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


def test_documents_of_like_length_share_a_batch_and_those_of_one_token_are_left_out() -> None:
    batches = make_batches([[1] * length for length in (2, 9, 2, 9, 2, 9)], 27)
    assert [batch.lengths for batch in batches] == [(2, 2, 2), (9, 9, 9)]
    tokenizer = tiny_tokenizer()
    documents = tuple(map(Document, ("law", "the heart pumps", "blood", "a judge reads")))
    text = corpus_text(Corpus(GERMAN, documents, ()), tokenizer, make_spec(calibration={"max_tokens": 2}))
    assert text.documents == [documents[1], documents[3]]
    (batch,) = text.batches
    assert (batch.documents, [*map(tokenizer.decode, batch.ids)]) == ((0, 1), ["the heart", "a judge"])
