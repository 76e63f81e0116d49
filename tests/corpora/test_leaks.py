"""The leak guard: what counts as the same text, and what happens to examples that leak."""

from __future__ import annotations

import random

import pytest

from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.corpora.leaks import Examples, LeakGuard
from expertprune.corpora.messages import Conversation
from expertprune.errors import SpecError

LETTERS = (
    "The nurse measured blood pressure twice that morning and wrote both numbers down. Since the second was higher \
than the first, she asked the patient to rest for ten minutes, and then repeated the measurement on the other arm, where \
it turned out almost normal again. A doctor later explained that coffee, stairs and worry can raise such numbers for a \
short while."
)
UNRELATED = "Sailing boats crossed the harbour before sunrise, their crews singing old songs about distant islands. \
Fishermen mended nets along the quay while gulls quarrelled over scraps. By noon every tavern smelled of fried herring, \
and merchants argued loudly over prices of rope, tar, canvas and timber under striped awnings."
ASKED = "Why did the nurse measure the pressure of the patient's blood on the other arm?"
CHOICES = ("Because it was higher the second time", "Because of the herring")


def found(examples: list[str], calibration: list[str], digests: list[str] | None = None) -> list[int]:
    """Which of several examples of one text each leak."""
    guard = LeakGuard(map(Document, calibration), digests or [])
    (leaking,) = guard.leaks(Examples("some", "examples", [[Document(text)] for text in examples]))
    return list(leaking)


def with_one_word_changed(text: str) -> str:
    changed = text.split()
    assert len(changed) >= 60
    changed[30] = "forearm"
    return " ".join(changed)


@pytest.mark.parametrize(
    ("document", "is_leaked"),
    [
        pytest.param(LETTERS.replace(" ", "\n\t "), True, id="other white space"),
        pytest.param(with_one_word_changed(LETTERS), True, id="one word changed"),
        pytest.param(LETTERS.upper(), True, id="other case"),
        pytest.param(LETTERS[90:170], True, id="a sentence of it"),
        pytest.param(LETTERS[90:130], False, id="a few words of it"),
        pytest.param(UNRELATED, False, id="unrelated"),
    ],
)
def test_what_counts_as_the_same_text(document: str, is_leaked: bool) -> None:
    assert found(["heart", document], [UNRELATED.replace("e", "x"), LETTERS]) == ([1] if is_leaked else [])


_letters = random.Random(0)
SHARED = " ".join("".join(_letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(800))


def talk(asked: str, answered: str, system: str = SHARED, role: str = "system") -> Document:
    said = ((role, system), ("user", asked), ("assistant", answered))
    return Document.of(Conversation.of([{"role": role, "content": content} for role, content in said]))


def leaking(examples: list[Document], calibration: list[Document]) -> list[int]:
    (found,) = LeakGuard(calibration).leaks(Examples("some", "examples", [[each] for each in examples]))
    return list(found)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_that_all_conversations_share_is_no_leak(role: str) -> None:
    known = talk(ASKED, LETTERS, role=role)
    assert leaking([talk("Where do the boats go?", UNRELATED, role=role)], [known]) == []
    other = "It is another day."
    leaks = [
        known,
        talk(ASKED, LETTERS, other),
        talk(ASKED, with_one_word_changed(LETTERS)),
        talk("Why?", LETTERS, other),
    ]
    assert leaking(leaks, [known]) == [0, 1, 2, 3]
    assert leaking([Document(SHARED[:400])], [known]) == [0]  # a text of its own that stands in what calibrated


def test_the_digest_of_a_text_that_is_gone_is_enough() -> None:
    """As of an ancestor's documents: the same text, white space aside, but no near duplicate."""
    gone = [Document(LETTERS).digest]
    assert found([with_one_word_changed(LETTERS), LETTERS.replace(" ", "\n ")], [UNRELATED], gone) == [1]
    assert found([LETTERS], [], gone) == [0]


def test_nothing_leaks_from_or_into_nothing() -> None:
    assert found([], ["a"]) == found(["a"], []) == found([], []) == []


# --- corpora --------------------------------------------------------------------------------------------------------


def corpus(
    name: str, calibration: list[str], evaluated: list[str], *questions: Question, aside: bool = False
) -> Corpus:
    return Corpus(
        CorpusName.parse(name), tuple(map(Document, calibration)), tuple(map(Document, evaluated)), questions, aside
    )


def clean(corpora: list[Corpus], digests: list[str] | None = None) -> list[Corpus]:
    return LeakGuard((each for corpus in corpora for each in corpus.calibration), digests or []).clean(corpora)


def test_an_evaluation_split_that_calibrated_is_the_users_mistake() -> None:
    """All corpora are told at once, and a document of one corpus may leak into another's evaluation."""
    corpora = [
        corpus("language/en", [LETTERS], [UNRELATED, with_one_word_changed(LETTERS)]),
        corpus("domain/medical", ["we sum numbers all day long"], [LETTERS, "a judge reads the law every day"]),
        corpus("task/qa", ["seven seas lie far apart"], ["mountains are rarely blue at night"]),
    ]
    with pytest.raises(SpecError) as error:
        clean(corpora)
    first, second = error.value.problems
    assert first.startswith("corpus language/en: 1 of 2 evaluation documents also calibrate the expert")
    assert second.startswith("corpus domain/medical: 1 of 2 evaluation documents also calibrate the expert")
    assert "'The nurse measured blood pressure" in first


def test_documents_set_aside_are_dropped_where_they_leak() -> None:
    ancestors = "an ancestor of the expert was calibrated on this document, whose text is long gone"
    first, second = clean(
        [
            corpus("language/en", [LETTERS], [with_one_word_changed(LETTERS), ancestors, UNRELATED], aside=True),
            corpus("task/qa", ["seven seas lie far apart"], ["mountains are rarely blue at night"]),
        ],
        [Document(ancestors).digest],
    )
    assert [document.text for document in first.evaluation] == [UNRELATED]
    assert [document.text for document in second.evaluation] == ["mountains are rarely blue at night"]
    assert (str(first.name), first.calibration) == ("language/en", (Document(LETTERS),))


@pytest.mark.parametrize("evaluated", [[], [LETTERS]])
def test_a_corpus_with_nothing_left_is_an_error_unless_it_has_questions(evaluated: list[str]) -> None:
    with pytest.raises(SpecError, match="corpus language/en: no document is left to evaluate on"):
        clean([corpus("language/en", [LETTERS], evaluated, aside=True)])
    asked = Question("how far apart are the seas", ("near", "far"), 1)
    assert clean([corpus("language/en", [LETTERS], evaluated, asked, aside=True)])[0].evaluation == ()


# --- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calibration",
    [
        pytest.param(ASKED, id="the question alone"),
        pytest.param(f"Q: {ASKED}\nA: {CHOICES[0]}", id="with its answer, in another template"),
        pytest.param(f"Question: {ASKED}\nAnswer: {CHOICES[0]}", id="as it is asked"),
        pytest.param(f"{ASKED}\nA) {CHOICES[0]}\nB) {CHOICES[1]}", id="with its choices"),
        pytest.param(f"{UNRELATED}\n{ASKED}\n{LETTERS}", id="inside a longer document"),
    ],
)
def test_a_question_that_calibrated_the_expert_is_named(calibration: str) -> None:
    questions = (Question("How many seas are there, if you count them all?", ("six", "seven"), 1),
                 Question(ASKED, CHOICES, 0))  # fmt: skip
    with pytest.raises(SpecError) as error:
        clean([corpus("task/qa", [calibration], ["mountains are rarely blue"], *questions)])
    (problem,) = error.value.problems
    assert problem.startswith("corpus task/qa: 1 of 2 questions also calibrate the expert, or one that it is cut from")
    assert "Why did the nurse measure" in problem


def test_a_question_that_is_a_document_of_an_ancestor_is_named() -> None:
    asked = Question(ASKED, CHOICES, 0)
    as_asked = Document(f"Question: {ASKED}\nAnswer: {CHOICES[0]}")
    evaluated = corpus("task/qa", ["seven seas lie far apart"], [], asked)
    assert clean([evaluated]) == [evaluated]
    with pytest.raises(SpecError, match="corpus task/qa: 1 of 1 questions also calibrate"):
        clean([evaluated], [as_asked.digest])
