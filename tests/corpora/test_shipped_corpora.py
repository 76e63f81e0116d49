"""The corpora that ship are what their catalogue says: size, labels, languages, and no leak between the splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertprune.corpora.catalogue import catalogue_sources
from expertprune.corpora.documents import CorpusName, Document
from expertprune.corpora.leaks import Examples, LeakGuard
from expertprune.corpora.loading import load_corpus
from expertprune.corpora.messages import Conversation
from expertprune.files import shipped
from expertprune.spec.reading import parse_spec

FOLDER = shipped("corpora")
NAMES = [
    *(f"language/{value}" for value in ("en", "de", "es", "fr", "zh")),
    *(f"domain/{value}" for value in ("medical", "legal", "finance", "software")),
    *(f"task/{value}" for value in ("qa", "summarization", "math", "sentiment")),
    "general/general",
]
CHAT = ["domain/medical-chat", "domain/software-chat", "general/chat"]
SIZES = {"calibration": 24, "evaluation": 8}
DOMAINS = {"medical", "legal", "finance", "software", "science", "history", "geography", "everyday", "arts"}
TASKS = {"qa", "summarization", "math", "sentiment", "dialogue", "prose"}
FUNCTION_WORDS = {
    "en": "the of and to in is that it was for with as his her by this which be are from you not have but they",
    "de": "der die das und ist nicht ein eine einen mit den dem von sich auf für im zu wird auch sie er es dass",
    "es": "el la los las de y que en un una por con no se su para es como del al lo más pero este está",
    "fr": "le la les des et est une dans pas qui que du au pour sur ce il elle ne avec plus sont ou par un",
}
# Characters that are written otherwise in simplified Chinese.
TRADITIONAL = set("們這個說對時會學國來過還點開關門問長東車馬見貝話語請讓認識體樣當實發現經電機業師")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(name: str, split: str) -> list[dict[str, Any]]:
    return rows_of(FOLDER / f"{name}.{split}.jsonl")


QUESTIONS = rows_of(FOLDER / "task" / "qa.questions.jsonl")


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def chinese(text: str) -> int:
    return sum("\u4e00" <= character <= "\u9fff" for character in text)


def guess_language(text: str) -> str:
    """Chinese by its characters, the others by whose function words are most."""
    if chinese(text) > sum(character.isalpha() for character in text) / 2:
        return "zh"
    counts = Counter(words(text))
    return max(FUNCTION_WORDS, key=lambda language: sum(counts[w] for w in set(FUNCTION_WORDS[language].split())))


def test_the_catalogue_names_every_file_of_the_folder() -> None:
    sources = catalogue_sources(FOLDER)
    assert sorted(map(str, sources)) == sorted([*NAMES, *CHAT])
    named = {path for source in sources.values() for path in (*source.path, *source.evaluation, source.questions)}
    assert named - {None} == {str(path) for path in FOLDER.rglob("*.jsonl")}
    about = yaml.safe_load((FOLDER / "catalogue.yaml").read_text(encoding="utf-8"))
    assert all(entry["about"] for values in about.values() for entry in values.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_corpus_is_what_the_catalogue_promises(name: str) -> None:
    """Sizes, keys, labels and lengths; no addresses and no headings; it varies all dimensions but its own."""
    corpus = CorpusName.parse(name)
    data = {"name": "x", "base": "a/b", "dimensions": {"language": "en"}, "budget": {"ffn": 0.25}}
    loaded = load_corpus(corpus, catalogue_sources(FOLDER)[corpus], parse_spec(data, "x", Path("/nowhere")))
    assert (len(loaded.calibration), len(loaded.evaluation), loaded.set_aside) == (24, 8, False)
    assert len(loaded.questions) == (120 if name == "task/qa" else 0)
    splits = {split: rows(name, split) for split in SIZES}
    for row in [*splits["calibration"], *splits["evaluation"]]:
        text, where, language = row["text"], row["text"][:60], row["language"]
        assert list(row) == ["text", "language", "domain", "task"], where
        assert row["domain"] in DOMAINS, where
        assert row["task"] in TASKS, where
        assert text == text.strip(), where
        assert not re.search(r"https?://|www\.|\S+@\S+\.\w|^#+ ", text, re.MULTILINE), where
        assert guess_language(text) == language, where
        assert not set(text) & TRADITIONAL, where
        if language == "zh":
            assert 150 <= len(text) <= 260, where
        else:
            assert 80 <= len(text.split()) <= 150, where
            assert chinese(text) == 0, where
        assert corpus.is_general or row[corpus.dimension] == corpus.value, where
        assert corpus.dimension == "language" or language == "en", where
    for dimension, values, least in (("domain", DOMAINS, 6), ("task", TASKS, 5)):
        if dimension != corpus.dimension:  # the evaluation split is too small for all of them
            assert {row[dimension] for row in splits["calibration"]} == values
            assert len({row[dimension] for row in splits["evaluation"]}) >= least


@pytest.mark.parametrize("name", CHAT)
def test_a_shipped_corpus_of_conversations_is_what_the_catalogue_promises(name: str) -> None:
    """Every base's template takes them: user and assistant in turn, and no system message."""
    corpus = CorpusName.parse(name)
    data = {"name": "x", "base": "a/b", "dimensions": {"language": "en"}, "budget": {"ffn": 0.25}}
    loaded = load_corpus(corpus, catalogue_sources(FOLDER)[corpus], parse_spec(data, "x", Path("/nowhere")))
    assert (len(loaded.calibration), len(loaded.evaluation), loaded.set_aside) == (24, 8, False)
    for row in [each for split in SIZES for each in rows(name, split)]:
        said = [message["content"] for message in row["messages"]]
        where = said[0][:60]
        assert list(row) == ["messages", "language", "domain", "task"], where
        assert row["domain"] in DOMAINS, where
        assert row["task"] in TASKS, where
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(said) // 2), where
        assert 2 <= len(said) <= 6, where
        assert all(text == text.strip() != "" for text in said), where
        assert not re.search(r"https?://|www\.|\S+@\S+\.\w", " ".join(said)), where
        assert guess_language(" ".join(said)) == row["language"] == "en", where
        assert 35 <= len(" ".join(said).split()) <= 250, where
        assert corpus.is_general or row["domain"] == corpus.value.removesuffix("-chat"), where
    assert {row["task"] for row in rows(name, "calibration")} == TASKS
    if corpus.is_general:
        assert {row["domain"] for row in rows(name, "calibration")} == DOMAINS


def documents(split: str) -> list[Document]:
    """All documents of a split, texts and what is said in conversations."""
    texts = [row["text"] for name in NAMES for row in rows(name, split)]
    talks = [row["messages"] for name in CHAT for row in rows(name, split)]
    return [*map(Document, texts), *(Document.of(Conversation.of(talk)) for talk in talks)]


def test_no_document_occurs_twice_anywhere() -> None:
    digests = Counter(document.digest for split in SIZES for document in documents(split))
    assert len(digests) == (len(NAMES) + len(CHAT)) * (24 + 8)
    assert set(digests.values()) == {1}


def test_no_evaluation_document_is_near_a_calibration_document_of_any_corpus() -> None:
    splits = {split: documents(split) for split in SIZES}
    guard = LeakGuard(splits["calibration"])
    assert guard.leaks(Examples("all", "documents", [[each] for each in splits["evaluation"]])) == [{}]
    altered = Document(splits["calibration"][100].text.replace(",", "") + " Indeed.")
    assert guard.leaks(Examples("two", "documents", [[splits["evaluation"][0]], [altered]])) == [{1: altered}]


# --- questions ------------------------------------------------------------------------------------------------------


def test_there_are_120_different_questions_of_four_different_choices() -> None:
    assert len(QUESTIONS) == 120
    assert len({" ".join(words(row["question"])) for row in QUESTIONS}) == 120
    for number, row in enumerate(QUESTIONS, 1):
        assert list(row) == ["question", "choices", "answer", "language", "domain", "task"], number
        assert len({choice.strip().lower() for choice in row["choices"]}) == len(row["choices"]) == 4, number
        assert all(choice == choice.strip() != "" for choice in row["choices"]), number
        assert row["answer"] in range(4), number
        assert (row["language"], row["task"]) == ("en", "qa"), number
    assert {row["domain"] for row in QUESTIONS} == DOMAINS


def test_no_position_and_no_length_gives_the_answer_away() -> None:
    """A blind guess, always the same position or always the longest choice, stays near a quarter."""
    positions = Counter(row["answer"] for row in QUESTIONS)
    assert [positions[position] for position in range(4)] == pytest.approx([30] * 4, abs=6)
    longest = sum(max(row["choices"], key=len) == row["choices"][row["answer"]] for row in QUESTIONS)
    assert longest <= 120 * 0.4


def test_the_corpora_carry_their_licence() -> None:
    text = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert all(words in text for words in ("CC0 1.0 Universal", "Statement of Purpose", "Public License Fallback"))
