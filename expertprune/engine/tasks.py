"""Tasks: idempotent pieces of work, and the engines that run them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from expertprune.engine.leases import Leases
from expertprune.engine.team import team
from expertprune.errors import UnfinishedError, UsageError
from expertprune.progress import Track

log = logging.getLogger(__name__)

_PAUSE = 2.0  # seconds between two looks at what other processes do


@dataclass(frozen=True)
class RemoteCall:
    """A task as a function of its module and plain arguments, for a process elsewhere."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self, track: Track) -> None:
        self.function(**self.arguments, track=track)


@dataclass(frozen=True)
class Task:
    """One corpus to profile, one budget to build, or one suite to measure.

    A task may be run anywhere and again. Its result lies in the store, under a name that follows
    from all that it depends on.

    Attributes:
        name: for people, such as `profile language/de`.
        digest: of all that its result depends on.
        done: whether its result is there.
        run: do it in this process.
        elsewhere: the same, for a process that shares the store and nothing else.
    """

    name: str
    digest: str
    done: Callable[[], bool]
    run: Callable[[Track], None]
    elsewhere: RemoteCall


class Engine(Protocol):
    """Where tasks are run."""

    @property
    def device(self) -> str | None:
        """The type of device that tasks have, such as `cuda`; `None`: what this machine has."""

    def run(self, tasks: Sequence[Task], track: Track, finished: Callable[[], object] | None = None) -> None:
        """Run the tasks that are not done; return when all are.

        Args:
            finished: called after each task, in the process of the caller.
        """


class Local:
    """Run tasks in this process, or in the team that it belongs to, one after the other."""

    device: str | None = None

    def run(self, tasks: Sequence[Task], track: Track, finished: Callable[[], object] | None = None) -> None:
        for task in tasks:
            if not team().lead(task.done):
                task.run(track)
            if finished is not None:
                finished()


@dataclass(frozen=True)
class Collect:
    """Run nothing: the results must be there. The shards' leases are removed then."""

    leases: Leases
    device: str | None = None

    def run(self, tasks: Sequence[Task], track: Track, finished: Callable[[], object] | None = None) -> None:
        """Raises `UnfinishedError` with the names of tasks that are not done."""
        missing = [task.name for task in tasks if not task.done()]
        if missing:
            raise UnfinishedError(
                f"{len(missing)} of {len(tasks)} tasks are not done: {', '.join(missing)}; "
                "run the shards again, which do what is missing, and then --collect"
            )
        for task in tasks:
            self.leases.clear(task.digest)


@dataclass(frozen=True)
class Shard:
    """One of several shares of tasks, and the leases that keep processes out of each other's way.

    Attributes:
        index: from 0.
        count: of shards.
        leases: in a folder that all shards see.
    """

    index: int
    count: int
    leases: Leases
    device: str | None = None

    @staticmethod
    def parse(text: str) -> tuple[int, int]:
        """`3/8` as index 2 of 8. Raises `UsageError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise UsageError(f"--shard: {text!r} is not NUMBER/COUNT, such as 3/8")
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count:
            raise UsageError(
                f"--shard: {text}: there is no shard {number} of {count}; count from 1/{count} to {count}/{count}"
            )
        return number - 1, count

    def run(self, tasks: Sequence[Task], track: Track, finished: Callable[[], object] | None = None) -> None:
        """Do every task that no other shard does, and wait until the others have done theirs.

        A task whose process died becomes free when its lease expires, and is done here.
        """
        self._work(tasks, tasks, track, finished)

    def work(self, tasks: Sequence[Task], track: Track) -> Report:
        """Do the tasks of this share, and then those of others that nobody works on.

        Returns when the tasks of this share are done. It does not wait for those of others.
        """
        own = [task for number, task in enumerate(tasks) if number % self.count == self.index]
        return self._work(tasks, own, track)

    def _work(
        self,
        tasks: Sequence[Task],
        awaited: Sequence[Task],
        track: Track,
        finished: Callable[[], object] | None = None,
    ) -> Report:
        if team().size > 1:  # its members would take different tasks, and add up their sums
            raise UsageError("a shard is one process: run it without torchrun")
        # Each shard begins with its own share, so that they seldom reach for the same task.
        order = sorted(range(len(tasks)), key=lambda number: (number - self.index) % self.count)
        here: list[str] = []
        told = ""
        while True:
            left = [tasks[number] for number in order if not tasks[number].done()]
            taken = [task for task in left if self._do(task, track)]
            here += [task.name for task in taken]
            if finished is not None and taken:
                finished()
            waiting = [task for task in awaited if not task.done()]
            if not waiting:
                return Report(here, [task.name for task in tasks if not task.done()])
            if not taken:
                told = self._tell(waiting[0], told)
                time.sleep(_PAUSE)

    def _do(self, task: Task, track: Track) -> bool:
        """Do a task unless another process holds its lease or has done it; whether it was done here."""
        with self.leases.held(task.digest) as mine:
            if not mine or task.done():  # done between the look and the lease
                return False
            task.run(track)
            return True

    def _tell(self, task: Task, before: str) -> str:
        message = f"waiting for {task.name}, which {self.leases.owner(task.digest) or 'another process'} does"
        if message != before:
            log.warning(message)
        return message


@dataclass(frozen=True)
class Report:
    """What a shard did: names of tasks that it has done, and of tasks that nobody has done yet."""

    here: list[str]
    left: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {"kind": "shard", "done_here": self.here, "left": self.left}
