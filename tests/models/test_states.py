"""Hidden states that are kept for later: of some rows, in memory only, and gone when memory is needed."""

from __future__ import annotations

from pathlib import Path

import torch

from expertprune.corpora.batches import make_batches
from expertprune.models.spool import Limits, Room
from expertprune.models.states import KeptStates

CPU = torch.device("cpu")


def test_rows_that_are_wanted_are_kept_without_padding_that_goes_with_the_others() -> None:
    first, second, third = make_batches([[1, 2], [3, 4, 5], [6, 7, 8, 9], [1] * 4, [2] * 4, [3] * 4], 8)
    assert [each.documents for each in (first, second, third)] == [(0, 1), (2, 3), (4, 5)]
    states, some = KeptStates(), first.of_rows([0])
    keep = states.keeping([first, second, third], [some, second, None], Room(CPU))
    hidden = torch.randn(3, 2, 4, 5)
    keep(0, 7, hidden[0, :, :3])
    keep(1, 7, hidden[1])
    keep(2, 7, hidden[2])
    assert some.ids.tolist() == [[1, 2]]
    found = states.behind(7, some)
    assert found is not None
    assert torch.equal(found, hidden[0, :1, :2])
    assert torch.equal(states.behind(7, second), hidden[1])  # type: ignore[arg-type]
    assert [states.behind(7, third), states.behind(7, first), states.behind(6, second)] == [None, None, None]


def test_other_tensors_drive_them_out_of_memory_and_they_never_lie_in_files(tmp_path: Path) -> None:
    batches = make_batches([[1, 2], [3, 4, 5], [6, 7, 8, 9]], 1)
    room = Room(CPU, Limits(1600, tmp_path))  # 800 bytes of hidden states
    states = KeptStates()
    keep = states.keeping(batches, batches, room)
    for number, batch in enumerate(batches):  # 160, 240 and 320 bytes
        keep(number, 0, torch.zeros(1, batch.ids.shape[1], 20))
    keep(0, 1, torch.zeros(1, 2, 20))  # 160 bytes, and 80 are left
    assert [states.behind(1, batch) for batch in batches] == [None] * 3
    assert all(states.behind(0, batch) is not None for batch in batches)
    small = room.hold(torch.zeros(10))
    assert all(states.behind(0, batch) is not None for batch in batches)
    large = room.hold(torch.zeros(100))
    assert [states.behind(0, batch) for batch in batches] == [None] * 3
    assert room.left == 800 - 40 - 400
    assert (small.tensor().numel(), large.tensor().numel()) == (10, 100)
    assert list(tmp_path.iterdir()) == []
