"""Finished layers of a profile, kept on disk until the whole profile is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from expertprune.artifacts.profile import ProfilePart
from expertprune.files import digest_of
from expertprune.models.passes import TextRun
from expertprune.models.sources import is_streamed
from expertprune.models.tensorfile import PAUSE, save_tensors
from expertprune.profiling.gradients import Upstream


class Working:
    """A folder of finished layers; without one, nothing is kept.

    Layers of the forward pass are kept as soon as they are finished. After a kill the hidden states
    are made again, and only the statistics of the other layers. The backward pass of a streamed
    model also keeps the gradients above the last finished layer, and goes on below it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: tuple[float, Path | None] = time.monotonic(), None

    def has(self, part: ProfilePart, index: int | None = None) -> bool:
        """Whether a layer of a part is finished; without `index`, a part that has no layers."""
        return self.folder is not None and self._path(part, index).is_file()

    def load(self, part: ProfilePart, index: int | None = None) -> dict[str, Tensor]:
        """What was kept."""
        return load_file(self._path(part, index))

    def save(self, part: ProfilePart, tensors: dict[str, Tensor], index: int | None = None) -> None:
        """Keep a finished layer.

        Raises:
            CheckpointError: the disk is full.
        """
        if self.folder is not None:
            save_tensors(self._path(part, index), tensors)

    def keep(self, part: ProfilePart, index: int, above: Sequence[Upstream], text: TextRun) -> None:
        """Keep the gradients of the input of layer `index`, which is finished, if the model is streamed.

        As they take as much as the hidden states, that is done at most every half minute (`PAUSE`).
        """
        when, earlier = self._kept
        if self.folder is not None and is_streamed(text.model) and time.monotonic() - when >= PAUSE:
            states = {f"{number}.gradient": each.gradient.cpu() for number, each in enumerate(above)}
            scales = {f"{number}.scale": each.scale.cpu() for number, each in enumerate(above)}
            path = self._above(part, index, text)
            save_tensors(path, states | scales)
            if earlier is not None:
                earlier.unlink(missing_ok=True)
            self._kept = time.monotonic(), path

    def resumed(self, part: ProfilePart, text: TextRun) -> tuple[int, list[Upstream] | None]:
        """The number of layers that the backward pass still has to go, and the gradients above them."""
        for index in range(len(text.shapes)):
            path = self._above(part, index, text)
            if self.folder is not None and path.is_file():
                kept, numbers = load_file(path), range(len(text.batches))
                self._kept = time.monotonic(), path
                return index, [
                    Upstream(*(kept[f"{number}.{name}"].to(text.device) for name in ("gradient", "scale")))
                    for number in numbers
                ]
        return len(text.shapes), None

    def _path(self, part: ProfilePart, index: int | None) -> Path:
        assert self.folder is not None
        return self.folder / (f"{part}.safetensors" if index is None else f"{part}.{index}.safetensors")

    def _above(self, part: ProfilePart, index: int, text: TextRun) -> Path:
        """States are of the batches as they are cut; another cut does not find them."""
        cut = digest_of([[batch.documents, batch.lengths] for batch in text.batches])[:16]
        return (self.folder or Path()) / f"{part}.above-{index}.{cut}.safetensors"
