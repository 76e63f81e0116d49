"""The corpora that ship are what their catalogue says: size, labels, breadth, and no leak between the splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from expertprune.corpora.catalogue import catalogue_sources
from expertprune.corpora.documents import CorpusName, Document
from expertprune.corpora.leaks import Examples, LeakGuard
from expertprune.corpora.loading import load_corpus
from expertprune.corpora.messages import Conversation
from expertprune.files import shipped
from tests.corpora.test_loading import make_spec

FOLDER = shipped("corpora")
NAMES = [
    *(f"language/{value}" for value in ("en", "de", "es", "fr", "zh")),
    *(f"domain/{value}" for value in ("medical", "legal", "finance", "software")),
    *(f"task/{value}" for value in ("qa", "summarization", "math", "sentiment")),
]
GENERAL = "general/general"
CHAT = ["domain/medical-chat", "domain/software-chat", "general/chat"]
SPLITS = ("calibration", "evaluation")
KINDS = {"prose": 60, "code": 43, "language": 40, "mathematics": 26, "dialogue": 19, "list": 16, "table": 12}
DOMAINS = {"medical", "legal", "finance", "software", "science", "history", "geography", "everyday", "arts"}
TASKS = {"qa", "summarization", "math", "sentiment", "dialogue", "prose"}


def rows(name: str, split: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_catalogue_names_every_file_of_the_folder() -> None:
    sources = catalogue_sources(FOLDER)
    assert sorted(map(str, sources)) == sorted([*NAMES, GENERAL, *CHAT])
    named = {path for source in sources.values() for path in (*source.path, *source.evaluation, source.questions)}
    assert named - {None} == {str(path) for path in FOLDER.rglob("*.jsonl")}
    assert "CC0 1.0 Universal" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*NAMES, *CHAT, GENERAL])
def test_a_shipped_corpus_is_what_the_catalogue_promises(name: str) -> None:
    """No addresses and no headings; it varies all dimensions but its own. Conversations are such that every base's
    template takes them: user and assistant in turn, and no system message.
    """
    corpus = CorpusName.parse(name)
    loaded = load_corpus(corpus, catalogue_sources(FOLDER)[corpus], make_spec(calibration={"documents": 999}))
    sizes = (len(loaded.calibration), len(loaded.evaluation), len(loaded.questions), loaded.set_aside)
    assert sizes == (*((216, 32) if name == GENERAL else (24, 8)), 120 if name == "task/qa" else 0, False)
    for row in (row for split in SPLITS for row in rows(name, split)):
        messages = row.get("messages", [])
        said = [message["content"] for message in messages] or [row["text"]]
        text, where = " ".join(said), said[0][:60]
        assert list(row)[:4] == ["messages" if name in CHAT else "text", "language", "domain", "task"], where
        assert (row["domain"] in DOMAINS, row["task"] in TASKS) == (True, True), where
        assert [each["role"] for each in messages] == ["user", "assistant"] * (len(messages) // 2), where
        assert all(each == each.strip() != "" for each in said), where
        assert not re.search(r"https?://|www\.|\S+@\S+\.\w", text), where
        assert 78 <= len(text.split()) <= 300 or row["language"] in ("zh", "ja", "th") or name in CHAT or "kind" in row
        assert corpus.is_general or row[corpus.dimension] == corpus.value.removesuffix("-chat"), where
        assert corpus.dimension in ("language", "general") or row["language"] == "en", where
    for dimension, values, least in (("domain", DOMAINS, 6), ("task", TASKS, 5)):
        if dimension != corpus.dimension:  # the evaluation split is too small for all of them
            assert {row[dimension] for row in rows(name, "calibration")} == values
            assert name in CHAT or len({row[dimension] for row in rows(name, "evaluation")}) >= least


def test_the_general_corpus_is_broad_from_its_beginning_on() -> None:
    """Whoever reads the file from its beginning gets each kind in its share, give or take a document."""
    found = rows(GENERAL, "calibration")
    for count in (24, 48, 96, len(found)):
        taken = Counter(row["kind"] for row in found[:count])
        for kind, number in KINDS.items():
            assert taken[kind] == pytest.approx(count * number / len(found), abs=int(count < len(found))), (count, kind)
    assert all((row["kind"] == "language") == (row["language"] != "en") for row in found)
    assert len({row["language"] for row in found}) == 21


def test_no_document_occurs_twice_and_no_evaluation_document_is_near_a_calibration_document_of_any_corpus() -> None:
    splits: dict[str, list[Document]] = {}
    for split in SPLITS:
        texts = [Document(row["text"]) for name in (*NAMES, GENERAL) for row in rows(name, split)]
        talks = [Document.of(Conversation.of(row["messages"])) for name in CHAT for row in rows(name, split)]
        splits[split] = [*texts, *talks]
    digests = {document.digest for documents in splits.values() for document in documents}
    assert len(digests) == sum(map(len, splits.values())) == (len(NAMES) + len(CHAT)) * (24 + 8) + 216 + 32
    guard = LeakGuard(splits["calibration"])
    altered = Document(splits["calibration"][100].text.replace(",", "") + " Indeed.")
    examples = [[each] for each in (altered, *splits["evaluation"])]
    assert guard.leaks(Examples("all", "documents", examples)) == [{0: altered}]


def test_there_are_120_different_questions_and_no_position_or_length_gives_the_answer_away() -> None:
    """A blind guess, always the same position or always the longest choice, stays near a quarter."""
    questions = rows("task/qa", "questions")
    assert len(questions) == len({row["question"].lower() for row in questions}) == 120
    for number, row in enumerate(questions, 1):
        assert len({choice.strip().lower() for choice in row["choices"]}) == len(row["choices"]) == 4, number
        assert all(choice == choice.strip() != "" for choice in row["choices"]), number
    assert {row["domain"] for row in questions} == DOMAINS
    positions = Counter(row["answer"] for row in questions)
    assert [positions[position] for position in range(4)] == pytest.approx([30] * 4, abs=6)
    longest = sum(max(row["choices"], key=len) == row["choices"][row["answer"]] for row in questions)
    assert longest <= 120 * 0.4
