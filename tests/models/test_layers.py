"""The layer-by-layer pass is the model's own forward pass, and leaves no trace on the model."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.arch import family_of
from expertprune.corpora.batches import Batch
from expertprune.models.layers import observed
from expertprune.models.masking import masked
from expertprune.models.passes import Stream, real_tokens
from expertprune.units import KeptUnits, LayerShape
from tests import oracle
from tests.masks import tiny_of, token_lists
from tests.oracle import logits_of, random_units
from tests.tiny import tiny_model

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS = [("llama", {}), ("qwen2", {}), ("qwen2", SLIDING), ("gemma3_text", {})]


def before_final_norm(model: Any, ids: list[int]) -> Tensor:
    """Hidden states after the last layer of one document alone, `[tokens, hidden]`, from the model's own forward."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def run_to_the_end(model: Any, tokens_per_batch: int) -> Stream:
    with torch.inference_mode():
        return tiny_of(model).text(token_lists(), tokens_per_batch).finish()


def module_state(model: Any) -> list[tuple[str, int, int, int]]:
    """Every module by name and identity, with the number of its hooks."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(("family", "changes"), MODELS, ids=["llama", "qwen2", "qwen2-sliding", "gemma3"])
def test_layers_in_a_row_equal_the_whole_forward_pass_of_each_document(family: str, changes: dict[str, Any]) -> None:
    model, documents = tiny_model(family, **changes), token_lists()
    modules, names = module_state(model), list(model.state_dict())
    expected = [before_final_norm(model, ids) for ids in documents]
    for tokens_per_batch in (1, 16, 10_000):
        stream, compared = run_to_the_end(model, tokens_per_batch), []
        for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
            for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
                torch.testing.assert_close(hidden[row, :length], expected[document], rtol=1e-5, atol=1e-5)
                compared.append(document)
        assert sorted(compared) == list(range(len(documents)))
    assert (module_state(model), list(model.state_dict())) == (modules, names)


def test_an_error_in_the_decoder_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    modules = module_state(model)
    with pytest.raises(IndexError):
        tiny_of(model).text([*token_lists(), [3, 64, 5, 6]], 1).start()  # 64 is outside the vocabulary
    assert module_state(model) == modules


def test_observed_notes_the_last_call_of_one_module_while_it_is_open() -> None:
    model = tiny_model("llama")
    layer, modules = model.model.layers[0], module_state(model)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), contextlib.suppress(RuntimeError), observed(layer, "mlp.down_proj") as calls:
        layer.mlp.down_proj(x - 1)
        layer.mlp.down_proj(input=x)
        layer.mlp.up_proj(torch.ones(1, 24))
        assert module_state(model) != modules
        raise RuntimeError("an error takes the hook away, too")
    assert module_state(model) == modules
    assert list(calls) == ["mlp.down_proj"]
    assert torch.equal(calls["mlp.down_proj"].input, x)
    torch.testing.assert_close(calls["mlp.down_proj"].output, x @ layer.mlp.down_proj.weight.T)


@pytest.mark.parametrize("lengths", [(3, 1), (2, 3), (3, 3)])
def test_real_tokens_leaves_padding_out(lengths: tuple[int, ...]) -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), lengths, (0, 1))
    states = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    expected = [states[row, token].tolist() for row in range(2) for token in range(lengths[row])]
    assert real_tokens(batch, states).tolist() == expected


# --- the masked base ----------------------------------------------------------------------------------------------


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
    with oracle.masked(model, SimpleNamespace(kept=kept, shapes=SHAPES)):  # type: ignore[arg-type]
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
