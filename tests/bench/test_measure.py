"""What the quality tables measure, against sums written out token by token."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from bench import measure
from tests.tiny import WORDS, tiny_model, tiny_tokenizer


def tokenizer_of(bos: bool) -> Any:
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents of 7, 1, 12 and 6 words: 26 tokens."""
    ends = itertools.pairwise([0, 7, 8, 20, 26])
    rows = [{"text": " ".join(f"w{i}" for i in range(*each))} for each in ends]
    return write_rows(tmp_path / "text.jsonl", rows)


OWNERS = [0] * 7 + [1] + [2] * 12 + [3] * 6


def test_blocks_cut_the_text_of_all_documents_in_their_order(text: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(26)]
    found = measure.blocks(text, tokenizer, 99, length=5)
    # The 26th token is left out.
    assert found.ids.tolist() == [ids[0:5], ids[5:10], ids[10:15], ids[15:20], ids[20:25]]
    assert found.documents.tolist() == [OWNERS[i : i + 5] for i in (0, 5, 10, 15, 20)]
    spread = measure.blocks(text, tokenizer, 3, length=5)
    assert spread.ids.tolist() == [ids[0:5], ids[10:15], ids[20:25]]
    with pytest.raises(ValueError, match="26 tokens"):
        measure.blocks(text, tokenizer, 1, length=27)
    # They begin with a BOS where the tokenizer adds one.
    found = measure.blocks(text, tokenizer_of(bos=True), 99, length=9)
    assert found.ids.tolist() == [[0, *ids[0:8]], [0, *ids[8:16]], [0, *ids[16:24]]]
    assert found.documents.tolist() == [[-1, *OWNERS[i : i + 8]] for i in (0, 8, 16)]


@pytest.mark.parametrize(("bos", "cap"), [(False, None), (True, 2.0)])
def test_losses_are_summed_by_the_document_of_the_predicted_token(
    text: Path, bos: bool, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_CHUNK", 7)  # more positions than are computed at once
    monkeypatch.setattr(measure, "_ROWS", 2)
    model = tiny_model("llama")
    model.config.final_logit_softcapping = cap  # as some families have it
    data = measure.blocks(text, tokenizer_of(bos), 99, length=9)
    nats, tokens = dict.fromkeys(range(4), 0.0), dict.fromkeys(range(4), 0)
    for ids, owners in zip(data.ids, data.documents.tolist(), strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().numpy()
        logits = cap * np.tanh(logits / cap) if cap else logits
        for place in range(1, len(ids)):
            scores = logits[place - 1]
            nats[owners[place]] += np.log(np.exp(scores).sum()) - scores[ids[place]]
            tokens[owners[place]] += 1
    found = measure.losses(model, data)
    seen = [d for d in range(4) if tokens[d]]
    assert found.tokens.tolist() == [tokens[d] for d in seen]
    np.testing.assert_allclose(found.nats, [nats[d] for d in seen], rtol=1e-5)
    assert found.perplexity == pytest.approx(np.exp(sum(nats.values()) / sum(tokens.values())), rel=1e-5)


def sums(nats: Any, tokens: Any) -> measure.Sums:
    return measure.Sums(np.array(nats), np.array(tokens, dtype=np.float64))


def test_excess_is_the_log_ratio_of_the_perplexities_with_an_interval_over_documents() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(50, 500, 40)
    rates = generator.normal(3.5, 0.4, 40)
    base, expert = sums(3.0 * tokens, tokens), sums(rates * tokens, tokens)
    found = measure.excess(base, expert)
    assert found.value == pytest.approx(np.log(expert.perplexity / base.perplexity))
    # The standard error of a ratio of sums, by linearization: documents vary by their own excess times their length.
    deviations = (rates - 3.0 - found.value) * tokens
    error = np.sqrt((deviations**2).sum()) / tokens.sum()
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
    assert measure.excess(base, expert) == found != measure.excess(base, expert, seed=1)
    # Of equal losses it is zero, and of a constant certain.
    base = sums([10.0, 40.0, 6.0], [5, 20, 2])
    assert measure.excess(base, base) == measure.Excess(0, 0, 0)
    found = measure.excess(base, sums([12.5, 50.0, 7.0], [5, 20, 2]))  # half a nat more per token
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="different tokens"):
        measure.excess(base, sums([10.0, 40.0, 6.0], [5, 2, 20]))


def test_piqa_counts_the_solutions_of_higher_likelihood_per_byte(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        goal, *choices = (" ".join(generator.choice(WORDS, size)) for size in generator.integers(1, 6, 3))
        rows.append({"goal": goal, "choices": choices, "label": int(generator.integers(0, 2))})
    path = write_rows(tmp_path / "piqa.jsonl", rows)
    right = []
    for row in rows[:10]:
        scores = []
        for choice in row["choices"]:
            prompt, answer = (tokenizer(each)["input_ids"] for each in (f"Question: {row['goal']}\nAnswer:", choice))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            scores.append(float(logits[range(len(prompt) - 1, len(logits) - 1), answer].sum()) / len(choice.encode()))
        right.append(float(scores.index(max(scores)) == row["label"]))
    assert 0 < sum(right) < 10
    assert measure.piqa_answers(model, tokenizer, path, 10).tolist() == right
