"""Weights at fewer bits, and their bytes, by hand; GPTQ against least squares, column by column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.bytes import SCHEMES
from bench.rounding import DAMPING, Scheme, gptq, nearest, quantized
from expertprune.corpora.batches import make_batches
from tests.tiny import tiny_model


def test_weights_are_rounded_group_by_group() -> None:
    weight = torch.tensor([[0.0, 7.5, -7.5, 2.4, 0.0, 0.0, 15.0, -3.1]])
    # Scales 7.5 / 7.5 and 15 / 7.5; steps 0, 7 (8 is too many), -8, 2 and 0, 0, 7, -2.
    assert nearest(weight, bits=4, group=4).tolist() == [[0, 7, -8, 2, 0, 0, 14, -4]]
    assert nearest(torch.tensor([[127.5, -127.5, 0.4, 63.6]]), bits=8, group=4).tolist() == [[127, -128, 0, 64]]
    assert nearest(torch.zeros(1, 4), bits=4, group=4).tolist() == [[0, 0, 0, 0]]


def test_gptq_refits_what_is_left_after_each_column() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 8, generator=generator) for rows in (5, 40))
    inputs[:, 1] += inputs[:, 0]  # columns that can take each other's part
    found = gptq(weight, inputs.T @ inputs, bits=4, group=4).numpy()
    x = inputs.double().numpy()
    rows = np.concatenate([x, np.sqrt(DAMPING * (x**2).sum() / 8) * np.eye(8)])
    wanted = rows @ weight.double().numpy().T
    scales = np.zeros(5)
    for column in range(8):
        rest = wanted - rows[:, :column] @ found[:, :column].T.astype(np.float64)
        left = np.linalg.lstsq(rows[:, column:], rest, rcond=None)[0].T  # [out, columns left]
        if column % 4 == 0:
            scales = torch.tensor(np.abs(left[:, :4]).max(1) / 7.5).bfloat16().double().numpy()
        expected = np.clip(np.round(left[:, 0] / scales), -8, 7) * scales
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, nearest(weight, bits=4, group=4).numpy())


@pytest.mark.parametrize("scheme", [each for each in SCHEMES.values() if each is not None])
def test_linear_layers_of_the_decoder_alone_are_smaller(scheme: Scheme) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **sizes, head_dim=16, tie_word_embeddings=True).to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    small, size = quantized(model, scheme, make_batches([list(range(2, 60))], 64))
    expected = 0.0
    for name, parameter in small.named_parameters():
        linear = name.endswith("proj.weight")
        assert torch.equal(parameter, before[name]) != linear
        expected += parameter.numel() * (scheme.bits / 8 if linear else 2)
        if linear:
            rows, width = parameter.shape
            expected += 2 * rows * ({64: 2, 128: 1}[width] if scheme.grouped else 1)
    assert size == expected
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
