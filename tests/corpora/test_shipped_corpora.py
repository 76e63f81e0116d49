"""The corpora that ship are what their catalogue says: size, labels, languages, and no leak between the splits."""

from __future__ import annotations

import json
import re
import unicodedata
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
]
GENERAL = "general/general"
CHAT = ["domain/medical-chat", "domain/software-chat", "general/chat"]
SIZES = {"calibration": 24, "evaluation": 8}
KINDS = {  # of the general corpus
    "calibration": {
        "prose": 60, "code": 43, "language": 40, "mathematics": 26, "dialogue": 19, "list": 16, "table": 12
    },
    "evaluation": {"prose": 7, "code": 5, "language": 8, "mathematics": 5, "dialogue": 4, "list": 2, "table": 1},
}  # fmt: skip
DOMAINS = {"medical", "legal", "finance", "software", "science", "history", "geography", "everyday", "arts"}
TASKS = {"qa", "summarization", "math", "sentiment", "dialogue", "prose"}
FUNCTION_WORDS = {
    "en": "the of and to in is that it was for with as his her by this which be are from you not have but they",
    "de": "der die das und ist nicht ein eine einen mit den dem von sich auf für im zu wird auch sie er es dass",
    "es": "el la los las de y que en un una por con no se su para es como del al lo más pero este está",
    "fr": "le la les des et est une dans pas qui que du au pour sur ce il elle ne avec plus sont ou par un",
    "it": "il lo la gli di che è un una per con non si sono del della nel perché come più alla dei anche",
    "pt": "o os as um uma de que não com para por se do da no na mais como é em ao dos das isso",
    "nl": "de het een en van is dat niet op te in met voor die aan er om was zijn ook maar hij je",
    "pl": "w na z nie się że jest jak od po za ale co tak już jego które przez był ale czy dla",
    "sv": "och att det som en är på för av inte med den ett om till men var så han hon från",
    "cs": "se na je že v ve s z o jak ale nebo když jsou si pro které jen už ji který před",
    "tr": "bir ve bu de da için ile ne çok daha olarak gibi sonra kadar ise o var her",
    "sw": "ya na wa kwa ni la za katika hii kama huo mti watu wake yake sana cha",
    "vi": "và của là có không một những được cho người với các này đã từ khi ra nước",
    "id": "yang dan di ke dari itu dengan untuk tidak ini pada adalah saya atau juga lebih ada",
}
SCRIPTS = {
    "ARABIC": "ar", "CJK": "zh", "CYRILLIC": "ru", "DEVANAGARI": "hi", "HANGUL": "ko", "HIRAGANA": "ja", "THAI": "th"
}  # fmt: skip
# Characters that are written otherwise in simplified Chinese.
TRADITIONAL = set("們這個說對時會學國來過還點開關門問長東車馬見貝話語請讓認識體樣當實發現經電機業師")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(name: str, split: str) -> list[dict[str, Any]]:
    return rows_of(FOLDER / f"{name}.{split}.jsonl")


QUESTIONS = rows_of(FOLDER / "task" / "qa.questions.jsonl")


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def scripts(text: str) -> Counter[str]:
    """How many characters a text has of each script."""
    return Counter(unicodedata.name(character, "?").split()[0] for character in text if not character.isascii())


def guess_language(text: str) -> str:
    """By the script, or else by whose function words are most."""
    found = scripts(text)
    if found["HIRAGANA"] > 20:
        return "ja"  # which has as many Chinese characters
    script = max(SCRIPTS, key=found.__getitem__)
    if found[script] > len(text) / 3:
        return SCRIPTS[script]
    counts = Counter(words(text))
    return max(FUNCTION_WORDS, key=lambda language: sum(counts[w] for w in set(FUNCTION_WORDS[language].split())))


def test_the_catalogue_names_every_file_of_the_folder() -> None:
    sources = catalogue_sources(FOLDER)
    assert sorted(map(str, sources)) == sorted([*NAMES, GENERAL, *CHAT])
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
            assert scripts(text)["CJK"] == 0, where
        assert row[corpus.dimension] == corpus.value, where
        assert corpus.dimension == "language" or language == "en", where
    for dimension, values, least in (("domain", DOMAINS, 6), ("task", TASKS, 5)):
        if dimension != corpus.dimension:  # the evaluation split is too small for all of them
            assert {row[dimension] for row in splits["calibration"]} == values
            assert len({row[dimension] for row in splits["evaluation"]}) >= least


# --- the general corpus ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", KINDS)
def test_the_general_corpus_is_broad(split: str) -> None:
    """Many documents of every kind, long enough to be read, in the languages that they name."""
    found = rows(GENERAL, split)
    assert Counter(row["kind"] for row in found) == KINDS[split]
    for row in found:
        text, where = row["text"], row["text"][:60]
        assert list(row) == ["text", "language", "domain", "task", "kind"], where
        assert text == text.strip(), where
        assert not re.search(r"https?://|www\.|\S+@\S+\.\w", text), where
        assert (row["kind"] == "language") == (row["language"] != "en"), where
        assert row["kind"] == "code" or guess_language(text) == row["language"], where
        assert row["language"] != "zh" or not set(text) & TRADITIONAL, where
        if row["kind"] == "code":
            assert 10 <= len(text.splitlines()) <= 65, where
        elif row["language"] in ("zh", "ja", "th"):
            assert 200 <= len(text) <= 900, where
        else:
            assert 78 <= len(text.split()) <= 300, where
    languages = Counter(row["language"] for row in found if row["kind"] == "language")
    assert set(languages) <= {*FUNCTION_WORDS, *SCRIPTS.values()} - {"en"}
    assert (len(languages), set(languages.values())) == {"calibration": (20, {2}), "evaluation": (8, {1})}[split]
    assert {row["domain"] for row in found} == DOMAINS
    assert {row["task"] for row in found} == TASKS


def test_the_first_documents_of_the_general_corpus_are_of_all_kinds() -> None:
    """Whoever reads the file from its beginning gets each kind in its share, give or take a document."""
    found = rows(GENERAL, "calibration")
    for count in (24, 48, 96):
        taken = Counter(row["kind"] for row in found[:count])
        for kind, number in KINDS["calibration"].items():
            assert taken[kind] == pytest.approx(count * number / len(found), abs=1), (count, kind)
    languages = [row["language"] for row in found if row["kind"] == "language"]
    assert set(languages[:20]) == set(languages)


def runs(text: str, language: str) -> set[tuple[str, ...]]:
    """All runs of 13 words (characters, where words are not told apart by spaces)."""
    parts = [c for c in text if c.isalpha()] if language in ("zh", "ja", "th") else words(text)
    return set(zip(*(parts[start:] for start in range(13)), strict=False))


def test_no_two_general_documents_share_thirteen_words_and_no_evaluation_document_shares_them() -> None:
    where: dict[tuple[str, ...], str] = {}
    everything = [(GENERAL, split, row) for split in KINDS for row in rows(GENERAL, split)]
    everything += [(name, "evaluation", row) for name in NAMES for row in rows(name, "evaluation")]
    for name, split, row in everything:
        document = f"{name} {split}: {row['text'][:60]}"
        for run in runs(row["text"], row["language"]):
            assert where.setdefault(run, document) == document, " ".join(run)


def test_sums_in_mathematics_are_right() -> None:
    """Equations between two numbers and their result, `7 × 48 = 336`, that are no part of a longer one."""
    number = r"(\d+(?:\.\d+)?)"
    equation = re.compile(rf"(?<![-+×/=(^√] )(?<![\w.,²/(-]){number} ([-+×/]) {number} = {number}(?![\w²/(]| [-+×/])")
    found = [
        (match[0], compute(float(match[1]), match[2], float(match[3])), float(match[4]))
        for name, split in [(GENERAL, "calibration"), (GENERAL, "evaluation"), ("task/math", "calibration")]
        for row in rows(name, split)
        if row.get("kind", "mathematics") in ("mathematics", "table")
        for match in equation.finditer(re.sub(r"(?<=\d),(?=\d{3}\b)", "", row["text"]))  # 1,250 is 1250
    ]
    assert len(found) > 120
    assert [written for written, right, result in found if right != pytest.approx(result)] == []


def compute(left: float, sign: str, right: float) -> float:
    return {"+": left + right, "-": left - right, "×": left * right, "/": left / right}[sign]


# --- all together ---------------------------------------------------------------------------------------------------


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
    texts = [row["text"] for name in (*NAMES, GENERAL) for row in rows(name, split)]
    talks = [row["messages"] for name in CHAT for row in rows(name, split)]
    return [*map(Document, texts), *(Document.of(Conversation.of(talk)) for talk in talks)]


def test_no_document_occurs_twice_anywhere() -> None:
    digests = Counter(document.digest for split in SIZES for document in documents(split))
    assert len(digests) == (len(NAMES) + len(CHAT)) * (24 + 8) + 216 + 32
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
