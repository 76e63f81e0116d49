"""Layers that are streamed from a checkpoint: the same numbers, and never more than two in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.arch import family_of
from expertprune.corpora.batches import make_batches
from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.models.masking import masked
from expertprune.models.passes import TextRun
from expertprune.models.sources import StreamedLayers, is_streamed, source_of
from expertprune.models.spool import Limits
from expertprune.models.streaming import load_streamed
from expertprune.profiling import traversal
from tests.masks import measured, token_lists
from tests.oracle import random_units
from tests.tiny import FAMILIES, save_tiny

CPU = torch.device("cpu")


def text_of(folder: Path, streamed: bool, dtype: torch.dtype = torch.float32, limits: Limits | None = None) -> TextRun:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config["model_type"])
    model = load_streamed(checkpoint, family, dtype, CPU, limits) if streamed else load_model(folder, dtype, CPU)
    assert is_streamed(model) == streamed
    for (
        parameter
    ) in model.parameters():  # products of views of a file are rounded otherwise, where rows are not aligned
        parameter.data = parameter.data.clone()
    return TextRun(model, family, family.layer_shapes(checkpoint.config), make_batches(token_lists(), 30, 63))


def logits_of(text: TextRun) -> list[Tensor]:
    with torch.inference_mode():
        stream = text.finish()
        return [
            part for number, batch in enumerate(text.batches) for _, part in text.logits(batch, stream.hidden[number])
        ]


STORED = [
    *((name, torch.float32) for name in FAMILIES),
    *((name, torch.bfloat16) for name in ("gemma3", "phi3", "olmoe")),
]


@pytest.mark.parametrize(("name", "stored"), STORED, ids=[f"{name}-{str(stored)[6:]}" for name, stored in STORED])
def test_streamed_layers_give_the_same_bits_in_every_pass(
    name: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routed experts that are stored one by one, tied heads, and shards that end inside a layer are among them."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)  # a streamed model keeps no graphs
    folder = save_tiny(tmp_path / "base", name, max_shard_size="20KB", dtype=stored)
    resident, streamed = text_of(folder, False), text_of(folder, True)
    buffers = [dict(text.model.named_non_persistent_buffers()) for text in (resident, streamed)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[1][key], value) for key, value in buffers[0].items())
    for expected, found in zip(logits_of(resident), logits_of(streamed), strict=True):
        assert torch.equal(found, expected)
    for part in ("forward", "kl", "vocabulary", *(["regional"] if resident.family.has_ffn else [])):
        found = measured(streamed, part)
        for key, value in measured(resident, part).items():
            assert torch.equal(found[key], value), (part, key)


def held_layers(text: TextRun) -> Callable[[], int]:
    """From now on, how many layers' weights are in memory."""
    source, alive = source_of(text.model), []
    assert isinstance(source, StreamedLayers)
    read = source._read

    def watched(index: int) -> dict[str, Tensor]:
        state = read(index)
        largest = max(state.values(), key=lambda value: value.numel())
        alive.append(weakref.ref(largest.untyped_storage()))
        return state

    source._read = watched
    return lambda: sum(reference() is not None for reference in alive)


def test_two_layers_are_in_memory_at_most_and_none_behind_a_pass(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama", num_hidden_layers=6)
    text, seen = text_of(folder, True), []
    held = held_layers(text)

    def step() -> None:
        gc.collect()
        seen.append(held())

    measured(text, "language_model", progress=step)
    assert max(seen) <= 2
    assert seen[-1] == 0
    layers = text.model.model.layers
    assert all(value.is_meta for value in layers.parameters())
    next(text.layers())  # a pass that ends early
    gc.collect()
    source_of(text.model)._reader.submit(int).result()  # type: ignore[attr-defined] # the thread is done
    assert held() == 0
    assert all(value.is_meta for value in layers.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_mask_holds_for_layers_that_are_opened_later(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", name)
    resident, streamed = text_of(folder, False), text_of(folder, True)
    cut = {"experts": 3} if resident.family.experts else {"ffn": 9, "kv_groups": 2}
    kept = [random_units(shape, torch.Generator().manual_seed(0), **cut) for shape in resident.shapes]
    results = []
    for text in (resident, streamed):
        dense = logits_of(text)
        with masked(text.model, text.family, text.shapes, kept):
            results.append(logits_of(text))
        assert all(map(torch.equal, logits_of(text), dense))
        assert not any(map(torch.equal, results[-1], dense))
    assert all(map(torch.equal, *results))


def test_a_layer_that_no_file_holds_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    text = text_of(folder, True)
    checkpoint: Any = source_of(text.model)._read.args[2]  # type: ignore[attr-defined]
    del checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"no file holds model\.layers\.1\.mlp\.down_proj\.weight"):
        text.finish()
