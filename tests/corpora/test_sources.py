"""Sources: conversations in every kind of file, data sets that are read once, and keys that contradict each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from expertprune.corpora import reading, tables
from expertprune.corpora.documents import Corpus, Document
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.loading import load_corpus
from expertprune.corpora.messages import Conversation, read_conversation
from expertprune.errors import SpecError
from expertprune.spec.sources import Source
from tests.corpora.test_loading import GERMAN, load, make_spec, problems_of, texts, write_rows

TALKS = [
    [{"role": "user", "content": f"Was ist {i}?"}, {"role": "assistant", "content": f"Es ist {i},\nja."}]
    for i in range(3)
]


def conversations(corpus: Corpus) -> set[str]:
    found = [document.conversation for document in corpus.calibration]
    return {each.data for each in found if each is not None}


def test_conversations_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    expected = {Conversation.of(talk).data for talk in TALKS}
    flat = [{"ask": talk[0]["content"], "say": {"it": talk[1]["content"]}, "say.so": talk[1]["content"], "id": 7}
            for talk in TALKS]  # fmt: skip
    own = write_rows(tmp_path / "own.jsonl", [{"talk": talk} for talk in TALKS])
    parquet.write_table(pyarrow.Table.from_pylist([{"talk": talk} for talk in TALKS]), tmp_path / "talks.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "flat.parquet")
    with (tmp_path / "talks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["talk", "ask", "say"], *([json.dumps(t), t[0]["content"], t[1]["content"]] for t in TALKS)])
    write_rows(tmp_path / "flat.jsonl", flat)
    talks, pairs = {"messages": "talk"}, {"prompt": "ask", "completion": "say.it"}
    dotted = {"prompt": "ask", "completion": "say.so", "generate": {}}
    for name, source in (("own.jsonl", talks), ("talks.parquet", talks), ("talks.csv", talks), ("flat.jsonl", pairs),
                         ("flat.parquet", pairs), ("flat.jsonl", dotted),
                         ("talks.csv", {"prompt": "ask", "completion": "say"})):  # fmt: skip
        read = load({"path": str(tmp_path / name), "evaluation": str(tmp_path / name), **source})
        assert conversations(read) == expected, name
    raw = load({"path": own, "evaluation": own, **talks, "documents": "raw"})
    assert texts(raw.calibration) == [f"Was ist {i}?\n\nEs ist {i},\nja." for i in range(3)]
    assert all(document.conversation is None for document in raw.calibration)


def test_a_parquet_file_is_read_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_UNPACKED", 500_000)
    monkeypatch.setattr(tables, "_RATIO", 1)
    monkeypatch.setattr(reading, "LONGEST", 1000)
    path = tmp_path / "a.parquet"
    for column, problem in (
        (pyarrow.array(["a" * 2000]), "row 1: longer than"),
        (pyarrow.array([[float("nan")]]), "row 1: text.0: nan is not a number"),
        (pyarrow.array(["ab" * 200_000] * 9), "column 'text' unpacks to"),
        (pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False), "not a parquet file"),
    ):
        parquet.write_table(pyarrow.table({"text": column}), path, use_dictionary=False, compression="zstd")
        (found,) = problems_of({"path": str(path)})
        assert problem in found


def test_what_other_columns_hold_does_not_matter(tmp_path: Path) -> None:
    """A number that is missing is NaN where pandas has written the file."""
    path, lines = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "score": [0.5, float("nan")]}), path)
    lines.write_text('{"text": "one", "score": 0.5}\n{"text": "two", "score": NaN}\n')
    for source in ({"path": str(path)}, {"dataset": "json", "data_files": str(lines)}):
        read = load(source)
        assert "two" in texts([*read.calibration, *read.evaluation])
        (found,) = problems_of({**source, "template": "{text} {score}"})
        assert "score: nan is not a number" in found


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    (found,) = problems_of({"path": str(tmp_path / "a.parquet")})
    assert found.endswith("a.parquet: two columns are named 'text'; rename one")


def test_a_part_of_a_message_that_is_no_text_is_refused(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": [{"type": "text", "text": ["Es", "ist"]}]}]
    (found,) = problems_of({"path": write_rows(tmp_path / "a.jsonl", [{"talk": talk}]), "messages": "talk"})
    assert found.endswith("a.jsonl, line 1, message 1: the text of a part is list, not text")


KEPT = {
    "texts": [Document("one"), Document("two\nlines")],
    "talks": [Document.of(read_conversation(TALKS[0], None, ""))],
}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (1, "field 'label' is a number, not text; name a field that holds text"),
        (True, "field 'label' is a boolean, not text; name a field that holds text"),
        (None, "field 'label' is null, not text; name a field that holds text"),
        ({"name": "Ada"}, "field 'label' is a mapping, not text; name a field inside it, such as label.name"),
        (["a heart", "law"], "field 'label' is a list, not text; name a field inside it, such as label.0"),
    ],
)
def test_an_answer_that_is_no_text_is_named_by_its_field(tmp_path: Path, answer: Any, problem: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"ask": "what", "label": answer}])
    source = {"path": path, "prompt": "ask", "completion": "label"}
    assert problems_of(source) == [f"corpora.sources.language/de.path: {path}, line 1: {problem}"]


def test_kept_documents_come_back_or_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert KeptDocuments.load(path) is None
    KeptDocuments({"revision": "1"}, {name: KEPT[name] for name in ("talks", "texts")}).save(path)
    read, whole = KeptDocuments.load(path), path.read_bytes()
    assert read is not None
    assert (read.about, dict(read.splits)) == ({"revision": "1"}, KEPT)
    for old, new in ((b'"splits"', b'"parts"'), (b'"texts"]', b'"texts", 3]'), (b'"text": "one"', b'"text": 1'),
                     (b'"two', b"\xff"), (b'"split": "talks"', b'"split": "x"'), (b'"role"', b'"rule"'),
                     (b'"tools": null', b'"tools": 3'), (b"}\n", b"\n")):  # fmt: skip
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        assert KeptDocuments.load(path) is None, old


def test_keys_that_contradict_each_other_are_one_line() -> None:
    for source, problem in (
        ({"messages": "a", "field": "b"}, "give 'field' or 'messages', not both"),
        ({"completion": "a"}, "give 'prompt' with 'completion'"),
        ({"prompt": "a"}, "give 'completion' with 'prompt', or 'generate' with from: prompts"),
        ({"generate": {}}, "generate.from: prompts needs 'messages' or 'prompt'"),
        ({"messages": "a", "generate": {}, "documents": "raw"}, "does not go with 'raw'"),
        ({"data_files": "a.csv"}, "data_files does not go with 'path'"),
    ):
        with pytest.raises(SpecError) as caught:
            make_spec(corpora={"sources": {"de": {"path": "x.jsonl", **source}}})
        (line,) = caught.value.problems
        assert problem in line


# --- data sets ------------------------------------------------------------------------------------------------------


def test_files_of_a_data_set_are_found_beside_the_spec(tmp_path: Path) -> None:
    write_rows(tmp_path / "one.jsonl", [{"talk": talk} for talk in TALKS[:2]])
    write_rows(tmp_path / "two.jsonl", [{"talk": talk} for talk in TALKS[2:]])
    source = {"dataset": "json", "messages": "talk", "evaluation_split": "test",
              "data_files": {"train": "*.jsonl", "test": "one.jsonl"}}  # fmt: skip
    spec = make_spec(tmp_path, corpora={"sources": {"de": source}})
    corpus = load_corpus(GERMAN, spec.corpora.sources["de"], spec, tmp_path / "store")
    assert conversations(corpus) == {Conversation.of(talk).data for talk in TALKS}
    assert len(corpus.evaluation) == 2
    assert not (tmp_path / "store").exists()  # files of this machine may change, and need no network


def test_rows_from_the_hub_are_pinned_and_kept_for_runs_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"ask": f"Was ist {i}?", "say": f"{i}"} for i in range(60))

    def load_dataset(*names: Any, **settings: Any) -> Any:
        calls.append((names, settings))
        return datasets.IterableDataset.from_generator(rows)

    class Hub:
        def dataset_info(self, name: str, timeout: float) -> Any:
            return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    source = Source.model_validate({"dataset": "owner/data", "config": "de", "prompt": "ask", "completion": "say"})
    first = load_corpus(GERMAN, source, make_spec(), tmp_path)
    assert calls == [(("owner/data", "de"), {"split": "train", "revision": "c0ffee", "streaming": True})] * 2
    assert len(first.calibration) + len(first.evaluation) == 60

    def no_network(*names: Any, **settings: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    assert load_corpus(GERMAN, source, make_spec(), tmp_path) == first
    with pytest.raises(SpecError, match=r"dataset 'owner/data', split 'train': no network; with a network, its rows"):
        load_corpus(GERMAN, source, make_spec(calibration={"seed": 1}), tmp_path)
    (kept,) = (tmp_path / "datasets").glob("*.jsonl")
    assert json.loads(kept.read_text().splitlines()[0])["about"] == {"dataset": "owner/data", "revision": "c0ffee"}
    kept.write_text("damaged")
    with pytest.raises(SpecError, match="no network"):
        load_corpus(GERMAN, source, make_spec(), tmp_path)
