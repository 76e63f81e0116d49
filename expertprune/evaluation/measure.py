"""Measure base and expert on the same held-out examples of corpora."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertprune.artifacts.evaluation import CorpusResult, DocumentBits, Evaluation, Group, Measured, Settings
from expertprune.corpora.documents import Corpus, CorpusName
from expertprune.errors import SpecError
from expertprune.evaluation.documents import score_documents
from expertprune.evaluation.questions import answer_questions, paired_answers
from expertprune.evaluation.retention import RESAMPLES, Floats, document_metrics
from expertprune.progress import Progress
from expertprune.spec.schema import PER_TOKEN, Evaluate


def evaluate(
    base: Any,
    expert: Any,
    tokenizer: Any,
    corpora: Sequence[Corpus],
    settings: Evaluate,
    progress: Progress | None = None,
    answers: dict[str, Floats] | None = None,
    expert_tokenizer: Any = None,
) -> Evaluation:
    """Measure both models on every corpus (already guarded against leaks).

    Args:
        base, expert: running models with the same tokenizer, unless the expert's own is given.
        progress: called after each batch.
        answers: the base's right answers by corpus, `[questions]`. What is missing is filled in, so
            that several experts of one base ask it once.
        expert_tokenizer: the expert's, where it is not the base's.

    Raises:
        SpecError: a metric per token is asked for, and base and expert have different tokens.
    """
    answers = {} if answers is None else answers
    metrics = settings.chosen_metrics(other_tokens=expert_tokenizer is not None)
    if expert_tokenizer is not None and (wrong := [metric for metric in metrics if metric in PER_TOKEN]):
        raise SpecError(
            f"evaluate.metrics: {', '.join(wrong)} cannot be compared across vocabularies: base and expert have "
            "different tokens; use bits_per_byte"
        )
    results = {}
    for corpus in corpora:
        found: dict[str, Measured] = {}
        rows: list[DocumentBits] = []
        if corpus.evaluation and set(metrics) - {"questions"}:
            rows = score_documents(
                base, expert, tokenizer, corpus.evaluation, settings.max_tokens, progress, expert_tokenizer
            )
            found |= document_metrics(rows, metrics)
        asked = corpus.questions if "questions" in metrics else ()
        if asked:
            if corpus.name not in answers:
                answers[corpus.name] = answer_questions(base, tokenizer, asked, progress)
            right = answer_questions(expert, expert_tokenizer or tokenizer, asked, progress)
            found["questions"] = paired_answers(asked, answers[corpus.name], right).measured()
        results[corpus.name] = CorpusResult(
            group=group_of(corpus),
            documents=len(corpus.evaluation),
            questions=len(asked),
            metrics=found,
            per_document=rows,
        )
    about = Settings(
        documents=settings.documents, max_tokens=settings.max_tokens, metrics=list(metrics), resamples=RESAMPLES
    )
    return Evaluation(settings=about, corpora=results)


def group_of(corpus: Corpus) -> Group:
    """Whether a corpus says what is kept of the expert's purpose, or in general."""
    return "general" if CorpusName.parse(corpus.name).is_general else "expert"


def batches_needed(corpora: Sequence[Corpus]) -> int:
    """About how many steps `evaluate` reports, for a progress bar."""
    documents = sum(len(corpus.evaluation) for corpus in corpora)
    questions = sum(len(question.choices) for corpus in corpora for question in corpus.questions)
    return max(1, documents // 4 + questions // 20)
