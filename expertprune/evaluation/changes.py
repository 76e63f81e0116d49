"""Where an expert departs most from its base: answers that flipped, and documents whose loss changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from expertprune.artifacts.changes import AnswerChange, Changes, DocumentChange, Outcome
from expertprune.artifacts.evaluation import CorpusGroup, CorpusResult, Group
from expertprune.corpora.documents import Corpus
from expertprune.evaluation.harness.scores import Scores
from expertprune.evaluation.harness.tasks import HarnessTask

LIMIT = 20  # answers, and documents, of an evaluation
LONGEST = 1200  # characters of a text

_Changed = TypeVar("_Changed", AnswerChange, DocumentChange)


def of_corpora(corpora: Iterable[Corpus], results: Mapping[str, CorpusResult]) -> Changes:
    """The largest changes on corpora, from what was measured on each of their documents and questions.

    Args:
        results: by corpus; documents and questions stand there in the corpus' order.
    """
    answers, documents = [], []
    for corpus in corpora:
        result = results[str(corpus.name)]
        answers.append(_questions(corpus, result))
        documents.append(_documents(corpus, result))
    return Changes(answers=largest(answers), documents=largest(documents))


def of_task(task: HarnessTask, group: Group, base: Scores, expert: Scores) -> list[AnswerChange]:
    """Every example of a task that base and expert answer differently; none of a task without answers."""
    if base.answers is None or expert.answers is None:
        return []
    found = []
    rows = zip(task.asked, base.answers, expert.answers, base.values, expert.values, strict=True)
    for number, (asked, mine, theirs, was, now) in enumerate(rows):
        if mine != theirs:
            margins: tuple[float | None, float | None] = (None, None)
            if base.margins is not None and expert.margins is not None:
                margins = (base.margins[number], expert.margins[number])
            found.append(
                _answer(task.label, group, asked.prompt, (mine, theirs), asked.gold, _outcome(was, now), margins)
            )
    return found


def largest(sources: Sequence[Sequence[_Changed]]) -> list[_Changed]:
    """At most `LIMIT` changes: the largest of each source, then the second largest of each, and so on.

    Margins of different sources count over different lengths, so they are not compared. Where
    answers have no margins, those that the expert lost come first.
    """
    ranked = [sorted(each, key=_rank) for each in sources]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*ranked))
    return list(itertools.islice((change for change in turns if change is not None), LIMIT))


def _rank(change: AnswerChange | DocumentChange) -> tuple[float, int]:
    outcome = ("lost", "gained", "neither").index(change.outcome) if isinstance(change, AnswerChange) else 0
    return -abs(change.change or 0.0), outcome


def _questions(corpus: Corpus, result: CorpusResult) -> list[AnswerChange]:
    return [
        _answer(
            str(corpus.name),
            result.group,
            question.prompt,
            (question.choices[row.base], question.choices[row.expert]),
            question.choices[question.answer],
            _outcome(row.base == question.answer, row.expert == question.answer),
            (row.base_margin, row.expert_margin),
        )
        for question, row in zip(corpus.questions, result.per_question, strict=False)  # none where none were asked
        if row.base != row.expert
    ]


def _documents(corpus: Corpus, result: CorpusResult) -> list[DocumentChange]:
    found = []
    for document, row in zip(corpus.evaluation, result.per_document, strict=False):  # none where none were read
        if row.bytes and row.expert_bytes:
            base, expert = row.base_bits / row.bytes, row.expert_bits / row.expert_bytes
            text = shortened(document.text)
            found.append(
                DocumentChange(
                    source=str(corpus.name), group=result.group, digest=row.digest, text=text, base=base,
                    expert=expert, change=expert - base,
                )
            )  # fmt: skip
    return found


def _answer(
    source: str,
    group: CorpusGroup,
    prompt: str,
    answers: tuple[str, str],
    gold: str | None,
    outcome: Outcome,
    margins: tuple[float | None, float | None],
) -> AnswerChange:
    before, after = margins
    return AnswerChange(
        source=source,
        group=group,
        prompt=shortened(prompt, end=True),
        base=shortened(answers[0]),
        expert=shortened(answers[1]),
        gold=None if gold is None else shortened(gold),
        outcome=outcome,
        base_margin=before,
        expert_margin=after,
        change=None if before is None or after is None else after - before,
    )


def _outcome(before: float, after: float) -> Outcome:
    """What became of a score: lower, higher, or the same."""
    return "neither" if before == after else "lost" if after < before else "gained"


def shortened(text: str, end: bool = False) -> str:
    """A text of at most `LONGEST` characters: its beginning, or its end, where a prompt's question stands."""
    if len(text) <= LONGEST:
        return text
    return "…" + text[1 - LONGEST :] if end else text[: LONGEST - 1] + "…"
