"""Hold hidden states between layers: on the device, then in host memory, then in files."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertprune.errors import CheckpointError, UsageError
from expertprune.files import MEMORY_VARIABLE, SPOOL_VARIABLE, disk_errors, scratch_folder, size_in_bytes, user_path
from expertprune.models.containers import available_memory

SHARE = 0.5  # of what is free beside the model; the rest is for the work on one batch


@dataclass(frozen=True)
class Limits:
    """What the user allows on this machine.

    Attributes:
        memory: bytes of host memory for the model and hidden states; default: what is free.
        spool: the folder for hidden states that memory has no room for.
    """

    memory: int | None = None
    spool: Path | None = None

    @classmethod
    def of_environment(cls) -> Limits:
        """From `EXPERTPRUNE_MEMORY`, such as 12GiB, and `EXPERTPRUNE_SPOOL`, which the command line sets.

        Raises:
            UsageError: one is no size, or no path.
        """
        memory, spool = os.environ.get(MEMORY_VARIABLE), os.environ.get(SPOOL_VARIABLE)
        name = MEMORY_VARIABLE
        try:
            size = size_in_bytes(memory) if memory else None
            name = SPOOL_VARIABLE
            return cls(size, user_path(spool) if spool else None)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None

    def free(self, device: torch.device, taken: int = 0) -> int:
        """Bytes that are free on a device; `taken` bytes of `memory` are the model's already.

        Members of a team on one host get equal shares of its memory.
        """
        if device.type == "cuda":  # what torch holds for tensors to come is free, too
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(torch.cuda.mem_get_info(device)[0]) + held
        members = members_here()
        available = available_memory() // members
        return available if self.memory is None else max(0, min(available, self.memory // members - taken))


def members_here() -> int:
    """How many processes of a team share this host's memory, as `torchrun` says."""
    members = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(members)) if members.isdecimal() else 1


class _Tier:
    """One kind of memory: how much of it is left, and how a tensor is put there and got back."""

    def __init__(self, left: int, put: Callable[[Tensor], Tensor]) -> None:
        self.left, self.put = left, put

    def hold(self, tensor: Tensor) -> Held:
        held = Held(self.put(tensor))
        self._change(-tensor.nbytes)
        weakref.finalize(held, self._change, tensor.nbytes)
        return held

    def _change(self, size: int) -> None:
        self.left += size


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory. Nothing waits for it: what reads it on the device comes later there."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class Held:
    """One tensor in a room. Its memory is free again when nothing refers to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self) -> Tensor:
        return self._tensor


class _HeldInFile(Held):
    """A tensor in a file. Reading maps the file, so its pages are no memory of the process."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        self.path, self.dtype, self.shape, self.size = path, tensor.dtype, tensor.shape, tensor.nbytes
        weakref.finalize(self, functools.partial(path.unlink, missing_ok=True))
        path.write_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def tensor(self) -> Tensor:
        flat = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        return flat.view(self.dtype).view(self.shape)


class Room:
    """The place for the hidden states of all passes over one model.

    A tensor goes where there is room first: the device, pinned host memory where the device is a
    GPU, and files in the folder of the limits.
    """

    def __init__(self, device: torch.device, limits: Limits | None = None, taken: int = 0) -> None:
        """`taken`: bytes of host memory that the model needs."""
        self.device, self.limits, self._taken = device, limits or Limits(), taken
        self._tiers = [_Tier(int(SHARE * self.free()), lambda tensor: tensor)]
        if device.type == "cuda":
            host = int(SHARE * self.limits.free(torch.device("cpu")))
            self._tiers.append(_Tier(host, _pinned))
        # Drops tensors that can be computed again, and says whether there were any.
        self.give_way: Callable[[], bool] = lambda: False
        self._folder: Path | None = None
        self._numbers = itertools.count()

    def free(self) -> int:
        """Bytes that the device has free now."""
        return self.limits.free(self.device, self._taken)

    @property
    def left(self) -> int:
        """Bytes of hidden states that the device itself still takes."""
        return self._tiers[0].left

    def hold(self, tensor: Tensor) -> Held:
        """Put a tensor away.

        Raises:
            CheckpointError: there is no room left.
        """
        for tier in self._tiers:
            if tensor.nbytes <= tier.left:
                return tier.hold(tensor)
        if self.give_way():
            return self.hold(tensor)
        if self.limits.spool is None:
            raise CheckpointError(
                "hidden states between layers need more memory than is free: name a folder for them with --spool "
                "FOLDER, allow more with --memory, or lower calibration.documents"
            )
        with disk_errors(self.limits.spool, "the spool of hidden states is full; free some room, or choose another"
                         " folder with --spool"):  # fmt: skip
            return _HeldInFile(self._files(self.limits.spool) / f"{next(self._numbers)}.bin", tensor)

    def _files(self, spool: Path) -> Path:
        """The folder of this room's files; it goes with the room, also after an error."""
        if self._folder is None:
            stack = contextlib.ExitStack()
            weakref.finalize(self, stack.close)
            self._folder = stack.enter_context(scratch_folder(spool / "hidden-states"))
        return self._folder

    def back(self, held: Held) -> Tensor:
        """What was put away, on the device. It must not be changed in place."""
        return held.tensor().to(self.device, non_blocking=True)


class Spool:
    """Tensors by number, in a room; they come back on its device and are never changed in place."""

    def __init__(self, room: Room, held: list[Held] | None = None) -> None:
        self.room, self._held = room, [] if held is None else held

    def append(self, tensor: Tensor) -> None:
        self._held.append(self.room.hold(tensor))

    def copy(self) -> Spool:
        """Another spool of the same tensors; none is copied."""
        return Spool(self.room, list(self._held))

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        return self.room.back(self._held[number])

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._held[number] = self.room.hold(tensor)
