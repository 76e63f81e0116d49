"""Measuring against slow references: one document, one choice, one resample at a time."""

from __future__ import annotations

import json
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from expertprune.artifacts.evaluation import DocumentBits, Evaluation
from expertprune.corpora.chat import render
from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.corpora.generated import Opening
from expertprune.evaluation import reading
from expertprune.evaluation.documents import score_alone
from expertprune.evaluation.measure import Measuring
from expertprune.evaluation.questions import answer_questions, choices_of, paired_answers
from expertprune.evaluation.retention import (
    RESAMPLES,
    Counted,
    bits_per_byte,
    bootstrap,
    document_metrics,
    summarize,
)
from expertprune.models import passes
from expertprune.models.passes import TextRun
from expertprune.spec.schema import Evaluate
from tests.corpora.test_chat import CHATML, TWO_TURNS, chat_tokenizer
from tests.corpora.test_chat import document as conversation
from tests.scoring import score_documents
from tests.tiny import WORDS, as_run, tiny_model, tiny_tokenizer

Floats = NDArray[np.float64]
VOCABULARY = [*WORDS, *(f"w{i}" for i in range(46))]


# Words of the tiny tokenizer, one token each; a single one predicts nothing.
TEXTS = [list(np.random.default_rng(seed).choice(VOCABULARY, size)) for seed, size in enumerate((7, 1, 15, 4, 30, 2))]
DOCUMENTS = [Document(" ".join(text)) for text in TEXTS]
Models = tuple[TextRun, TextRun, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def models() -> Models:
    return as_run(tiny_model("llama", seed=0)), as_run(tiny_model("llama", seed=1)), tiny_tokenizer()


def log_probabilities(run: TextRun, ids: list[int]) -> Floats:
    """Natural logarithms of what follows each token of one sequence alone, `[tokens, vocabulary]`."""
    with torch.inference_mode():
        logits = run.model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize(("tokens_per_batch", "logits"), [(1024, 2**25), (20, 6 * 64), (1024, 1)])
def test_scores_equal_those_of_each_document_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int, logits: int
) -> None:
    base, expert, tokenizer = models
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(passes, "LOGITS", logits)
    seen: list[int] = []
    hook = base.model.lm_head.register_forward_hook(lambda _, __, found: seen.append(found.shape[:-1].numel()))
    rows = score_documents(base, expert, tokenizer, DOCUMENTS, 20)
    hook.remove()
    assert max(seen) <= max(1, logits // (2 * 64))  # of each of two models
    for row, text in zip(rows, TEXTS, strict=True):
        ids = tokenizer(" ".join(text))["input_ids"][:20]
        p, q = (log_probabilities(model, ids)[:-1] / math.log(2) for model in (base, expert))
        mine, theirs = (-logs[range(len(ids) - 1), ids[1:]].sum() for logs in (p, q))
        distance = (2**p * (p - q)).sum()
        assert (row.base_bits, row.expert_bits, row.kl_bits) == pytest.approx((mine, theirs, distance), rel=1e-5)
        assert distance > 0.01 or len(text) == 1
        assert row.agreed == (p.argmax(1) == q.argmax(1)).sum()
        assert row.tokens == row.expert_tokens == min(len(text), 20) - 1
        size = len(" ".join(text[:20])) - len(text[0])  # the blank is predicted with the second word
        assert row.bytes == row.expert_bytes == size


WORDS_OF_OTHER = ["is", "n't", ".", "über", "日本", "heart"]


def other_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One that puts a token before the text, and knows words of several bytes."""
    names = ["<s>", "</s>", "<unk>", *WORDS_OF_OTHER]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **settings
    )


@pytest.mark.parametrize(
    ("text", "max_tokens", "tokens", "size", "tidy"),
    [
        ("über 日本", 20, 2, 5 + 1 + 6, False),  # a token before the text; ü has two bytes, the others three
        ("über heart is 日本", 3, 2, 5 + 1 + 5, False),  # cut short: the first token and two words
        ("heart is n't über .", 20, 5, 20, True),  # blanks that the tokenizer tidies away
        ("heart is purple", 20, 3, 15, False),  # a word that the tokenizer does not know
    ],
)
def test_bytes_are_those_of_the_text_that_is_predicted(
    models: Models, text: str, max_tokens: int, tokens: int, size: int, tidy: bool
) -> None:
    tokenizer = other_tokenizer(clean_up_tokenization_spaces=tidy)
    (row,) = score_documents(*models[:2], tokenizer, [Document(text)], max_tokens)
    assert (row.tokens, row.bytes) == (tokens, size)


def test_of_conversations_answers_alone_count() -> None:
    tokenizer, talk, plain = chat_tokenizer(CHATML), conversation(TWO_TURNS), Document("the heart pumps blood")
    base, expert = (as_run(tiny_model("llama", seed=seed, vocab_size=len(tokenizer))) for seed in (0, 1))
    ids = tokenizer(render(talk, tokenizer).text, add_special_tokens=False)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    # "<|im_start|> assistant" begins an answer of two words and its end.
    answers = [place for place in range(len(words)) if "assistant" in words[max(0, place - 3) : place]]
    assert [words[place] for place in answers] == ["pumps", "blood", "<|im_end|>", "reads", "law", "<|im_end|>"]
    before = [place - 1 for place in answers]
    mine, theirs = (log_probabilities(model, ids)[before] / math.log(2) for model in (base, expert))
    needed = [-logs[range(6), [ids[place] for place in answers]].sum() for logs in (mine, theirs)]
    row, other = score_documents(base, expert, tokenizer, [talk, plain], 99)
    assert (row.tokens, row.bytes) == (6, len("pumps blood") + len("reads law"))
    assert (other.tokens, other.bytes) == (3, len(" heart pumps blood"))
    assert (row.base_bits, row.expert_bits) == pytest.approx(needed, rel=1e-5)
    assert row.agreed == (mine.argmax(1) == theirs.argmax(1)).sum()
    (alone, _), tokens, _ = score_alone(expert, tokenizer, [talk, plain])
    assert alone == pytest.approx(needed[1], rel=1e-5)
    assert tokens.tolist() == [6, 3]


SCORES = {
    "base_bits": [10.0, 20.0, 6.0],
    "expert_bits": [12.0, 30.0, 6.0],
    "kl_bits": [1.0, 2.0, 0.5],
    "agreed": [4, 2, 2],
    "tokens": [5, 5, 2],
    "bytes": [20, 40, 12],
}


def rows_of(scores: dict[str, list[Any]]) -> list[DocumentBits]:
    rows = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    return [
        DocumentBits(**{"digest": digest, "expert_tokens": row["tokens"], "expert_bytes": row["bytes"], **row})
        for digest, row in zip("abc", rows, strict=False)
    ]


def test_metrics_over_documents_written_out() -> None:
    metrics = document_metrics(rows_of(SCORES), ["bits_per_byte", "perplexity", "kl", "agreement", "questions"])
    base, expert, kl, agreed, tokens, _ = np.array(list(SCORES.values()))[
        :, np.random.default_rng(0).integers(0, 3, size=(RESAMPLES, 3))
    ].sum(2)  # of each resample
    expected: dict[str, tuple[dict[str, float], Floats]] = {
        "bits_per_byte": ({"base": 36 / 72, "expert": 48 / 72, "retention": 36 / 48}, base / expert),
        "perplexity": ({"base": 2**3, "expert": 2**4, "retention": 0.5}, 2 ** ((base - expert) / tokens)),
        "kl": ({"expert": 3.5 / 12}, kl / tokens),
        "agreement": ({"expert": 8 / 12}, agreed / tokens),
    }
    assert metrics.keys() == expected.keys()
    for name, (numbers, resampled) in expected.items():
        outside = NormalDist().cdf(-4.3027 * math.sqrt(3 / 2))  # Student's t of 2 degrees, see `retention.tail`
        low, high = np.quantile(resampled, [outside, 1 - outside])
        found = metrics[name].model_dump(exclude_none=True)
        assert found == pytest.approx({"examples": 3, **numbers, "low": low, "high": high})
        assert low < found.get("retention", found["expert"]) < high
    two, all_three = (
        rows_of({key: [*[0] * idle, *values[:2]] for key, values in SCORES.items()}) for idle in (0, 1)
    )  # the first of three predicts nothing
    for name, numbers in document_metrics(two, expected).items():
        assert None not in (numbers.low, numbers.high)
        assert document_metrics(all_three, [name])[name] == numbers
        assert numbers.examples == 2
    averages = [summarize([Counted("x", "expert", bits_per_byte(rows))]) for rows in (two, all_three)]
    assert averages[0] == averages[1]
    for known in (1, 0):  # the others predict nothing
        few = rows_of({key: [*values[:known], 0, 0] for key, values in SCORES.items()})
        for numbers in document_metrics(few, expected).values():
            assert (numbers.expert is not None, numbers.low, numbers.high) == (known == 1, None, None)


def test_bootstrap_is_seeded_and_leaves_out_what_is_not_finite() -> None:
    many = np.random.default_rng(4).exponential(size=11)
    first, same, other = (bootstrap(lambda i: many[i].mean(1), 11, seed=seed) for seed in (0, 0, 1))
    assert first == same != other
    values = np.array([1.0, 2.0, 4.0])
    holes = bootstrap(lambda i: np.where(i[:, 0] == 0, np.nan, values[i[:, 0]]), 3)
    assert holes == (2.0, 4.0)
    assert all(math.isnan(end) for end in bootstrap(lambda i: np.full(len(i), np.inf), 3))


def likelihoods(model: TextRun, tokenizer: PreTrainedTokenizerFast, question: Question) -> Floats:
    """Log-likelihood of each choice after the prompt, of one choice at a time."""
    prompt = tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
    found = []
    for choice in question.choices:
        ids = tokenizer(f"Question: {question.question}\nAnswer: {choice}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        following = range(len(prompt), len(ids))
        found.append(log_probabilities(model, ids)[[p - 1 for p in following], [ids[p] for p in following]].sum())
    return np.array(found)


def some_questions(names: list[str] = VOCABULARY) -> list[Question]:
    """Of two to five choices, of one to five words."""
    generator, questions = np.random.default_rng(3), []
    for number in range(20):
        first, *choices = (" ".join(generator.choice(names, generator.integers(1, 6))) for _ in range(3 + number % 4))
        questions.append(Question(first, tuple(choices), int(generator.integers(0, len(choices)))))
    return questions


@pytest.mark.parametrize(
    ("tokens_per_batch", "tokenizer", "names"),
    [(1024, tiny_tokenizer(), VOCABULARY), (100, other_tokenizer(), WORDS_OF_OTHER)],
    ids=["together", "after a token that begins every text"],
)
def test_answers_equal_those_of_each_choice_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int, tokenizer: Any, names: list[str]
) -> None:
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", tokens_per_batch)
    expected, without_length, questions = [], [], some_questions(names)
    for question in questions:
        sums = likelihoods(models[0], tokenizer, question)
        sizes = [len(choice.encode()) for choice in question.choices]
        expected.append(float((sums / sizes).argmax() == question.answer))
        without_length.append(float(sums.argmax() == question.answer))
    assert answer_questions(models[0], tokenizer, questions).tolist() == expected
    assert 0 < sum(expected) < len(questions)
    assert expected != without_length


def test_the_end_that_some_tokenizers_put_behind_a_text_is_not_behind_one_that_goes_on() -> None:
    plain, ending = other_tokenizer(), other_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    questions = [*some_questions(WORDS_OF_OTHER), Question("heart", ("is </s>", "is"), 0)]  # an end of its own
    assert choices_of(questions, ending) == choices_of(questions, plain)
    opening = Opening(Document("heart is"))
    assert opening.ids(ending) == opening.ids(plain) == plain("heart is")["input_ids"]


def test_chance_of_a_question_set_is_the_mean_over_its_questions() -> None:
    questions = [Question("q", ("a", "b"), 0)] * 3 + [Question("q", ("a", "b", "c", "d"), 0)] * 3
    base, expert = np.array([1.0, 1, 1, 1, 1, 0]), np.array([1.0, 1, 0, 1, 0, 1])
    found = paired_answers(questions, base, expert).measured()
    chance = (3 * 1 / 2 + 3 * 1 / 4) / 6  # 0.375
    assert (found.examples, found.chance, found.base, found.expert) == (6, chance, 5 / 6, 4 / 6)
    assert found.retention == pytest.approx((4 / 6 - 0.375) / (5 / 6 - 0.375))
    assert (found.lost, found.gained) == (2, 1)


def test_evaluate_measures_every_corpus(models: Models) -> None:
    evaluated = [
        Corpus(CorpusName.parse("language/en"), (), tuple(DOCUMENTS[:3])),
        Corpus(CorpusName.parse("task/qa"), (), tuple(DOCUMENTS[3:]), tuple(some_questions()[:10])),
        Corpus(CorpusName.parse("domain/medical"), (), (), tuple(some_questions()[10:15])),
    ]
    base, expert, tokenizer = models
    calls: list[int] = []
    measuring = Measuring(base, tokenizer, evaluated, Evaluate(max_tokens=20))
    batches, steps = len(measuring.batches), measuring.steps(layers=3)
    result = measuring.against(expert, lambda: calls.append(1))
    assert len(calls) == steps == 2 * 3 + batches  # layers of both, then the batches behind the last layer
    assert measuring.against(expert, lambda: calls.append(1)) == result
    assert len(calls) - steps == measuring.steps(3) == 3 + batches, "the base has read already"
    over_documents: list[Any] = ["bits_per_byte", "perplexity", "kl", "agreement"]
    found = list(result.corpora.values())
    assert [list(each.metrics) for each in found] == [over_documents, [*over_documents, "questions"], ["questions"]]
    assert [(each.documents, each.questions) for each in found] == [(3, 0), (3, 10), (0, 5)]
    assert (result.settings.max_tokens, result.settings.resamples) == (20, RESAMPLES)
    rows = score_documents(*models, evaluated[0].evaluation, 20)
    assert found[0].per_document == rows
    assert found[0].metrics == document_metrics(rows, over_documents)
    asked = evaluated[1].questions
    right = [answer_questions(model, tokenizer, asked) for model in (base, expert)]
    assert found[1].metrics["questions"] == paired_answers(asked, *right).measured()
    assert Evaluation.from_document(json.loads(json.dumps(result.document(), allow_nan=False))) == result
    alone = Measuring(base, tokenizer, evaluated, Evaluate(metrics=["kl"])).against(expert).corpora.values()
    assert [(list(each.metrics), bool(each.per_document)) for each in alone] == [(["kl"], True)] * 2 + [([], False)]
