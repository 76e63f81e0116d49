"""Teams: processes that share the documents of every pass.

`torch.distributed` carries them, whoever has started the processes. A process alone is a team of
one; nothing is exchanged then.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from expertprune.corpora.batches import Batch
from expertprune.engine.watch import Watch
from expertprune.errors import ExpertpruneError, UsageError, first_line
from expertprune.files import scratch_folder, staged_folder, temporary_folder
from expertprune.models.passes import TextRun

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# An exchange may wait for hours while one member writes. `Watch` notices members that are gone.
_PATIENCE = datetime.timedelta(days=7)
_MEETING = datetime.timedelta(minutes=10)  # until all members have come
_SMALL = 2**20  # bytes up to which tensors are sent together
_NOTICE = 5.0  # seconds in which the end of a member that an exchange has failed for is known
_PIECES = 4  # of a member's share of batches, at least, where documents allow it


@dataclass(frozen=True)
class Team:
    """The processes that share a pass, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the member that writes, prints and publishes."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This member's share of batches, balanced by tokens, padding included; perhaps none.

        Every member gives the same batches. They are cut between rows where there are few, so a
        document has the same neighbours in its batch, or fewer, in a team of any size.
        """
        if self.size == 1:
            return list(batches)
        pieces = sorted(_cut(batches, self.size * _PIECES), key=_order)
        loads = [0] * self.size
        mine = []
        for batch in pieces:  # the largest first, each to the member that has least
            member = loads.index(min(loads))
            loads[member] += batch.ids.numel()
            if member == self.rank:
                mine.append(batch)
        return mine

    def run(self, text: TextRun, own: Sequence[Batch] | None = None) -> TextRun:
        """This member's share of a run over text.

        Args:
            own: its share, where it was cut in another way; default: `share` of the text's batches.
        """
        if self.size == 1:
            return text
        mine = self.share(text.batches) if own is None else own
        return replace(text, batches=mine, whole=text.batches, together=self.add)

    def own_range(self, number: int) -> slice:
        """This member's range of so many things in a row, about as long as the others'."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add the other members' tensors, which have the same names and shapes, in place."""
        if self.size == 1:
            return
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in sums.values():
            if tensor.numel() * tensor.element_size() > _SMALL and tensor.is_contiguous():
                distributed.all_reduce(tensor)
            else:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in small.values():
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, summed in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def lead(self, work: Callable[[], T]) -> T:
        """Do something in the first member alone; all get its result, plain data, or raise its error."""
        if self.size == 1:
            return work()
        outcome: tuple[Any, ExpertpruneError | None] = None, None
        if self.leads:
            try:
                outcome = work(), None
            except ExpertpruneError as error:
                outcome = None, error
        value, failed = self.told(outcome)
        if failed is not None:
            raise failed
        return value  # type: ignore[no-any-return]

    def told(self, value: T) -> T:
        """What the first member gives, in all members."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def after_the_first(self) -> Iterator[None]:
        """The first member runs the block before the others, which then find what it has stored."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Wait until all members are here."""
        if self.size > 1:
            distributed.barrier()

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Compare facts, such as digests, with those of the first member.

        Args:
            facts: not called where there is one member: digests of weights need the weights.

        Raises:
            UsageError: they differ; it names every member that disagrees, with its host, and in what.
        """
        if self.size == 1:
            return
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, (socket.gethostname(), dict(facts())))
        first_host, first = told[0]
        problems = [
            f"rank {rank} on {host}: another {name} ({_short(own.get(name))}, not {_short(value)})"
            for rank, (host, own) in enumerate(told)
            for name, value in first.items()
            if own.get(name) != value
        ]
        if problems:
            raise UsageError(f"the team disagrees with rank 0 on {first_host}: {'; '.join(problems)}")

    def check_shared(self, folder: Path, option: str) -> None:
        """Raises `UsageError` unless all members see the same folder, which the first one can write."""
        if self.size == 1:
            return
        seen: list[Any] = [None] * self.size
        with contextlib.ExitStack() as stack:
            probe = stack.enter_context(scratch_folder(folder.absolute() / "team")) if self.leads else None
            place = Path(self.told(str(probe)))
            distributed.all_gather_object(seen, (socket.gethostname(), place.exists()))
        blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
        if blind:
            raise UsageError(
                f"{option}: {folder}: {', '.join(blind)} cannot see it: give a folder that all members share"
            )

    @contextlib.contextmanager
    def temporary(self, shared: Path) -> Iterator[Path]:
        """An empty folder that vanishes behind the block; below `shared` where there are other members."""
        if self.leads:
            alone = self.size == 1
            with temporary_folder() if alone else scratch_folder(shared / "repairs" / "expert") as place:
                folder = place / "expert"  # that of the place has a lock already
                folder.mkdir()
                yield self.told(folder)
                self.wait()
        else:
            yield self.told(shared)
            self.wait()

    @contextlib.contextmanager
    def staged(self, out: Path, overwrite: bool = False) -> Iterator[Path]:
        """`staged_folder`, made by the first member, in all members; `out` is there behind the block."""
        if self.leads:
            with staged_folder(out, overwrite) as folder:
                yield self.told(folder)
                self.wait()
        else:
            yield self.told(out)
            self.wait()
        self.wait()


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _order(batch: Batch) -> tuple[int, tuple[int, ...]]:
    return -batch.ids.numel(), batch.documents


def _cut(batches: Sequence[Batch], wanted: int) -> list[Batch]:
    """Batches cut between their rows until there are so many, or no more can be cut."""
    found = list(batches)
    while len(found) < wanted:
        sizes = [(batch.ids.numel(), number) for number, batch in enumerate(found) if len(batch.documents) > 1]
        if not sizes:
            break
        largest = found.pop(max(sizes)[1])
        middle = len(largest.documents) // 2
        found += [largest.of_rows(range(middle)), largest.of_rows(range(middle, len(largest.documents)))]
    return found


_present: list[Team] = [Team()]


def team() -> Team:
    """The team that this process belongs to now."""
    return _present[-1]


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Join the team that the environment names (as `torchrun` sets it), for the block.

    Raises:
        UsageError: the variables are not numbers, or the other members do not come.
        UnfinishedError: another member has failed or died.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    if None in given.values() or given["WORLD_SIZE"] == "1" or len(_present) > 1:
        yield team()
        return
    watch = _connect()
    _present.append(Team(distributed.get_rank(), distributed.get_world_size()))
    well, ended = False, None
    try:
        with _stopped_by(watch):
            try:
                yield team()
            except SystemExit as error:  # a command's own end, to which all members come
                ended = error
            distributed.barrier()
        well = True
    finally:
        _present.pop()
        watch.close(well)
        if well:
            distributed.destroy_process_group()
    if ended is not None:
        raise ended


def _connect() -> Watch:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        names = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
        raise UsageError(f"the team of {names} does not come together: {first_line(error)}") from None
    hosts: list[Any] = [None] * size
    distributed.all_gather_object(hosts, socket.gethostname())

    def announce(meeting: Any) -> Any:
        box = [meeting]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    return Watch.over(rank, size, hosts, announce)


@contextlib.contextmanager
def _stopped_by(watch: Watch) -> Iterator[None]:
    """Tell the others of an error in the block; what another one has caused becomes that one's error."""
    try:
        yield
    except ExpertpruneError as error:
        failure = watch.noticed(_NOTICE if isinstance(error.__cause__, RuntimeError) else 0)
        if failure is None:
            watch.tell(str(error), error.exit_code)
        raise
    except (RuntimeError, KeyboardInterrupt) as error:  # an exchange that failed, or the watch or a user interrupts
        failure = watch.noticed(_NOTICE)
        if failure is not None:
            raise failure.error() from None
        watch.tell("interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error), 1)
        raise
    except BaseException as error:
        watch.tell(f"{type(error).__name__}: {error}", 1)
        raise
