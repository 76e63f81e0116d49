"""What a repair has finished, on disk, so that a killed one goes on from there."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from expertprune.errors import CheckpointError, first_line
from expertprune.files import read_kept, write_json
from expertprune.models.passes import Stream
from expertprune.models.tensorfile import PAUSE, save_tensors

log = logging.getLogger(__name__)

_STATE = "state.json"


class Unfinished:
    """Solved weights, one file each, and sometimes the streams behind the last finished layer.

    The weights wait here until their shard is written, so memory holds one layer's.

    Args:
        folder: what one repair owns. What it holds of an earlier run of the same repair is used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved = time.monotonic()

    def put(self, name: str, weight: Tensor) -> None:
        """Keep a solved weight by its full name."""
        save_tensors(self._weight(name), {"weight": weight})

    def take(self, name: str) -> Tensor | None:
        """A solved weight, or `None` if it was not solved for."""
        path = self._weight(name)
        return load_file(path)["weight"] if path.is_file() else None

    def _weight(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def save(self, layers: int, streams: Mapping[str, Stream]) -> None:
        """Keep the streams behind so many layers, if the last saving is long enough ago.

        Where the disk has no room for them, the repair goes on without.
        """
        if time.monotonic() - self._saved < PAUSE:
            return
        state, earlier = self.folder / f"behind-{layers}", self._behind()
        try:
            state.mkdir(exist_ok=True)
            for name, tensor in _tensors(streams):
                save_tensors(state / name, {"hidden": tensor})
            write_json(self.folder / _STATE, {"layers": layers})
        except (OSError, CheckpointError) as error:
            log.warning("the repair could not be kept behind layer %d: %s", layers, first_line(error))
            shutil.rmtree(state, ignore_errors=True)
        else:
            if earlier not in (0, layers):
                shutil.rmtree(self.folder / f"behind-{earlier}", ignore_errors=True)
        self._saved = time.monotonic()

    def restore(self, streams: Mapping[str, Stream]) -> int:
        """Put the streams behind the last finished layer that was kept.

        Returns:
            How many layers are finished; 0 if nothing was kept, or not these streams.
        """
        layers = self._behind()
        state = self.folder / f"behind-{layers}"
        names = [name for name, _ in _tensors(streams)]
        if not layers or not all((state / name).is_file() for name in names):
            return 0
        for name, stream in streams.items():
            for number in range(len(stream.batches)):
                stream.hidden[number] = load_file(state / _file(name, number))["hidden"].to(stream.hidden.room.device)
        log.info("the repair goes on behind layer %d", layers)
        return layers

    def _behind(self) -> int:
        state = read_kept(self.folder / _STATE, _State)
        return 0 if state is None else state.layers


class _State(BaseModel):
    """How many layers are finished."""

    layers: int


def _tensors(streams: Mapping[str, Stream]) -> Iterator[tuple[str, Tensor]]:
    for name, stream in streams.items():
        for number in range(len(stream.batches)):
            yield _file(name, number), stream.hidden[number]


def _file(stream: str, number: int) -> str:
    return f"{stream}.{number}.safetensors"
