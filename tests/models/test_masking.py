"""The masked base: the same as hooks that mask, gone without a trace, and its divergence against whole logits."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from expertprune.arch import family_of
from expertprune.models.masking import masked
from expertprune.units import KeptUnits, LayerShape
from tests import oracle
from tests.oracle import logits_of, random_units
from tests.tiny import tiny_model

SHAPES = [LayerShape(hidden=24, ffn=32, query_heads=6, kv_heads=3, head_dim=4)] * 3
CUTS: dict[str, list[dict[str, int]]] = {
    "ffn": [{"ffn": 20}, {"ffn": 9}, {}],
    "query_heads": [{"heads_per_group": 1}, {}, {"heads_per_group": 1}],
    "kv_groups": [{"kv_groups": 1}, {"kv_groups": 2}, {}],
    "all": [{"ffn": 5, "heads_per_group": 1, "kv_groups": 2}, {"kv_groups": 2}, {"ffn": 30}],
}


def units(cut: str, seed: int = 0) -> list[KeptUnits]:
    generator = torch.Generator().manual_seed(seed)
    return [random_units(shape, generator, **kept) for shape, kept in zip(SHAPES, CUTS[cut], strict=True)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("cut", CUTS)
def test_masked_weights_are_masked_inputs(family: str, cut: str) -> None:
    model, kept = tiny_model(family), units(cut)
    dense = logits_of(model)
    with oracle.masked(model, SimpleNamespace(kept=kept)):  # type: ignore[arg-type]
        expected = logits_of(model)
    with masked(model, family_of(family), SHAPES, kept):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert float((expected - dense).abs().max()) > 0.1


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_bit_by_bit(fails: bool) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(RuntimeError), masked(model, family_of("llama"), SHAPES, units("all")):
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == [
            "model.layers.0.self_attn.o_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.self_attn.o_proj.weight",
            "model.layers.2.mlp.down_proj.weight",
        ]
        if fails:
            raise RuntimeError("in the middle")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_within_masks_come_off_in_turn() -> None:
    model, family = tiny_model("llama"), family_of("llama")
    outer, inner = units("ffn", seed=1), units("all", seed=2)
    with masked(model, family, SHAPES, outer):
        once = logits_of(model)
        with masked(model, family, SHAPES, inner):
            assert not torch.equal(logits_of(model), once)
        assert torch.equal(logits_of(model), once)
