"""Where a pass gets decoder layers from: resident on a device, or streamed from a checkpoint."""

from __future__ import annotations

import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.models.spool import Limits, Room

Change = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
LayerState = dict[str, Tensor]
_ATTRIBUTE = "_expertprune_source"
TRIMMED = 128 << 20  # bytes of layers after which freed memory goes back to the system, which takes time


class LayerSource(ABC):
    """Gives the decoder layers of one model, one at a time.

    It never refers to the model itself, so that the model goes as soon as nobody else needs it.

    Attributes:
        device: where layers and hidden states are while they run.
        room: the place for hidden states between layers.
    """

    def __init__(self, device: torch.device, room: Room) -> None:
        self.device, self.room = device, room

    @abstractmethod
    def opened(
        self, layer: nn.Module, index: int, following: int | None = None
    ) -> contextlib.AbstractContextManager[nn.Module]:
        """A layer of the model, ready to run while open.

        Args:
            following: the layer that is wanted next; it may be read ahead.
        """

    @abstractmethod
    def amended(self, layer: nn.Module, index: int, change: Change) -> contextlib.AbstractContextManager[None]:
        """While open, a layer is changed whenever it runs; `change` makes the change and takes it back."""


class ResidentLayers(LayerSource):
    """The whole model is on its device."""

    @contextlib.contextmanager
    def opened(self, layer: nn.Module, index: int, following: int | None = None) -> Iterator[nn.Module]:
        yield layer

    @contextlib.contextmanager
    def amended(self, layer: nn.Module, index: int, change: Change) -> Iterator[None]:
        with change(layer):
            yield


class StreamedLayers(LayerSource):
    """Layers without memory, each of which gets its weights while it is open.

    A thread reads the layer that follows, so two layers are in memory at most. On a GPU, weights are
    copied on a stream of their own, beside the work of the passes.
    """

    def __init__(self, device: torch.device, room: Room, read: Callable[[int], LayerState]) -> None:
        """`read` gives the weights of a layer on the device, by their names in the layer."""
        super().__init__(device, room)
        self._read = read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._ahead: tuple[int, Future[LayerState]] | None = None
        self._changes: dict[int, list[Change]] = defaultdict(list)
        self._released = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def opened(self, layer: nn.Module, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """See `LayerSource`.

        Raises:
            CheckpointError: the checkpoint cannot be read, or lacks weights of the layer.
        """
        layer.load_state_dict(self._weights(index), assign=True)
        try:
            if following is not None:
                self._ahead = (following, self._reader.submit(self._copied, following))
            with contextlib.ExitStack() as changes:
                for change in self._changes[index]:
                    changes.enter_context(change(layer))
                yield layer
        except BaseException:  # the pass ends here: do not keep what was read ahead
            self._ahead = None
            raise
        finally:
            self._released += release(layer)
            if self._released >= TRIMMED:
                self._released = 0
                trim()

    def _weights(self, index: int) -> LayerState:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            state = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            state = self._reader.submit(self._copied, index).result()
        if self._copies is not None:  # the memory is used again only behind what runs on it
            for value in state.values():
                value.record_stream(torch.cuda.current_stream(self.device))
        return state

    def _copied(self, index: int) -> LayerState:
        """What is read, once it is on the device."""
        if self._copies is None:
            return self._read(index)
        with torch.cuda.stream(self._copies):
            state = self._read(index)
        self._copies.synchronize()
        return state

    @contextlib.contextmanager
    def amended(self, layer: nn.Module, index: int, change: Change) -> Iterator[None]:
        self._changes[index].append(change)
        try:
            yield
        finally:
            self._changes[index].remove(change)


def release(module: nn.Module) -> int:
    """Give the memory of all parameters back, and say how many bytes; they stay as shapes on the device `meta`."""
    parameters = dict(module.named_parameters())
    empty = {name: torch.empty_like(value, device="meta") for name, value in parameters.items()}
    size = sum(value.nbytes for value in parameters.values())
    module.load_state_dict(empty, strict=False, assign=True)
    return size


def trim() -> None:
    """Give freed memory back to the system: glibc keeps blocks of many megabytes, in each thread's arena."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def attach(model: Any, source: LayerSource) -> None:
    """Make `source` the source of a model's layers."""
    setattr(model, _ATTRIBUTE, source)


def source_of(model: Any) -> LayerSource:
    """The source of a model's layers; that of an ordinary model is `ResidentLayers`."""
    if not hasattr(model, _ATTRIBUTE):
        device = next(model.parameters()).device
        taken = sum(value.nbytes for value in model.parameters())
        attach(model, ResidentLayers(device, Room(device, Limits.of_environment(), taken)))
    source: LayerSource = getattr(model, _ATTRIBUTE)
    return source


def is_streamed(model: Any) -> bool:
    """Whether the model's layers have no memory of their own."""
    return isinstance(source_of(model), StreamedLayers)
