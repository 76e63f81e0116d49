"""Layers streamed from a checkpoint and hidden states in files: the same numbers, and no more in memory than is allowed."""

from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path

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
from expertprune.models.sources import ResidentLayers, StreamedLayers, attach, is_streamed, source_of
from expertprune.models.spool import Limits, Room, Spool
from expertprune.models.states import KeptStates
from expertprune.models.streaming import load_streamed
from expertprune.profiling import traversal
from tests.masks import measured, tiny, token_lists
from tests.oracle import random_units
from tests.tiny import save_tiny

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed model keeps none."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)


def text_of(folder: Path, streamed: bool, checkpoint: Checkpoint | None = None) -> TextRun:
    checkpoint = checkpoint or Checkpoint(folder)
    family = family_of(checkpoint.config["model_type"])
    model = load_streamed(checkpoint, family, F32, CPU) if streamed else load_model(folder, F32, CPU)
    assert is_streamed(model) == streamed
    for (
        parameter
    ) in model.parameters():  # products of a file's views, whose rows are not aligned, are rounded otherwise
        parameter.data = parameter.data.clone()
    return TextRun(model, family, family.layer_shapes(checkpoint.config), make_batches(token_lists(), 30, 63))


def logits_of(text: TextRun) -> list[Tensor]:
    with torch.inference_mode():
        hidden = text.finish().hidden
        return [part for number, batch in enumerate(text.batches) for _, part in text.logits(batch, hidden[number])]


# --- streamed layers ------------------------------------------------------------------------------------------------

STORED = [
    ("llama", F32), ("gemma3", BF16), ("qwen2_moe", F32), ("olmoe", BF16), ("deepseek_v3", F32), ("ernie4_5_moe", F32),
    ("gpt_oss", F32), ("qwen3_next", F32), ("mixtral", F32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stored"), STORED, ids=str)
def test_streamed_layers_give_the_same_bits_also_masked(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Routed experts that are stored one by one, tied heads, and shards that end inside a layer are among them."""
    folder = save_tiny(tmp_path / "base", name, max_shard_size="20KB", dtype=stored)
    texts = resident, streamed = text_of(folder, False), text_of(folder, True)
    buffers = [dict(text.model.named_non_persistent_buffers()) for text in texts]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[1][key], value) for key, value in buffers[0].items())
    dense = logits_of(resident)
    assert all(map(torch.equal, logits_of(streamed), dense))
    if name not in ("llama", "qwen2_moe"):
        return
    for part in ("forward", "kl", "vocabulary", "regional") if name == "llama" else ():
        found = measured(streamed, part)
        for key, value in measured(resident, part).items():
            assert torch.equal(found[key], value), (part, key)
    cut = {"experts": 3} if resident.family.experts else {"ffn": 9, "kv_groups": 2}
    kept = [random_units(shape, torch.Generator().manual_seed(0), **cut) for shape in resident.shapes]
    results = []
    for text in texts:
        with masked(text.model, text.family, text.shapes, kept):
            results.append(logits_of(text))
        assert all(map(torch.equal, logits_of(text), dense))
    assert all(map(torch.equal, *results))
    assert not any(map(torch.equal, results[0], dense))


def test_two_layers_are_in_memory_at_most_and_none_behind_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, alive, seen = text_of(save_tiny(tmp_path / "base", num_hidden_layers=4), True), [], []
    source = source_of(text.model)
    assert isinstance(source, StreamedLayers)
    read = source._read

    def watched(index: int) -> dict[str, Tensor]:
        state = read(index)
        largest = max(state.values(), key=lambda value: value.numel())
        alive.append(weakref.ref(largest.untyped_storage()))
        return state

    def step() -> None:
        gc.collect()
        seen.append(sum(reference() is not None for reference in alive))

    monkeypatch.setattr(source, "_read", watched)
    gc.freeze()  # what is there already need not be looked at again and again
    measured(text, "language_model", progress=step)
    assert max(seen) <= 2
    assert seen[-1] == 0
    next(text.layers())  # a pass that ends early
    source._reader.submit(int).result()  # the thread is done
    step()
    gc.unfreeze()
    assert seen[-1] == 0
    assert all(value.is_meta for value in text.model.model.layers.parameters())


def test_a_layer_that_no_file_holds_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    checkpoint = Checkpoint(folder)
    text = text_of(folder, True, checkpoint)
    del checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"no file holds model\.layers\.1\.mlp\.down_proj\.weight"):
        text.finish()


# --- hidden states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "dtype"), [(0, F32), (6000, BF16)])
def test_hidden_states_in_files_are_the_same(memory: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """With 6,000 bytes, some of a layer's states are in memory and some in files; afterwards there are no files."""
    of, spool, files = tiny("llama", num_hidden_layers=2), tmp_path / "spool", []
    of.model.to(dtype)
    expected = measured(of.text(token_lists()), "language_model")
    attach(of.model, ResidentLayers(CPU, Room(CPU, Limits(memory, spool))))
    text = of.text(token_lists())
    found = measured(text, "language_model", progress=lambda: files.append(len(list(spool.rglob("*.bin")))))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    states = (len(of.shapes) + 1) * len(text.batches)  # before each layer, and behind the last
    assert max(files) == states if memory == 0 else 0 < max(files) < states
    gc.collect()
    assert list(spool.rglob("*.bin")) == []
    del of, text
    gc.collect()
    assert list(spool.iterdir()) == []


def test_memory_is_free_again_when_nothing_refers_to_a_tensor(tmp_path: Path) -> None:
    spool = Spool(Room(CPU, Limits(2000, tmp_path)))  # half of it for hidden states
    spool.append(torch.zeros(200))
    copy = spool.copy()
    copy[0] = torch.ones(200)  # the first still has its 800 bytes
    assert len(list(tmp_path.rglob("*.bin"))) == 1
    assert [float(each[0].sum()) for each in (copy, spool)] == [200, 0]
    del spool
    copy[0] = torch.full((200,), 2.0)
    assert list(tmp_path.rglob("*.bin")) == []
    assert copy[0].sum() == 400


def test_no_room_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="--spool FOLDER"):
        Spool(Room(CPU, Limits(0))).append(torch.zeros(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="full: the spool of hidden states is full"):
        Spool(Room(CPU, Limits(0, tmp_path / "full"))).append(torch.zeros(1))


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits.of_environment() == Limits(None, None)
    monkeypatch.setenv("EXPERTPRUNE_MEMORY", "1000")
    monkeypatch.setenv("EXPERTPRUNE_SPOOL", "/tmp/x")
    assert Limits.of_environment() == Limits(1000, Path("/tmp/x"))
    assert Limits.of_environment().free(CPU, taken=400) == 600


def test_states_that_are_wanted_are_kept_without_padding_that_goes_with_the_others() -> None:
    first, second, third = make_batches([[1, 2], [3, 4, 5], [6, 7, 8, 9], [1] * 4, [2] * 4, [3] * 4], 8)
    assert [each.documents for each in (first, second, third)] == [(0, 1), (2, 3), (4, 5)]
    states, some = KeptStates(), first.of_rows([0])
    keep = states.keeping([first, second, third], [some, second, None], Room(CPU))
    hidden = torch.randn(3, 2, 4, 5)
    for number, each in enumerate((hidden[0, :, :3], hidden[1], hidden[2])):
        keep(number, 7, each)
    assert some.ids.tolist() == [[1, 2]]
    for batch, expected in ((some, hidden[0, :1, :2]), (second, hidden[1])):
        found = states.behind(7, batch)
        assert found is not None
        assert torch.equal(found, expected)
    assert [states.behind(7, third), states.behind(7, first), states.behind(6, second)] == [None, None, None]


def test_other_tensors_drive_kept_states_out_of_memory_and_they_never_lie_in_files(tmp_path: Path) -> None:
    batches = make_batches([[1, 2], [3, 4, 5], [6, 7, 8, 9]], 1)
    room, states = Room(CPU, Limits(1600, tmp_path)), KeptStates()  # 800 bytes of hidden states
    keep = states.keeping(batches, batches, room)
    for number, batch in enumerate(batches):  # 160, 240 and 320 bytes
        keep(number, 0, torch.zeros(1, batch.ids.shape[1], 20))
    keep(0, 1, torch.zeros(1, 2, 20))  # 160 bytes, and 80 are left
    assert [states.behind(1, batch) for batch in batches] == [None] * 3
    small = room.hold(torch.zeros(10))
    assert all(states.behind(0, batch) is not None for batch in batches)
    large = room.hold(torch.zeros(100))
    assert [states.behind(0, batch) for batch in batches] == [None] * 3
    assert room.left == 800 - 40 - 400
    assert (small.tensor().numel(), large.tensor().numel()) == (10, 100)
    assert list(tmp_path.iterdir()) == []
