"""Passes on a GPU give what they give on the CPU, from resident and from streamed layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertprune.arch import family_of
from expertprune.corpora.batches import make_batches
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.sources import source_of
from expertprune.models.spool import Limits, Room, Spool
from expertprune.models.streaming import load_streamed
from expertprune.profiling import traversal
from tests.masks import assert_near, measured, token_lists
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def text_on(device: str, folder: Path, streamed: bool) -> TextRun:
    checkpoint, place = Checkpoint(folder), torch.device(device)
    family = family_of(checkpoint.config["model_type"])
    given = checkpoint, family, torch.float32, place
    model = load_streamed(*given) if streamed else load_model(folder, torch.float32, place)
    return TextRun(model, family, family.layer_shapes(checkpoint.config), make_batches(token_lists(), 30, 63))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("source", ["resident", "streamed", "pinned"])
@pytest.mark.usefixtures("not_halved")
def test_every_pass_gives_what_it_gives_on_the_cpu(name: str, source: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", name)
    on_cpu, on_gpu = text_on("cpu", folder, False), text_on("cuda", folder, source != "resident")
    if source == "pinned":
        source_of(on_gpu.model).room._tiers[0].left = 0
    for part in ("forward", "language_model", "vocabulary", *(["regional"] if on_cpu.family.has_ffn else [])):
        expected, found = measured(on_cpu, part), measured(on_gpu, part)
        for key, value in expected.items():
            assert found[key].device.type == "cpu"
            if value.is_floating_point() and float(value.abs().max()) > 0:
                assert_near(found[key], value, 1e-3, f"{part} {key}")
            else:
                assert torch.equal(found[key], value), key


def test_no_pass_waits_for_the_device_inside_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses what waits, from the first batch of a layer to its last."""
    text = text_on("cuda", save_tiny(tmp_path / "base", "llama"), False)
    for collector in (traversal.LayerCollector, traversal.MaskGradients):
        add = collector.add

        def watched(self: object, *given: object, add: object = add, **named: object) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                add(self, *given, **named)  # type: ignore[operator]
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(collector, "add", watched)
    measured(text, "forward")
    measured(text, "language_model")


def test_a_spool_goes_from_the_device_to_pinned_memory(tmp_path: Path) -> None:
    room = Room(torch.device("cuda"), Limits(None, tmp_path))
    for tier, left in zip(room._tiers, (800, 800), strict=True):
        tier.left = left
    spool = Spool(room)
    for number in range(3):
        spool.append(torch.full((200,), float(number), device="cuda"))
    places = [held._tensor.is_pinned() if hasattr(held, "_tensor") else None for held in spool._held]
    assert places == [False, True, None]
    assert [float(tensor[0]) for tensor in spool] == [0.0, 1.0, 2.0]
    assert all(tensor.is_cuda for tensor in spool)
