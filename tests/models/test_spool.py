"""Hidden states that memory has no room for."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch

from expertprune.errors import CheckpointError
from expertprune.models.sources import ResidentLayers, attach
from expertprune.models.spool import Limits, Room, Spool
from expertprune.profiling import traversal
from tests.masks import Tiny, measured, tiny, token_lists

CPU = torch.device("cpu")


def with_room(of: Tiny, limits: Limits) -> Tiny:
    attach(of.model, ResidentLayers(CPU, Room(CPU, limits)))
    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 9000])
def test_hidden_states_in_files_are_the_same(
    memory: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 9,000 bytes, some of a layer's states are in memory and some in files; afterwards there are no files."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)
    of = tiny("llama")
    of.model.to(dtype)
    expected = measured(of.text(token_lists()), "language_model")
    spool = tmp_path / "spool"
    with_room(of, Limits(memory, spool))
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, len(list(spool.rglob("*.bin"))))

    found = measured(of.text(token_lists()), "language_model", progress=count)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    states = len(of.shapes) + 1  # before each layer, and behind the last
    batches = len(of.text(token_lists()).batches)
    assert most == states * batches if memory == 0 else 0 < most < states * batches
    gc.collect()
    assert list(spool.rglob("*.bin")) == []
    del of
    gc.collect()
    assert list(spool.iterdir()) == []


def test_memory_is_free_again_when_nothing_refers_to_a_tensor(tmp_path: Path) -> None:
    room = Room(CPU, Limits(2000, tmp_path))  # half of it for hidden states
    spool = Spool(room)
    spool.append(torch.zeros(200))
    copy = spool.copy()
    copy[0] = torch.ones(200)  # the first still has its 800 bytes
    assert len(list(tmp_path.rglob("*.bin"))) == 1
    assert copy[0].sum() == 200
    assert spool[0].sum() == 0
    del spool
    copy[0] = torch.full((200,), 2.0)
    assert list(tmp_path.rglob("*.bin")) == []
    assert copy[0].sum() == 400


def test_no_room_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="--spool FOLDER"):
        Spool(Room(CPU, Limits(0))).append(torch.zeros(1))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(Room(CPU, Limits(0, tmp_path / "full")))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="full: the spool of hidden states is full"):
        spool.append(torch.zeros(1))


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits.of_environment() == Limits(None, None)
    monkeypatch.setenv("EXPERTPRUNE_MEMORY", "1000")
    monkeypatch.setenv("EXPERTPRUNE_SPOOL", "/tmp/x")
    limits = Limits.of_environment()
    assert limits == Limits(1000, Path("/tmp/x"))
    assert limits.free(CPU, taken=400) == 600
