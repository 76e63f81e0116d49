"""The layer-by-layer pass is the model's own forward pass, and leaves no trace on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.corpora.batches import Batch
from expertprune.models.layers import observed
from expertprune.models.passes import Stream, real_tokens
from tests.masks import tiny_of, token_lists
from tests.tiny import tiny_model

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS = [("llama", {}), ("qwen2", {}), ("qwen2", SLIDING), ("gemma3_text", {})]
LENGTHS = (9, 2, 14, 5, 5)


def before_final_norm(model: Any, ids: list[int]) -> Tensor:
    """Hidden states after the last layer of one document alone, `[tokens, hidden]`, from the model's own forward."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def run_to_the_end(model: Any, tokens_per_batch: int, documents: list[list[int]] | None = None) -> Stream:
    with torch.inference_mode():
        return tiny_of(model).text(documents or token_lists(LENGTHS), tokens_per_batch).finish()


def module_state(model: Any) -> list[tuple[str, int, int, int]]:
    """Every module by name and identity, with the number of its hooks."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(("family", "changes"), MODELS, ids=["llama", "qwen2", "qwen2-sliding", "gemma3"])
@pytest.mark.parametrize("tokens_per_batch", [1, 16, 10_000])
def test_layers_in_a_row_equal_the_whole_forward_pass_of_each_document(
    family: str, changes: dict[str, Any], tokens_per_batch: int
) -> None:
    model = tiny_model(family, **changes)
    documents = token_lists(LENGTHS)
    stream = run_to_the_end(model, tokens_per_batch)
    compared = []
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            expected = before_final_norm(model, documents[document])
            torch.testing.assert_close(hidden[row, :length], expected, rtol=1e-5, atol=1e-5)
            compared.append(document)
    assert sorted(compared) == list(range(len(documents)))


def test_layers_of_different_kinds_get_their_own_masks() -> None:
    """Without it, the sliding model above could equal its forward pass only because its window is never full."""
    documents = token_lists((14,))
    full, sliding = tiny_model("qwen2"), tiny_model("qwen2", **SLIDING)
    assert not torch.allclose(before_final_norm(full, documents[0]), before_final_norm(sliding, documents[0]))


def test_the_stream_before_the_first_layer_holds_the_embeddings() -> None:
    model = tiny_model("llama")
    stream = tiny_of(model).text(token_lists(LENGTHS), 1).start()
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        assert torch.equal(hidden, model.model.embed_tokens.weight[batch.ids])


def test_running_a_layer_leaves_the_stream_as_it_was() -> None:
    model = tiny_model("llama")
    stream = tiny_of(model).text(token_lists(LENGTHS), 10_000).start()
    before = stream.hidden[0].clone()
    with torch.inference_mode():
        first = stream.run(model.model.layers[0], 0, 0)
        second = stream.run(model.model.layers[0], 0, 0)
    assert torch.equal(stream.hidden[0], before)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)


def test_a_copy_goes_its_own_way() -> None:
    model = tiny_model("llama")
    stream = tiny_of(model).text(token_lists(LENGTHS), 10_000).start()
    original, copy = stream.hidden[0], stream.copy()
    copy.hidden[0] = torch.zeros(1)
    assert stream.hidden[0] is original
    assert copy.arguments is stream.arguments


def test_a_finished_pass_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    modules, names = module_state(model), list(model.state_dict())
    ids = torch.tensor([token_lists(LENGTHS)[2]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    run_to_the_end(model, 16)
    assert module_state(model) == modules
    assert list(model.state_dict()) == names
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_an_error_in_the_decoder_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    modules = module_state(model)
    outside_the_vocabulary = [3, 64, 5, 6]
    with pytest.raises(IndexError):
        tiny_of(model).text([*token_lists(LENGTHS), outside_the_vocabulary], 1).start()
    assert module_state(model) == modules
    torch.testing.assert_close(
        run_to_the_end(model, 1, token_lists((7,))).hidden[0][0], before_final_norm(model, token_lists((7,))[0])
    )


def test_an_error_while_observing_removes_the_hook() -> None:
    model = tiny_model("llama")
    modules = module_state(model)
    while_open = []

    def fail_in_the_middle() -> None:
        with observed(model.model.layers[1], "mlp.down_proj"):
            while_open.append(module_state(model))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert while_open != [modules]
    assert module_state(model) == modules


def test_observed_notes_the_last_call_of_one_module_while_it_is_open() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), observed(layer, "mlp.down_proj") as calls:
        layer.mlp.down_proj(x - 1)
        layer.mlp.down_proj(input=x)
        layer.mlp.up_proj(torch.ones(1, 24))
    with torch.inference_mode():
        layer.mlp.down_proj(x + 1)
    assert list(calls) == ["mlp.down_proj"]
    assert torch.equal(calls["mlp.down_proj"].input, x)
    torch.testing.assert_close(calls["mlp.down_proj"].output, x @ layer.mlp.down_proj.weight.T)


@pytest.mark.parametrize("lengths", [(3, 1), (2, 3), (3, 3)])
def test_real_tokens_leaves_padding_out(lengths: tuple[int, ...]) -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), lengths, (0, 1))
    states = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    expected = [states[row, token].tolist() for row in range(2) for token in range(lengths[row])]
    assert real_tokens(batch, states).tolist() == expected
