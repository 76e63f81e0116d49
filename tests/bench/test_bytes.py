"""Rounded weights and their bytes, by hand."""

from __future__ import annotations

import pytest
import torch

from bench.bytes import SCHEMES, Scheme, quantized, rounded
from tests.tiny import tiny_model


def test_weights_are_rounded_group_by_group() -> None:
    weight = torch.tensor([[0.0, 7.5, -7.5, 2.4, 0.0, 0.0, 15.0, -3.1]])
    # Scales 7.5 / 7.5 and 15 / 7.5; steps 0, 7 (8 is too many), -8, 2 and 0, 0, 7, -2.
    assert rounded(weight, bits=4, group=4).tolist() == [[0, 7, -8, 2, 0, 0, 14, -4]]
    row = torch.tensor([[127.5, -127.5, 0.4, 63.6]])
    assert rounded(row, bits=8, group=4).tolist() == [[127, -128, 0, 64]]
    assert rounded(torch.zeros(1, 4), bits=4, group=4).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("scheme", [each for each in SCHEMES.values() if each is not None])
def test_linear_layers_of_the_decoder_alone_are_smaller(scheme: Scheme) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **sizes, head_dim=16, tie_word_embeddings=True).to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    small, size = quantized(model, scheme)
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
