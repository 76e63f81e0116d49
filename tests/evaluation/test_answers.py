"""Conversations in evaluation: answers alone count, each in its own model's tokens."""

from __future__ import annotations

import math

import pytest
import torch

from expertprune.arch import family_of
from expertprune.corpora.chat import render
from expertprune.corpora.documents import Document
from expertprune.evaluation.documents import score_alone
from expertprune.models.passes import TextRun
from tests.corpora.test_chat import CHATML, TWO_TURNS, chat_tokenizer, document
from tests.scoring import score_documents
from tests.tiny import tiny_model


def test_bits_bytes_and_agreement_are_those_of_the_answers() -> None:
    tokenizer, talk = chat_tokenizer(CHATML), document(TWO_TURNS)
    models = [tiny_model("llama", seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1)]
    base, expert = (TextRun(model, family_of("llama"), (), ()) for model in models)
    ids = torch.tensor([tokenizer(render(talk, tokenizer).text, add_special_tokens=False)["input_ids"]])
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    # "<|im_start|> assistant" begins an answer of two words and its end.
    answers = [place for place in range(len(words)) if "assistant" in words[max(0, place - 3) : place]]
    assert [words[place] for place in answers] == ["pumps", "blood", "<|im_end|>", "reads", "law", "<|im_end|>"]
    mine, theirs = (model(input_ids=ids).logits[0].detach().double().log_softmax(-1) for model in models)

    def bits(chances: torch.Tensor) -> float:
        return -sum(float(chances[place - 1, ids[0, place]]) for place in answers) / math.log(2)

    plain = Document("the heart pumps blood")
    row, other = score_documents(base, expert, tokenizer, [talk, plain], 99)
    assert (row.tokens, row.bytes) == (6, len("pumps blood") + len("reads law"))
    assert (other.tokens, other.bytes) == (3, len(" heart pumps blood"))
    assert (row.base_bits, row.expert_bits) == (pytest.approx(bits(mine), 1e-5), pytest.approx(bits(theirs), 1e-5))
    assert row.agreed == sum(int(mine[place - 1].argmax() == theirs[place - 1].argmax()) for place in answers)
    (alone, _), tokens, _ = score_alone(expert, tokenizer, [talk, plain])
    assert alone == pytest.approx(bits(theirs), 1e-5)
    assert tokens.tolist() == [6, 3]
