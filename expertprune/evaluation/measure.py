"""Measure base and expert on the same held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertprune.artifacts.evaluation import Evaluation
from expertprune.corpora.documents import Corpus
from expertprune.errors import SpecError
from expertprune.evaluation.documents import DocumentScores, ScoresApart, score_documents
from expertprune.evaluation.questions import answer_questions, question_metrics
from expertprune.evaluation.retention import RESAMPLES, Floats, bootstrap
from expertprune.progress import Progress
from expertprune.spec.schema import PER_TOKEN, Evaluate


def document_metrics(scores: DocumentScores, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Base, expert and retention of the metrics over documents, with paired bootstrap intervals.

    Retention is 1 where nothing was lost and below 1 where something was: base over expert for bits per byte and
    perplexity, of which less is better. `kl`, in bits per token, is a distance and has no retention.

    Raises:
        SpecError: a metric per token is asked for, and base and expert were given different tokens.
    """
    if isinstance(scores, ScoresApart) and (wrong := [metric for metric in metrics if metric in PER_TOKEN]):
        raise SpecError(
            f"evaluate.metrics: {', '.join(wrong)} cannot be compared across vocabularies: base and expert have different "
            "tokens; use bits_per_byte"
        )
    result: dict[str, dict[str, float]] = {}
    count = len(scores.base)

    def ratio(a: Floats, b: Floats) -> Callable[[NDArray[np.int64]], Floats]:
        return lambda i: np.asarray(a[i].sum(1) / b[i].sum(1), dtype=np.float64)

    def entry(base: float, expert: float, statistic: Callable[[NDArray[np.int64]], Floats]) -> dict[str, float]:
        low, high = bootstrap(statistic, count)
        return {"base": base, "expert": expert, "retention": base / expert, "low": low, "high": high}

    base, expert, tokens = scores.base.sum(), scores.expert.sum(), scores.tokens.sum()
    if "bits_per_byte" in metrics:
        own = scores.expert_bytes if isinstance(scores, ScoresApart) else scores.bytes
        bits, sizes = ratio(scores.base, scores.expert), ratio(own, scores.bytes)
        result["bits_per_byte"] = entry(base / scores.bytes.sum(), expert / own.sum(), lambda i: bits(i) * sizes(i))
    if "perplexity" in metrics:
        excess = ratio(scores.base - scores.expert, scores.tokens)
        result["perplexity"] = entry(2 ** (base / tokens), 2 ** (expert / tokens), lambda i: np.exp2(excess(i)))
    if "kl" in metrics:
        low, high = bootstrap(ratio(scores.kl, scores.tokens), count)
        result["kl"] = {"expert": float(scores.kl.sum() / tokens), "low": low, "high": high}
    return {name: {key: float(value) for key, value in numbers.items()} for name, numbers in result.items()}


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
        answers: the base's right answers by corpus, `[questions]`; what is missing is filled in, so that several experts
            of one base on the same questions ask it once.
        expert_tokenizer: the expert's, where it is not the base's; metrics per token are then refused.
    """
    answers = {} if answers is None else answers
    results: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        metrics: dict[str, dict[str, float]] = {}
        result: dict[str, Any] = {"documents": len(corpus.evaluation), "metrics": metrics}
        if corpus.evaluation and set(settings.metrics) - {"questions"}:
            scores = score_documents(
                base, expert, tokenizer, corpus.evaluation, settings.max_tokens, progress, expert_tokenizer
            )
            metrics |= document_metrics(scores, settings.metrics)
            result["per_document"] = [
                {
                    "digest": document.digest,
                    "tokens": int(scores.tokens[i]),
                    "bytes": int(scores.bytes[i]),
                    "base_bits": scores.base[i],
                    "expert_bits": scores.expert[i],
                    "kl_bits": scores.kl[i],
                    **_own_tokens(scores, i),
                }
                for i, document in enumerate(corpus.evaluation)
            ]
        if corpus.questions and "questions" in settings.metrics:
            if corpus.name not in answers:
                answers[corpus.name] = answer_questions(base, tokenizer, corpus.questions, progress)
            right = answer_questions(expert, expert_tokenizer or tokenizer, corpus.questions, progress)
            metrics["questions"] = question_metrics(answers[corpus.name], right)
            result["questions"] = len(corpus.questions)
        results[corpus.name] = result
    about = {**settings.model_dump(mode="json"), "resamples": RESAMPLES, "interval": 0.95}
    return Evaluation(results, about)


def _own_tokens(scores: DocumentScores, document: int) -> dict[str, int]:
    if not isinstance(scores, ScoresApart):
        return {}
    return {"expert_tokens": int(scores.expert_tokens[document]), "expert_bytes": int(scores.expert_bytes[document])}


def batches_needed(corpora: Sequence[Corpus]) -> int:
    """About how many steps `evaluate` reports, for a progress bar."""
    documents = sum(len(corpus.evaluation) for corpus in corpora)
    questions = sum(len(question.choices) for corpus in corpora for question in corpus.questions)
    return max(1, documents // 4 + questions // 20)
