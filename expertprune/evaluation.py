"""Base and expert on the same held-out examples: what was kept, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertprune.artifacts import Evaluation
from expertprune.corpora import Corpus, Document, Question, make_batches, tokenize
from expertprune.errors import SpecError
from expertprune.spec import PER_TOKEN, Evaluate

RESAMPLES = 2000
NEAR_DUPLICATE = 0.8  # cosine of character 5-gram tf-idf above which two documents count as the same
_CHUNK = 256  # positions whose distributions are held in float32 at a time
_TOKENS_PER_BATCH = 1024
Progress = Callable[[], None]
Floats = NDArray[np.float64]


# --- leak guard -----------------------------------------------------------------------------------------------------


def leaked(evaluation: Sequence[Document], calibration: Sequence[Document]) -> list[int]:
    """Positions of evaluation documents that calibrated the expert: the same digest, or a near duplicate of one.

    Near duplicates: cosine similarity of at least 0.8 between tf-idf vectors of character 5-grams (scikit-learn).
    """
    digests = {document.digest for document in calibration}
    found = {i for i, document in enumerate(evaluation) if document.digest in digests}
    if evaluation and calibration:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(5, 5), sublinear_tf=True)
        vectorizer.fit([document.text for document in (*calibration, *evaluation)])
        known = vectorizer.transform([document.text for document in calibration])
        new = vectorizer.transform([document.text for document in evaluation])
        similarity = (new @ known.T).max(axis=1).toarray().ravel()
        found |= set(np.flatnonzero(similarity >= NEAR_DUPLICATE).tolist())
    return sorted(found)


def guarded(corpora: Sequence[Corpus]) -> list[Corpus]:
    """The corpora with clean evaluation documents.

    From documents that were set aside automatically, near duplicates of calibration documents are left out. In an
    evaluation split of its own they are the user's mistake.

    Raises:
        SpecError: an evaluation split holds documents that calibrate the expert, or nothing is left to evaluate on.
    """
    calibration = [document for corpus in corpora for document in corpus.calibration]
    clean, problems = [], []
    for corpus in corpora:
        bad = set(leaked(corpus.evaluation, calibration))
        kept = tuple(document for i, document in enumerate(corpus.evaluation) if i not in bad)
        if bad and not corpus.set_aside:
            example = " ".join(corpus.evaluation[min(bad)].text.split())[:60]
            problems.append(
                f"corpus {corpus.name}: {len(bad)} of {len(corpus.evaluation)} evaluation documents also calibrate the "
                f"expert (the first: {example!r}...): take them out of one of the two"
            )
        elif not kept and not corpus.questions:
            problems.append(
                f"corpus {corpus.name}: no document is left to evaluate on; give it more, or an evaluation split"
            )
        clean.append(Corpus(corpus.name, corpus.calibration, kept, corpus.questions, corpus.set_aside))
    if problems:
        raise SpecError(problems)
    return clean


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class DocumentScores:
    """Per document, `[documents]`: bits of its predicted tokens, their number and bytes, and KL in bits."""

    base: Floats
    expert: Floats
    kl: Floats
    tokens: Floats
    bytes: Floats


@dataclass
class ScoresApart(DocumentScores):
    """Where the expert has a tokenizer of its own: `tokens` and `bytes` are the base's, and `kl` is not a number."""

    expert_tokens: Floats
    expert_bytes: Floats


@torch.inference_mode()
def score_documents(
    base: Any,
    expert: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    progress: Progress | None = None,
    expert_tokenizer: Any = None,
) -> DocumentScores:
    """Negative log-likelihood of both models and `KL(base ‖ expert)`, summed over each document's predicted tokens.

    The first token is predicted from nothing and does not count; neither do its bytes.

    Args:
        expert_tokenizer: the expert's, where it is not the base's; both then read the same text, cut where the base's
            tokenizer has `max_tokens`, each in its own tokens.
    """
    if expert_tokenizer is not None:
        return _score_apart(base, expert, (tokenizer, expert_tokenizer), documents, max_tokens, progress)
    tokens = tokenize(documents, tokenizer, max_tokens)
    count = len(documents)
    scores = DocumentScores(*(np.zeros(count) for _ in range(5)))
    for batch in make_batches(tokens, _TOKENS_PER_BATCH):
        ids = batch.ids.to(base.device)
        mine, theirs = base(input_ids=ids).logits, expert(input_ids=ids).logits
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            sums = _row_sums(mine[row, : length - 1], theirs[row, : length - 1], ids[row, 1:length])
            scores.base[document], scores.expert[document], scores.kl[document] = sums
            scores.tokens[document] = length - 1
            scores.bytes[document] = _predicted_bytes(tokenizer, documents[document], max_tokens)
        if progress is not None:
            progress()
    return scores


def _score_apart(
    base: Any,
    expert: Any,
    tokenizers: tuple[Any, Any],
    documents: Sequence[Document],
    max_tokens: int,
    progress: Progress | None,
) -> ScoresApart:
    """The bits of both models, each in its own tokens of the same text; predictions over other rows have no KL."""
    cut = [Document(document.text[: _end(tokenizers[0], document, max_tokens)]) for document in documents]
    mine, tokens, size = score_alone(base, tokenizers[0], cut, progress)
    theirs, other_tokens, other_size = score_alone(expert, tokenizers[1], cut, progress)
    return ScoresApart(mine, theirs, np.full(len(cut), math.nan), tokens, size, other_tokens, other_size)


@torch.inference_mode()
def score_alone(
    model: Any, tokenizer: Any, documents: Sequence[Document], progress: Progress | None = None
) -> tuple[Floats, Floats, Floats]:
    """One model on whole documents: bits, number and bytes of their predicted tokens, `[documents]` each."""
    bits, tokens, size = (np.zeros(len(documents)) for _ in range(3))
    encoded = [list(ids) for ids in tokenizer([document.text for document in documents])["input_ids"]]
    for batch in make_batches(encoded, _TOKENS_PER_BATCH):
        ids = batch.ids.to(model.device)
        logits = model(input_ids=ids).logits
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            bits[document] = _row_bits(logits[row, : length - 1], ids[row, 1:length])
            tokens[document] = length - 1
            size[document] = _predicted_bytes(tokenizer, documents[document], len(encoded[document]))
        if progress is not None:
            progress()
    return bits, tokens, size


def _end(tokenizer: Any, document: Document, max_tokens: int) -> int:
    """Characters of a document up to where it is cut."""
    offsets = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    return len(document.text) if len(offsets) <= max_tokens else max(end for _, end in offsets[:max_tokens])


def _row_bits(logits: Tensor, targets: Tensor) -> float:
    """Bits of one document's predicted tokens; logits are `[tokens, vocabulary]`."""
    total = 0.0
    for first in range(0, logits.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        total += float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
    return total / math.log(2)


def _predicted_bytes(tokenizer: Any, document: Document, max_tokens: int) -> int:
    """UTF-8 bytes of the document's text behind its first token, up to where it was cut."""
    if not tokenizer.is_fast:  # only fast tokenizers know where a token's text stands
        ids = tokenize([document], tokenizer, max_tokens)[0]
        return len(tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
    encoded = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    first, last = encoded[0][1], len(document.text)
    if len(encoded) > max_tokens:
        last = max(end for _, end in encoded[:max_tokens])
    return len(document.text[first:last].encode())


def _row_sums(base: Tensor, expert: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Bits under base and expert, and KL in bits, of one document; logits are `[tokens, vocabulary]`."""
    totals = [0.0, 0.0, 0.0]
    for first in range(0, base.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        p = torch.log_softmax(base[part].float(), -1)
        q = torch.log_softmax(expert[part].float(), -1)
        index = targets[part, None]
        totals[0] -= float(p.gather(1, index).double().sum())
        totals[1] -= float(q.gather(1, index).double().sum())
        totals[2] += float((p.exp() * (p - q)).sum(-1).double().sum())
    bits = 1 / math.log(2)
    return totals[0] * bits, totals[1] * bits, totals[2] * bits


@torch.inference_mode()
def answer_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Floats:
    """1 where the model prefers the right choice, 0 elsewhere, `[questions]`.

    A choice's score is the log-likelihood of `" choice"` after `"Question: ...\\nAnswer:"`, divided by its bytes: what
    lm-evaluation-harness reports as `acc_norm` up to its counting characters.
    """
    sequences, spans = [], []
    for question in questions:
        prompt = f"Question: {question.question}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        for choice in question.choices:
            sequences.append(list(tokenizer(f"{prompt} {choice}")["input_ids"]))
            spans.append((start, len(choice.encode())))
    scores = np.zeros(len(sequences))
    for batch in make_batches(sequences, _TOKENS_PER_BATCH):
        ids = batch.ids.to(model.device)
        logits = model(input_ids=ids).logits
        for row, (index, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            first, size = spans[index]
            likelihood = torch.log_softmax(logits[row, first - 1 : length - 1].float(), -1)
            scores[index] = float(likelihood.gather(1, ids[row, first:length, None]).sum()) / max(1, size)
        if progress is not None:
            progress()
    right, offset = np.zeros(len(questions)), 0
    for number, question in enumerate(questions):
        choices = scores[offset : offset + len(question.choices)]
        right[number] = float(int(choices.argmax()) == question.answer)
        offset += len(question.choices)
    return right


# --- retention ------------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[NDArray[np.int64]], Floats], count: int, seed: int = 0) -> tuple[float, float]:
    """The central 95% of a statistic over resamples of `count` examples.

    Args:
        statistic: from indices `[resamples, count]` to values `[resamples]`.
    """
    indices = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    values = statistic(indices)
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


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


def question_metrics(base: Floats, expert: Floats) -> dict[str, float]:
    """Accuracy of both, retention (expert over base) with its interval, and how many answers flipped each way."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = bootstrap(lambda i: expert[i].sum(1) / base[i].sum(1), len(base))
    return {
        "base": float(base.mean()),
        "expert": float(expert.mean()),
        "retention": float(expert.sum() / base.sum()) if base.sum() else math.nan,
        "low": low,
        "high": high,
        "lost": float(((base == 1) & (expert == 0)).sum()),
        "gained": float(((base == 0) & (expert == 1)).sum()),
    }


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
