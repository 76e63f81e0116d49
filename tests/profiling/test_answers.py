"""Conversations in the passes: the loss counts on answers, and other tokens weigh as the spec says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Tokens, make_batches
from expertprune.models.passes import TextRun
from tests.masks import Masks, Tiny, assert_near, measured, tiny, token_lists
from tests.profiling.test_forward import reference

pytestmark = pytest.mark.usefixtures("not_halved")

IDS = token_lists()
# The first document is plain; the others are conversations, of which every third token is an answer's.
ANSWERS = [None, *([place % 3 == 1 for place in range(len(ids))] for ids in IDS[1:])]
PAIRS = list(zip(IDS, ANSWERS, strict=True))
WEIGHT = 0.25
WEIGHTS = [np.ones(len(ids)) if own is None else np.where(own, 1.0, WEIGHT) for ids, own in PAIRS]


def conversations(of: Tiny, weight: float = WEIGHT, masked: bool = True, tokens_per_batch: int = 30) -> TextRun:
    tokens = [Tokens(tuple(ids), tuple(own) if own is not None and masked else None) for ids, own in PAIRS]
    return TextRun(of.model, of.family, of.shapes, make_batches(tokens, tokens_per_batch, 63, prompt_weight=weight))


def by_name(masks: Masks, rows: list[Any]) -> dict[str, Tensor]:
    """Of neurons and heads; the gradients of KV groups are sums of the latter."""
    values = [torch.stack(each) for each in zip(*rows, strict=True)]
    return {name: each for name, each in zip(masks.names(), values, strict=True) if not name.startswith("groups")}


def test_gradients_are_those_of_the_mean_loss_of_answers() -> None:
    of = tiny("llama")
    exact = of.double()
    masks, rows = Masks(exact, range(len(of.shapes))), []
    with masks.hooked():
        for ids, answers in PAIRS:
            row = torch.tensor([ids])
            each = nn.functional.cross_entropy(exact.model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
            counted = each if answers is None else each[torch.tensor(answers[1:])]
            rows.append(torch.autograd.grad(counted.mean(), masks.leaves))
    found = measured(conversations(of), "language_model")
    for name, values in by_name(masks, rows).items():
        assert_near(found[f"{name}.value"], values, 1e-5, name)


def test_statistics_weigh_tokens() -> None:
    of = tiny("llama")
    found = measured(conversations(of), "forward")
    assert found["tokens"].tolist() == [len(ids) - 1 if own is None else sum(own[1:]) for ids, own in PAIRS]
    for name, values in reference(of, WEIGHTS).items():
        assert_near(found[name], torch.tensor(values), 1e-5, name)


def test_probabilities_of_rows_are_those_where_answers_are_predicted() -> None:
    """Of the last token of each, they count as it does: the first document is a text, and others may end in an answer."""
    of = tiny("llama")
    found = measured(conversations(of), "vocabulary")
    expected = torch.zeros(found["mass"].shape, dtype=torch.float64)
    for fold, (ids, answers) in zip(found["fold"].tolist(), PAIRS, strict=True):
        with torch.no_grad():
            chances = torch.softmax(of.model(torch.tensor([ids])).logits[0].double(), -1)
        counts = [True] * len(ids) if answers is None else [*answers[1:], answers[-1]]
        expected[fold] += chances[torch.tensor(counts)].sum(0)
    torch.testing.assert_close(found["mass"], expected.float(), rtol=1e-5, atol=1e-6)
    assert found["occurrences"].sum() == sum(map(len, IDS))  # the rows of prompts are needed as they are


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_regional_gradients_are_those_of_the_whole_model_with_one_layer_masked(family: str) -> None:
    """How the mean norm of that layer's output changes with its masks."""
    of = tiny(family)
    exact, outputs = of.double(), list[Any]()
    found = [measured(conversations(of, tokens_per_batch=batch), "regional") for batch in (1, 30)]
    for index, layer in enumerate(exact.model.model.layers):
        masks, rows = Masks(exact, [index]), []
        handle = layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        with masks.hooked():
            for ids, each in zip(IDS, WEIGHTS, strict=True):
                exact.model(input_ids=torch.tensor([ids]), use_cache=False)
                weights, norms = torch.tensor(each), outputs.pop()[0].square().sum(-1).sqrt()
                rows.append(torch.autograd.grad((norms * weights).sum() / weights.sum(), masks.leaves))
        handle.remove()
        for name, values in by_name(masks, rows).items():
            for cut in found:
                assert_near(cut[f"{name}.value"], values, 1e-5, name)


def test_statistics_of_routed_experts_weigh_tokens() -> None:
    of = tiny("qwen2_moe")
    none, part, whole = (measured(conversations(of, weight), "forward") for weight in (0.0, WEIGHT, 1.0))
    plain = measured(conversations(of, masked=False), "forward")
    sums = [f"experts.{layer}.{name}" for layer in range(3) for name in ("routed", "norm_sum")]
    sums += [f"ffn.{layer}.{name}" for layer in range(3) for name in ("sum", "square_sum")]
    for name in sums:  # a sum is linear in the weight
        assert_near(part[name], (1 - WEIGHT) * none[name] + WEIGHT * whole[name], 1e-5, name)
    for name in (*sums, "ffn.1.rms", "experts.1.frequency", "experts.1.impact"):
        assert_near(whole[name], plain[name], 1e-5, name)
    counted = torch.tensor([float(len(ids) if own is None else sum(own)) for ids, own in PAIRS])
    assert_near(none["experts.0.routed"].sum(1), 2 * counted, 1e-6)  # two routed experts a token
    assert_near(none["experts.0.frequency"].sum(1), torch.full((len(IDS),), 2.0), 1e-6)
