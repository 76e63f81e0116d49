"""Hidden states that one pass has computed, kept for later passes over the same batches."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from expertprune.corpora.batches import Batch
from expertprune.models.spool import Held, Room

# A pass calls it with a batch's number, a layer's index, and the batch's hidden states behind that layer.
KeepStates = Callable[[int, int, Tensor], None]


def keep_nothing(number: int, index: int, hidden: Tensor) -> None:
    """For passes whose hidden states nobody wants later."""


class KeptStates:
    """Hidden states of a base behind its layers, by batch.

    They are in the device's memory, and nowhere else: by arithmetic, a GPU computes them again in the
    time that a copy from host memory takes. All of them go as soon as anything else would not fit
    beside them.
    """

    def __init__(self, lasting: bool = False) -> None:
        """`lasting`: several passes will read them, so `release` keeps them."""
        self._lasting = lasting
        self._held: dict[int, dict[str, Held]] = defaultdict(dict)
        self._room: Room | None = None

    def keeping(self, batches: Sequence[Batch], wanted: Sequence[Batch | None], room: Room) -> KeepStates:
        """The function by which a pass over `batches` leaves its states here.

        Args:
            wanted: what a later pass will run of each batch: all of its rows, some (`Batch.of_rows`), or nothing.
        """
        self._room, room.give_way = room, self.clear
        keys = [None if some is None else _key(some) for some in wanted]

        def keep(number: int, index: int, hidden: Tensor) -> None:
            batch, some, key = batches[number], wanted[number], keys[number]
            if some is None or key is None:
                return
            if some.documents != batch.documents:
                rows = [batch.documents.index(document) for document in some.documents]
                hidden = hidden[rows, : some.ids.shape[1]]
            if hidden.nbytes <= room.left:
                self._held[index][key] = room.hold(hidden)

        return keep

    def behind(self, index: int, batch: Batch) -> Tensor | None:
        """The states of a batch behind a layer, `[rows, tokens, hidden]`, if they are kept."""
        layer = self._held.get(index)
        held = layer.get(_key(batch)) if layer else None
        return None if held is None or self._room is None else self._room.back(held)

    def release(self, index: int) -> None:
        """A pass is through with a layer."""
        if not self._lasting:
            self._held.pop(index, None)

    def clear(self) -> bool:
        """Drop everything; whether there was anything."""
        held, self._held = self._held, defaultdict(dict)
        return bool(held)


def _key(batch: Batch) -> str:
    """What hidden states depend on. Which tokens are answers is not part of it."""
    return hashlib.sha256(repr(batch.lengths).encode() + batch.ids.contiguous().numpy().tobytes()).hexdigest()
