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
CHANGED = LETTERS.replace("repeated", "forearm")  # one word of about sixty
UNRELATED = "Sailing boats crossed the harbour before sunrise, their crews singing old songs about distant islands. \
Fishermen mended nets along the quay while gulls quarrelled over scraps. By noon every tavern smelled of fried herring, \
and merchants argued loudly over prices of rope, tar, canvas and timber under striped awnings."
ASKED = "Why did the nurse measure the pressure of the patient's blood on the other arm?"
CHOICES = ("Because it was higher the second time", "Because of the herring")
MOUNTAINS, SEAS = "mountains are rarely blue at night", "seven seas lie far apart"


def found(
    examples: list[str | Document], calibration: list[str | Document], digests: tuple[str, ...] = ()
) -> list[int]:
    """Which of several examples of one text each leak."""
    texts, known = ([each if isinstance(each, Document) else Document(each) for each in given]
                    for given in (examples, calibration))  # fmt: skip
    (leaking,) = LeakGuard(known, digests).leaks(Examples("some", "examples", [[text] for text in texts]))
    return list(leaking)


def test_what_counts_as_the_same_text() -> None:
    """Other white space, another word or case, and a sentence of it; not a few words of it."""
    same = [LETTERS.replace(" ", "\n\t "), CHANGED, LETTERS.upper(), LETTERS[90:170]]
    for leaks, given in ((True, same), (False, [LETTERS[90:130], UNRELATED])):
        for text in given:
            assert found(["heart", text], [UNRELATED.replace("e", "x"), LETTERS]) == [1] * leaks, text
    assert found([], ["a"]) == found(["a"], []) == found([], []) == []


_letters = random.Random(0)
SHARED = " ".join("".join(_letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(800))


def talk(asked: str, answered: str, system: str = SHARED, role: str = "system") -> Document:
    said = ((role, system), ("user", asked), ("assistant", answered))
    return Document.of(Conversation.of([{"role": role, "content": content} for role, content in said]))


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_that_all_conversations_share_is_no_leak(role: str) -> None:
    known, other = talk(ASKED, LETTERS, role=role), "It is another day."
    assert found([talk("Where do the boats go?", UNRELATED, role=role)], [known]) == []
    leaks: list[str | Document] = [
        known, talk(ASKED, LETTERS, other), talk(ASKED, CHANGED), talk("Why?", LETTERS, other),
        SHARED[:400],  # a text of its own that stands in what calibrated
    ]  # fmt: skip
    assert found(leaks, [known]) == [0, 1, 2, 3, 4]


def test_the_digest_of_a_text_that_is_gone_is_enough() -> None:
    """As of an ancestor's documents: the same text, white space aside, but no near duplicate."""
    gone = (Document(LETTERS).digest,)
    assert found([CHANGED, LETTERS.replace(" ", "\n ")], [UNRELATED], gone) == [1]
    assert found([LETTERS], [], gone) == [0]


def corpus(
    name: str, calibration: list[str], evaluated: list[str], *questions: Question, aside: bool = False
) -> Corpus:
    documents = (tuple(map(Document, calibration)), tuple(map(Document, evaluated)))
    return Corpus(CorpusName.parse(name), *documents, questions, aside)


def clean(corpora: list[Corpus], digests: list[str] | None = None) -> list[Corpus]:
    return LeakGuard((each for corpus in corpora for each in corpus.calibration), digests or []).clean(corpora)


def test_an_evaluation_split_that_calibrated_is_the_users_mistake() -> None:
    """All corpora are told at once, and a document of one corpus may leak into another's evaluation."""
    corpora = [
        corpus("language/en", [LETTERS], [UNRELATED, CHANGED]),
        corpus("domain/medical", ["we sum numbers all day long"], [LETTERS, "a judge reads the law every day"]),
        corpus("task/qa", [SEAS], [MOUNTAINS]),
    ]
    with pytest.raises(SpecError) as error:
        clean(corpora)
    first, second = error.value.problems
    assert first.startswith("corpus language/en: 1 of 2 evaluation documents also calibrate the expert")
    assert second.startswith("corpus domain/medical: 1 of 2 evaluation documents also calibrate the expert")
    assert "'The nurse measured blood pressure" in first


def test_documents_set_aside_are_dropped_where_they_leak(caplog: pytest.LogCaptureFixture) -> None:
    ancestors = "an ancestor of the expert was calibrated on this document, whose text is long gone"
    evaluated = corpus("language/en", [LETTERS], [CHANGED, ancestors, UNRELATED], aside=True)
    first, second = clean([evaluated, corpus("task/qa", [SEAS], [MOUNTAINS])], [Document(ancestors).digest])
    assert (first.evaluation, second.evaluation) == ((Document(UNRELATED),), (Document(MOUNTAINS),))
    assert "corpus language/en: 2 of 3 documents that were set aside are or resemble calibration" in caplog.text
    assert (str(first.name), first.calibration) == ("language/en", (Document(LETTERS),))
    asked = Question("how far apart are the seas", ("near", "far"), 1)
    for evaluated in ([], [LETTERS]):
        with pytest.raises(SpecError, match="corpus language/en: no document is left to evaluate on"):
            clean([corpus("language/en", [LETTERS], evaluated, aside=True)])
        assert clean([corpus("language/en", [LETTERS], evaluated, asked, aside=True)])[0].evaluation == ()


def test_a_question_that_calibrated_the_expert_is_named() -> None:
    questions = (Question("How many seas are there, if you count them all?", ("six", "seven"), 1),
                 Question(ASKED, CHOICES, 0))  # fmt: skip
    for calibration in (
        ASKED,
        f"Q: {ASKED}\nA: {CHOICES[0]}",  # with its answer, in another template
        f"Question: {ASKED}\nAnswer: {CHOICES[0]}",
        f"{ASKED}\nA) {CHOICES[0]}\nB) {CHOICES[1]}",
        f"{UNRELATED}\n{ASKED}\n{LETTERS}",
    ):
        with pytest.raises(SpecError, match=r"^corpus task/qa: 1 of 2 questions also calibrate .*Why did the nurse"):
            clean([corpus("task/qa", [calibration], [MOUNTAINS], *questions)])


def test_a_question_that_is_a_document_of_an_ancestor_is_named() -> None:
    evaluated = corpus("task/qa", [SEAS], [], Question(ASKED, CHOICES, 0))
    assert clean([evaluated]) == [evaluated]
    with pytest.raises(SpecError, match="corpus task/qa: 1 of 1 questions also calibrate"):
        clean([evaluated], [Document(f"Question: {ASKED}\nAnswer: {CHOICES[0]}").digest])
