"""Conversations in the passes: the loss counts on answers, and other tokens weigh as the spec says."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Tokens, make_batches
from expertprune.models.passes import TextRun
from tests.masks import Masks, Tiny, assert_near, layer_activations, measured, tiny, token_lists
from tests.patching import everywhere

IDS = token_lists()
# The first document is plain; the others are conversations, of which every third token is an answer's.
ANSWERS = [None, *([place % 3 == 1 for place in range(len(ids))] for ids in IDS[1:])]
WEIGHT = 0.25


@pytest.fixture(autouse=True)
def _not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay in float32, so that they compare closer than half precision allows."""
    everywhere(monkeypatch, "expertprune.artifacts.profile.halved", lambda name, values: {name: values})


def conversations(of: Tiny, tokens_per_batch: int) -> TextRun:
    tokens = [Tokens(tuple(ids), answers and tuple(answers)) for ids, answers in zip(IDS, ANSWERS, strict=True)]  # type: ignore[arg-type]
    batches = make_batches(tokens, tokens_per_batch, pad=63, prompt_weight=WEIGHT)
    return TextRun(of.model, of.family, of.shapes, batches)


def weights_of(ids: list[int], answers: list[bool] | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.ones(len(ids)) if answers is None else np.where(answers, 1.0, WEIGHT)


@pytest.mark.parametrize("tokens_per_batch", [1, 30])
def test_gradients_are_those_of_the_mean_loss_of_answers(tokens_per_batch: int) -> None:
    of = tiny("llama")
    exact = of.double()
    masks, rows = Masks(exact, range(len(of.shapes))), []
    with masks.hooked():
        for ids, answers in zip(IDS, ANSWERS, strict=True):
            row = torch.tensor([ids])
            each = nn.functional.cross_entropy(exact.model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
            counted = each if answers is None else each[torch.tensor(answers[1:])]
            rows.append(torch.autograd.grad(counted.mean(), masks.leaves))
    expected = dict(zip(masks.names(), (torch.stack(each) for each in zip(*rows, strict=True)), strict=True))
    found = measured(conversations(of, tokens_per_batch), "language_model")
    for layer in range(len(of.shapes)):
        for name in (f"ffn.{layer}", f"heads.{layer}"):
            assert_near(found[f"{name}.value"], expected[name], 1e-5, name)


@pytest.mark.parametrize("tokens_per_batch", [1, 30])
def test_statistics_weigh_tokens(tokens_per_batch: int) -> None:
    of = tiny("llama")
    expected: dict[str, list[Any]] = defaultdict(list)
    for ids, answers in zip(IDS, ANSWERS, strict=True):
        seen, weights = layer_activations(of, ids), weights_of(ids, answers)
        expected["tokens"].append(len(ids) - 1 if answers is None else sum(answers[1:]))
        expected["weights"].append(weights.sum())
        for index, layer in enumerate(of.model.model.layers):
            for name in (f"ffn.{index}", f"heads.{index}"):
                expected[f"{name}.rms"].append(np.sqrt(np.average(seen[name] ** 2, axis=0, weights=weights)))
                expected[f"{name}.sum"].append((seen[name] * weights[:, None]).sum(0))
                expected[f"{name}.square_sum"].append((seen[name] ** 2 * weights[:, None]).sum(0))
            expected[f"stream.{index}.square"].append(
                np.average((seen[f"stream.{index}"] ** 2).mean(1), weights=weights)
            )
            output = layer.self_attn.o_proj.weight.detach().double().numpy()
            for name, units in (("heads", 6), ("groups", 3)):
                pairs = zip(np.split(seen[f"heads.{index}"], units, 1), np.split(output, units, 1), strict=True)
                impact = [np.average(((part @ columns.T) ** 2).sum(1), weights=weights) for part, columns in pairs]
                expected[f"{name}.{index}.impact"].append(impact)
    found = measured(conversations(of, tokens_per_batch), "forward")
    for name, rows in expected.items():
        values = np.sum(rows, 0) if name.endswith("sum") else np.array(rows)
        assert_near(found[name], torch.tensor(values), 1e-5, name)


@pytest.mark.parametrize("tokens_per_batch", [1, 30])
def test_probabilities_of_rows_are_those_where_answers_are_predicted(tokens_per_batch: int) -> None:
    """Of the last token of each, they count as it does: the first document is a text, and others may end in an answer."""
    of = tiny("llama")
    found = measured(conversations(of, tokens_per_batch), "vocabulary")
    expected = torch.zeros(found["mass"].shape, dtype=torch.float64)
    for fold, ids, answers in zip(found["fold"].tolist(), IDS, ANSWERS, strict=True):
        with torch.no_grad():
            chances = torch.softmax(of.model(torch.tensor([ids])).logits[0].double(), -1)
        counts = [True] * len(ids) if answers is None else [*answers[1:], answers[-1]]
        expected[fold] += chances[torch.tensor(counts)].sum(0)
    torch.testing.assert_close(found["mass"], expected.float(), rtol=1e-5, atol=1e-6)
    assert found["occurrences"].sum() == sum(map(len, IDS))  # the rows of prompts are needed as they are


def test_regional_gradients_weigh_tokens() -> None:
    of = tiny("llama")
    exact = of.double()
    outputs: list[Tensor] = []
    found = measured(conversations(of, 30), "regional")
    for index, layer in enumerate(exact.model.model.layers):
        masks, rows = Masks(exact, [index]), []
        handle = layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        with masks.hooked():
            for ids, answers in zip(IDS, ANSWERS, strict=True):
                exact.model(input_ids=torch.tensor([ids]), use_cache=False)
                weights = torch.tensor(weights_of(ids, answers))
                norms = outputs.pop()[0].square().sum(-1).sqrt()
                rows.append(torch.autograd.grad((norms * weights).sum() / weights.sum(), masks.leaves))
        handle.remove()
        for name, values in zip(masks.names(), (torch.stack(each) for each in zip(*rows, strict=True)), strict=True):
            if not name.startswith("groups"):
                assert_near(found[f"{name}.value"], values, 1e-5, name)


def test_statistics_of_routed_experts_weigh_tokens() -> None:
    of = tiny("qwen2_moe")

    def statistics(weight: float, masked: bool = True) -> dict[str, Tensor]:
        answers = ANSWERS if masked else [None] * len(IDS)
        tokens = [Tokens(tuple(ids), own and tuple(own)) for ids, own in zip(IDS, answers, strict=True)]  # type: ignore[arg-type]
        batches = make_batches(tokens, 30, pad=63, prompt_weight=weight)
        return measured(TextRun(of.model, of.family, of.shapes, batches), "forward")

    none, part, whole, plain = statistics(0.0), statistics(WEIGHT), statistics(1.0), statistics(1.0, masked=False)
    sums = [f"experts.{layer}.{name}" for layer in range(3) for name in ("routed", "norm_sum")]
    sums += [f"ffn.{layer}.{name}" for layer in range(3) for name in ("sum", "square_sum")]
    for name in sums:  # a sum is linear in the weight
        assert_near(part[name], (1 - WEIGHT) * none[name] + WEIGHT * whole[name], 1e-5, name)
    for name in (*sums, "ffn.1.rms", "experts.1.frequency", "experts.1.impact"):
        assert_near(whole[name], plain[name], 1e-5, name)
    counted = torch.tensor(
        [float(len(ids) if own is None else sum(own)) for ids, own in zip(IDS, ANSWERS, strict=True)]
    )
    assert_near(none["experts.0.routed"].sum(1), 2 * counted, 1e-6)  # two routed experts a token
    assert_near(none["experts.0.frequency"].sum(1), torch.full((len(IDS),), 2.0), 1e-6)
