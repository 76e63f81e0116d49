"""Measuring against slow references: one document, one choice, one resample at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from expertprune.artifacts.evaluation import DocumentBits, Evaluation
from expertprune.corpora.documents import Corpus, Document, Question
from expertprune.evaluation import documents
from expertprune.evaluation import questions as asking
from expertprune.evaluation.documents import score_documents
from expertprune.evaluation.measure import evaluate
from expertprune.evaluation.questions import answer_questions, paired_answers
from expertprune.evaluation.retention import RESAMPLES, bootstrap, document_metrics
from expertprune.spec.schema import Evaluate
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

Floats = NDArray[np.float64]
VOCABULARY = [*WORDS, *(f"w{i}" for i in range(46))]


def words(count: int, seed: int) -> list[str]:
    """Words of the tiny tokenizer, one token each."""
    return [VOCABULARY[i] for i in np.random.default_rng(seed).integers(0, len(VOCABULARY), count)]


TEXTS = [words(length, seed) for seed, length in enumerate((7, 2, 15, 4, 30, 4))]
DOCUMENTS = [Document(" ".join(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_model("llama", seed=0)


@pytest.fixture(scope="module")
def expert() -> Any:
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def log_probabilities(model: Any, ids: list[int]) -> Floats:
    """Natural logarithms of what follows each token of one sequence alone, `[tokens, vocabulary]`."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def slow_scores(base: Any, expert: Any, ids: list[int]) -> tuple[float, float, float]:
    """Bits of base and expert and KL in bits, token by token."""
    p, q = log_probabilities(base, ids), log_probabilities(expert, ids)
    mine = theirs = distance = 0.0
    for position in range(len(ids) - 1):
        following = ids[position + 1]
        mine -= p[position, following] / math.log(2)
        theirs -= q[position, following] / math.log(2)
        for token in range(p.shape[1]):
            distance += math.exp(p[position, token]) * (p[position, token] - q[position, token]) / math.log(2)
    return mine, theirs, distance


# --- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens_per_batch", "chunk"), [(1024, 256), (1, 256), (20, 3), (1024, 1)])
def test_scores_equal_a_slow_reference_with_any_padding(
    base: Any,
    expert: Any,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_batch: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(documents, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(asking, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    rows = score_documents(base, expert, tokenizer, DOCUMENTS, max_tokens=20)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = tokenizer(" ".join(text))["input_ids"][:20]
        assert (row.base_bits, row.expert_bits, row.kl_bits) == pytest.approx(slow_scores(base, expert, ids), rel=1e-5)
        assert row.tokens == row.expert_tokens == min(len(text), 20) - 1
        size = len(" ".join(text[:20])) - len(text[0])  # the blank is predicted with the second word
        assert row.bytes == row.expert_bytes == size
        assert row.kl_bits is not None
        assert row.kl_bits > 0.01


def test_documents_that_predict_nothing_count_nothing(
    base: Any, expert: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    (alone,) = score_documents(base, expert, tokenizer, [DOCUMENTS[0]], 20)
    before, between, after = score_documents(
        base, expert, tokenizer, [Document("heart"), DOCUMENTS[0], Document("law")], 20
    )
    assert (between.base_bits, between.expert_bits) == pytest.approx((alone.base_bits, alone.expert_bits), rel=1e-5)
    assert all(each.tokens == each.bytes == each.base_bits == each.expert_bits == 0 for each in (before, after))


def other_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One that puts a token before the text, and knows words of several bytes."""
    names = ["<s>", "</s>", "<unk>", "is", "n't", ".", "über", "日本", "heart"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **settings
    )


@pytest.mark.parametrize(
    ("text", "max_tokens", "tokens", "size", "tidy"),
    [
        pytest.param("über heart", 20, 2, 5 + 1 + 5, False, id="a token before the text; ü has two bytes"),
        pytest.param("日本 is heart", 20, 3, 6 + 1 + 2 + 1 + 5, False, id="three bytes each"),
        pytest.param("über heart is 日本", 3, 2, 5 + 1 + 5, False, id="cut short: the first token and two words"),
        pytest.param("heart is n't über .", 20, 5, 20, True, id="blanks that the tokenizer tidies away"),
        pytest.param("heart is purple", 20, 3, 15, False, id="a word that the tokenizer does not know"),
    ],
)
def test_bytes_are_those_of_the_text_that_is_predicted(
    base: Any, expert: Any, text: str, max_tokens: int, tokens: int, size: int, tidy: bool
) -> None:
    tokenizer = other_tokenizer(clean_up_tokenization_spaces=tidy)
    (row,) = score_documents(base, expert, tokenizer, [Document(text)], max_tokens)
    assert (row.tokens, row.bytes) == (tokens, size)


def test_progress_is_told_after_each_batch(
    base: Any, expert: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TOKENS_PER_BATCH", 1)
    monkeypatch.setattr(asking, "TOKENS_PER_BATCH", 1)
    calls: list[int] = []
    score_documents(base, expert, tokenizer, DOCUMENTS, 20, lambda: calls.append(1))
    assert len(calls) == len(DOCUMENTS)


# --- metrics over documents -----------------------------------------------------------------------------------------


SCORES = {
    "base_bits": [10.0, 20.0, 6.0],
    "expert_bits": [12.0, 30.0, 6.0],
    "kl_bits": [1.0, 2.0, 0.5],
    "tokens": [5, 5, 2],
    "bytes": [20, 40, 12],
}


def rows_of(scores: dict[str, Any], digests: str = "abc") -> list[DocumentBits]:
    rows = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    return [
        DocumentBits(**{"digest": digest, "expert_tokens": row["tokens"], "expert_bytes": row["bytes"], **row})
        for digest, row in zip(digests, rows, strict=False)
    ]


def slow_interval(values: Callable[[list[int]], float], count: int) -> tuple[float, float]:
    """The same resamples, one after the other; those without a finite value are left out."""
    resamples = np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count)).tolist()
    ordered = sorted(value for indices in resamples if math.isfinite(value := values(indices)))

    def at(quantile: float) -> float:
        position = quantile * (len(ordered) - 1)
        low = math.floor(position)
        return ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return at(0.025), at(0.975)


def total(name: str, indices: list[int]) -> float:
    return sum(SCORES[name][i] for i in indices)


def test_metrics_over_documents_written_out() -> None:
    metrics = document_metrics(rows_of(SCORES), ["bits_per_byte", "perplexity", "kl", "questions"])
    assert set(metrics) == {"bits_per_byte", "perplexity", "kl"}
    found = {name: numbers.model_dump(exclude_none=True) for name, numbers in metrics.items()}
    low, high = slow_interval(lambda i: total("base_bits", i) / total("expert_bits", i), 3)
    assert found["bits_per_byte"] == pytest.approx(
        {"examples": 3, "base": 36 / 72, "expert": 48 / 72, "retention": 36 / 48, "low": low, "high": high}
    )
    low, high = slow_interval(
        lambda i: 2 ** ((total("base_bits", i) - total("expert_bits", i)) / total("tokens", i)), 3
    )
    assert found["perplexity"] == pytest.approx(
        {"examples": 3, "base": 2**3, "expert": 2**4, "retention": 0.5, "low": low, "high": high}
    )
    low, high = slow_interval(lambda i: total("kl_bits", i) / total("tokens", i), 3)
    assert found["kl"] == pytest.approx({"examples": 3, "expert": 3.5 / 12, "low": low, "high": high})
    assert low < 3.5 / 12 < high


def test_identical_models_lose_nothing(base: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = score_documents(base, tiny_model("llama", seed=0), tokenizer, DOCUMENTS, 20)
    metrics = document_metrics(rows, ["bits_per_byte", "perplexity", "kl"])
    for name in ("bits_per_byte", "perplexity"):
        assert (metrics[name].retention, metrics[name].low, metrics[name].high) == (1.0, 1.0, 1.0)
        assert metrics[name].base == metrics[name].expert
    assert (metrics["kl"].expert, metrics["kl"].low, metrics["kl"].high) == (0, 0, 0)


def test_metrics_of_a_single_document_have_a_point_for_an_interval() -> None:
    numbers = document_metrics(rows_of(SCORES)[:1], ["bits_per_byte"])["bits_per_byte"]
    assert numbers.low == numbers.high == numbers.retention == pytest.approx(10 / 12)


def test_metrics_of_documents_that_predict_nothing_are_undefined() -> None:
    nothing = rows_of({name: [0, 0] for name in SCORES})
    for numbers in document_metrics(nothing, ["bits_per_byte", "perplexity", "kl"]).values():
        assert (numbers.retention, numbers.low, numbers.high) == (None, None, None)


# --- bootstrap ------------------------------------------------------------------------------------------------------


def test_bootstrap_equals_a_loop_over_the_same_resamples() -> None:
    values = np.random.default_rng(4).exponential(size=11)
    fast = bootstrap(lambda indices: values[indices].mean(1), 11)
    assert fast == pytest.approx(slow_interval(lambda indices: sum(values[i] for i in indices) / 11, 11))


def test_bootstrap_covers_a_known_mean_about_as_often_as_it_says() -> None:
    """95% intervals of the mean of 40 normal numbers, 200 times: 190 hits are expected, with a deviation of 3."""
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        sample = generator.normal(5.0, 2.0, size=40)
        low, high = bootstrap(lambda indices, sample=sample: sample[indices].mean(1), 40)
        hits += low <= 5.0 <= high
        assert high - low == pytest.approx(2 * 1.96 * sample.std() / math.sqrt(40), rel=0.1)
    assert 175 <= hits <= 199


def test_bootstrap_is_seeded_and_leaves_out_what_is_not_finite() -> None:
    many = np.random.default_rng(4).exponential(size=11)
    assert bootstrap(lambda i: many[i].mean(1), 11) == bootstrap(lambda i: many[i].mean(1), 11, seed=0)
    assert bootstrap(lambda i: many[i].mean(1), 11) != bootstrap(lambda i: many[i].mean(1), 11, seed=1)
    values = np.array([1.0, 2.0, 4.0])
    holes = bootstrap(lambda i: np.where(i[:, 0] == 0, np.nan, values[i[:, 0]]), 3)
    assert holes == (2.0, 4.0)
    assert all(math.isnan(end) for end in bootstrap(lambda i: np.full(len(i), np.inf), 3))


# --- questions ------------------------------------------------------------------------------------------------------


def some_questions() -> list[Question]:
    generator = np.random.default_rng(3)
    questions = []
    for seed in range(40):
        choices = tuple(" ".join(words(int(generator.integers(1, 6)), 100 * seed + k)) for k in range(4))
        questions.append(Question(" ".join(words(5, 1000 + seed)), choices, int(generator.integers(0, 4))))
    return questions


def likelihoods(model: Any, tokenizer: PreTrainedTokenizerFast, question: Question) -> list[float]:
    """Log-likelihood of each choice after the prompt, token by token."""
    prompt = tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
    found = []
    for choice in question.choices:
        ids = tokenizer(f"Question: {question.question}\nAnswer: {choice}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        logs = log_probabilities(model, ids)
        found.append(sum(logs[position - 1, ids[position]] for position in range(len(prompt), len(ids))))
    return found


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 1024])
def test_answers_equal_a_slow_reference(
    base: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int
) -> None:
    monkeypatch.setattr(documents, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(asking, "TOKENS_PER_BATCH", tokens_per_batch)
    questions = some_questions()
    expected, without_length = [], []
    for question in questions:
        sums = likelihoods(base, tokenizer, question)
        per_byte = [value / len(choice.encode()) for value, choice in zip(sums, question.choices, strict=True)]
        expected.append(float(int(np.argmax(per_byte)) == question.answer))
        without_length.append(float(int(np.argmax(sums)) == question.answer))
    assert answer_questions(base, tokenizer, questions).tolist() == expected
    assert 0 < sum(expected) < len(questions)
    assert expected != without_length


def test_answers_after_a_token_that_begins_every_text(base: Any) -> None:
    tokenizer = other_tokenizer()
    assert tokenizer("heart")["input_ids"] == [0, 8]
    names = ["is", "n't", ".", "über", "日本", "heart"]
    questions = []
    for number in range(30):
        generator = np.random.default_rng(number)
        choices = tuple(" ".join(generator.choice(names, int(generator.integers(1, 4)))) for _ in range(4))
        questions.append(Question("heart is über", choices, int(generator.integers(0, 4))))
    expected = []
    for question in questions:
        sums = likelihoods(base, tokenizer, question)
        per_byte = [value / len(choice.encode()) for value, choice in zip(sums, question.choices, strict=True)]
        expected.append(float(int(np.argmax(per_byte)) == question.answer))
    assert answer_questions(base, tokenizer, questions).tolist() == expected
    assert 0 < sum(expected) < len(questions)


def test_questions_may_have_different_numbers_of_choices(base: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    choices = [tuple(words(count, 7 + count)) for count in (2, 5, 3)]
    best = []
    for options in choices:
        question = Question("heart", options, 0)
        per_byte = [v / len(c) for v, c in zip(likelihoods(base, tokenizer, question), options, strict=True)]
        best.append(int(np.argmax(per_byte)))
    right = [Question("heart", options, answer) for options, answer in zip(choices, best, strict=True)]
    wrong = [
        Question("heart", options, (answer + 1) % len(options)) for options, answer in zip(choices, best, strict=True)
    ]
    assert answer_questions(base, tokenizer, right).tolist() == [1, 1, 1]
    assert answer_questions(base, tokenizer, [right[0], wrong[1], right[2]]).tolist() == [1, 0, 1]
    assert answer_questions(base, tokenizer, wrong).tolist() == [0, 0, 0]


def test_choices_are_compared_by_the_byte_not_by_the_character(base: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Both are one unknown word, and so equally likely: ten letters of one byte, or eight of two."""
    choices = ("x" * 10, "ü" * 8)
    one, other = likelihoods(base, tokenizer, Question("heart", choices, 0))
    assert one == other < 0
    assert answer_questions(base, tokenizer, [Question("heart", choices, 1)]).tolist() == [1]


def test_chance_of_a_question_set_is_the_mean_over_its_questions() -> None:
    questions = [Question("q", ("a", "b"), 0)] * 3 + [Question("q", ("a", "b", "c", "d"), 0)] * 3
    base, expert = np.array([1.0, 1, 1, 1, 1, 0]), np.array([1.0, 1, 0, 1, 0, 1])
    found = paired_answers(questions, base, expert).measured()
    chance = (3 * 1 / 2 + 3 * 1 / 4) / 6  # 0.375
    assert (found.examples, found.chance, found.base, found.expert) == (6, chance, 5 / 6, 4 / 6)
    assert found.retention == pytest.approx((4 / 6 - 0.375) / (5 / 6 - 0.375))
    assert (found.lost, found.gained) == (2, 1)


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated() -> list[Corpus]:
    return [
        Corpus("language/en", (), tuple(DOCUMENTS[:3])),
        Corpus("task/qa", (), tuple(DOCUMENTS[3:]), tuple(some_questions()[:10])),
        Corpus("domain/medical", (), (), tuple(some_questions()[10:15])),
    ]


def test_evaluate_measures_every_corpus(
    base: Any, expert: Any, tokenizer: PreTrainedTokenizerFast, evaluated: list[Corpus]
) -> None:
    calls: list[int] = []
    result = evaluate(base, expert, tokenizer, evaluated, Evaluate(max_tokens=20), lambda: calls.append(1))
    over_documents = ["bits_per_byte", "perplexity", "kl"]
    assert {name: list(entry.metrics) for name, entry in result.corpora.items()} == {
        "language/en": over_documents,
        "task/qa": [*over_documents, "questions"],
        "domain/medical": ["questions"],
    }
    assert [(each.documents, each.questions) for each in result.corpora.values()] == [(3, 0), (3, 10), (0, 5)]
    assert (result.settings.max_tokens, result.settings.resamples) == (20, RESAMPLES)
    assert len(calls) == 2 + 2 * 2  # a batch of documents each, a batch of questions for each model
    rows = score_documents(base, expert, tokenizer, evaluated[0].evaluation, 20)
    assert result.corpora["language/en"].per_document == rows
    assert result.corpora["language/en"].metrics == document_metrics(rows, over_documents)
    assert [row.digest for row in rows] == [document.digest for document in evaluated[0].evaluation]
    asked = evaluated[1].questions
    right = [answer_questions(model, tokenizer, asked) for model in (base, expert)]
    assert result.corpora["task/qa"].metrics["questions"] == paired_answers(asked, *right).measured()
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert Evaluation.from_document(document) == result


@pytest.mark.parametrize(
    ("metrics", "measured"),
    [
        (["kl"], [["kl"], ["kl"], []]),
        (["questions"], [[], ["questions"], ["questions"]]),
        (["questions", "bits_per_byte"], [["bits_per_byte"], ["bits_per_byte", "questions"], ["questions"]]),
    ],
)
def test_evaluate_measures_what_is_asked_for(
    base: Any,
    expert: Any,
    tokenizer: PreTrainedTokenizerFast,
    evaluated: list[Corpus],
    metrics: list[Any],
    measured: list[list[str]],
) -> None:
    result = evaluate(base, expert, tokenizer, evaluated, Evaluate(metrics=metrics))
    assert [list(each.metrics) for each in result.corpora.values()] == measured
    assert all(
        bool(each.per_document) == (each.documents > 0 and metrics != ["questions"]) for each in result.corpora.values()
    )
