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
from expertprune.models.masking import masked
from expertprune.models.passes import _alike, _one_row, real_tokens
from expertprune.units import LayerShape
from tests import oracle
from tests.masks import tiny_of, token_lists
from tests.oracle import logits_of, random_units
from tests.tiny import tiny_model

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def before_final_norm(model: Any, ids: list[int]) -> Tensor:
    """Hidden states after the last layer of one document alone, `[tokens, hidden]`, from the model's own forward."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def module_state(model: Any) -> list[tuple[str, int, int, int]]:
    """Every module by name and identity, with the number of its hooks."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", SLIDING), ("gemma3_text", {})], ids=str)
def test_layers_in_a_row_equal_the_whole_forward_pass_of_each_document(family: str, changes: dict[str, Any]) -> None:
    model, documents = tiny_model(family, **changes), token_lists()
    modules = module_state(model)
    expected = [before_final_norm(model, ids) for ids in documents]
    for tokens_per_batch in (1, 16, 10_000):
        with torch.inference_mode():
            stream = tiny_of(model).text(documents, tokens_per_batch).finish()
        compared = []
        for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
            for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
                torch.testing.assert_close(hidden[row, :length], expected[document], rtol=1e-5, atol=1e-5)
                compared.append(document)
        assert sorted(compared) == list(range(len(documents)))
    assert module_state(model) == modules


def test_an_error_in_the_decoder_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("in the decoder")

    model.model.norm.register_forward_hook(fail)
    modules = module_state(model)
    with pytest.raises(RuntimeError, match="in the decoder"):
        tiny_of(model).text(token_lists(), 1).start()
    assert module_state(model) == modules


def test_real_tokens_leaves_padding_out() -> None:
    states = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    for lengths in ((2, 3), (3, 3)):
        batch = Batch(torch.zeros(2, 3, dtype=torch.int64), lengths, (0, 1))
        expected = [states[row, token].tolist() for row in range(2) for token in range(lengths[row])]
        assert real_tokens(batch, states).tolist() == expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_masked_weights_are_masked_inputs_and_come_back_bit_by_bit(family: str) -> None:
    model, generator = tiny_model(family), torch.Generator().manual_seed(0)
    shapes = [LayerShape(hidden=24, ffn=32, query_heads=6, kv_heads=3, head_dim=4)] * 3
    cuts: list[dict[str, int]] = [{"ffn": 5, "heads_per_group": 1, "kv_groups": 2}, {"kv_groups": 2}, {"ffn": 30}]
    kept = [random_units(shape, generator, **cut) for shape, cut in zip(shapes, cuts, strict=True)]
    dense, before = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    with oracle.masked(model, SimpleNamespace(kept=kept, shapes=shapes)):  # type: ignore[arg-type]
        expected = logits_of(model)
    with contextlib.suppress(RuntimeError), masked(model, family_of(family), shapes, kept):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        cut_here = ["0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "2.mlp.down_proj"]
        assert changed == [f"model.layers.{module}.weight" for module in cut_here]
        raise RuntimeError("an error takes the mask off, too")
    assert float((expected - dense).abs().max()) > 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
def test_batches_of_one_shape_share_what_the_layers_are_given(family: str) -> None:
    """Masks of eager attention and of windows take as much memory as hidden states."""
    documents = [[number, 5, 6, 7, 8, 9, 10, 11] for number in range(1, 6)]
    stream = tiny_of(tiny_model(family)).text(documents, 16).start()
    rows = [len(batch.ids) for batch in stream.batches]
    assert sorted(rows) == [1, 2, 2]
    (first, second), (other,) = ([i for i, count in enumerate(rows) if count == wanted] for wanted in (2, 1))
    assert stream.arguments[first] is stream.arguments[second]
    assert stream.arguments[first] is not stream.arguments[other]


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_batch_holds_each_mask_once_for_all_its_rows(family: str) -> None:
    """Eager attention gets a mask of real numbers for each row: together they take as much memory as the states."""
    text = tiny_of(tiny_model(family)).text(token_lists((16, 16, 16, 16)), 64)
    stream = text.start()
    masks = [arguments["attention_mask"] for arguments in stream.arguments[0]]
    assert {mask.shape for mask in masks} == {(4, 1, 16, 16)}
    assert {mask.untyped_storage().nbytes() for mask in masks} == {4 * 16 * 16}
    assert len({mask.data_ptr() for mask in masks}) == 2  # of all tokens before, and of those in the window


def test_masks_of_rows_that_differ_stay() -> None:
    mask = torch.zeros(2, 1, 3, 3)
    mask[1, 0, 0, 2] = -1.0
    assert _one_row(mask, {}) is mask
    assert _one_row(one := torch.zeros(2, 3, 3), {}) is one
    assert _one_row("other", {}) == "other"


def test_arguments_that_differ_are_no_others() -> None:
    mask, twin = torch.zeros(2, 2), torch.zeros(2, 2)
    given = {"mask": mask, "window": 4, "rotary": (mask, twin)}
    assert _alike(given, {"mask": twin, "window": 4, "rotary": (twin, mask)}, {})
    for key, value in (("mask", twin + 1), ("mask", None), ("window", 5), ("rotary", (mask,)), ("mask", twin.double())):
        assert not _alike(given, {**given, key: value}, {})
    assert not _alike(given, {"mask": mask}, {})
    assert not _alike(object(), object(), {})
