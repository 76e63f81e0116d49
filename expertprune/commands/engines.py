"""Options that say where the tasks of a command are run."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from expertprune.commands.terminal import BAR, Finite, messages, say, show
from expertprune.errors import UsageError
from expertprune.progress import Standing

if TYPE_CHECKING:
    from expertprune.engine.leases import Leases
    from expertprune.engine.tasks import Engine, Report, Shard

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Where:
    """What the options say."""

    engine: str
    address: str | None
    cpus: float | None
    gpus: float | None
    members: int
    shard: str | None
    collect: bool

    @property
    def tasks(self) -> bool:
        """Whether tasks are run in another way than in this process, one after the other."""
        return self.engine != "local" or self.shard is not None or self.collect

    def check(self) -> None:
        """Raises `UsageError` where options exclude each other."""
        if sum((self.engine != "local", self.shard is not None, self.collect)) > 1:
            raise UsageError("give one of --engine ray, --shard and --collect, not several")
        if self.tasks and in_team():
            raise UsageError("--engine ray, --shard and --collect start tasks of their own: give them without torchrun")
        if self.engine == "local" and (self.address, self.cpus, self.gpus, self.members) != (None, None, None, 1):
            raise UsageError("--address, --cpus-per-task, --gpus-per-task and --members need --engine ray")

    def share(self, store: Path | None) -> Shard | None:
        """The shard that is asked for, if one is. Raises `UsageError` if it is none, or options exclude each other."""
        self.check()
        if self.shard is None:
            return None
        from expertprune.engine.tasks import Shard

        index, count = Shard.parse(self.shard)
        return Shard(index, count, _leases(store, f"shard {self.shard}"))

    @contextlib.contextmanager
    def opened(self, store: Path | None) -> Iterator[Engine]:
        """The engine, while it is connected."""
        from expertprune.engine.cluster import Cluster
        from expertprune.engine.tasks import Collect, Local

        if self.engine == "ray":
            with Cluster(self.address, self.gpus, self.cpus, self.members, board, _tell) as cluster:
                yield cluster
        else:
            yield Collect(_leases(store)) if self.collect else Local()


def _leases(store: Path | None, label: str = "") -> Leases:
    from expertprune.engine.leases import Leases
    from expertprune.files import store_folder

    return Leases(store_folder(store) / "leases", label)


def engine_options(command: F) -> F:
    """Add `--engine` and what goes with it; the command gets them as `where`."""
    options = [
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                     help="Run tasks in this process, or on a Ray cluster whose nodes share the store."),
        click.option("--address", help="Of the Ray cluster, such as auto [default: RAY_ADDRESS, else this machine]."),
        click.option("--cpus-per-task", "cpus", type=Finite(min=0, min_open=True),
                     help="CPUs of each process on Ray [default: 1 beside a GPU, else all of a node]."),
        click.option("--gpus-per-task", "gpus", type=Finite(min=0),
                     help="GPUs of each process on Ray [default: 1 where the cluster has GPUs]."),
        click.option("--members", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Processes on Ray that share the documents of one task."),
    ]  # fmt: skip
    return _gathered(command, options, ("engine", "address", "cpus", "gpus", "members"))


def shard_options(command: F) -> F:
    """Add `--shard` and `--collect` to `engine_options`."""
    command = click.option(
        "--collect", is_flag=True, help="Put the results of shards together; what is missing is an error."
    )(command)
    return click.option(
        "--shard", metavar="NUMBER/COUNT",
        help="Do one share of the tasks, such as 3/8, beside other processes that share the store.",
    )(command)  # fmt: skip


def _gathered(command: F, options: Sequence[Callable[[F], F]], names: Sequence[str]) -> F:
    """A command whose options of these names arrive as one argument `where`."""

    @functools.wraps(command)
    def run(*args: Any, shard: str | None = None, collect: bool = False, **keywords: Any) -> Any:
        given = {name: keywords.pop(name) for name in names}
        return command(*args, where=Where(**given, shard=shard, collect=collect), **keywords)

    for option in reversed(options):
        run = option(run)  # type: ignore[assignment]
    return run  # type: ignore[return-value]


def show_report(report: Report, shard: Shard, as_json: bool) -> None:
    """Print what a shard did, and what to run next."""

    def text() -> str:
        here = f"shard {shard.index + 1}/{shard.count} did {', '.join(report.here) or 'nothing'}"
        left = f"nobody has done {', '.join(report.left)} yet" if report.left else "everything is done"
        return f"{here}; {left}\nwhen all shards have ended: the same command with --collect in place of --shard"

    show(as_json, report.document(), text)


def in_team() -> bool:
    """Whether `torchrun` has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def as_team(command: F) -> F:
    """Join the team that `torchrun` has started this process for, if it has. Members but the first print nothing."""

    @functools.wraps(command)
    def run(*args: Any, **keywords: Any) -> Any:
        if not in_team():
            return command(*args, **keywords)
        from expertprune.engine.team import joined

        with joined() as team, contextlib.ExitStack() as stack:
            if not team.leads:
                messages.quiet = True
                stack.callback(setattr, messages, "quiet", False)
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            return command(*args, **keywords)

    run.as_team = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _tell(message: str) -> None:
    say(message, error=True)


@contextlib.contextmanager
def board(names: Sequence[str]) -> Iterator[Callable[[str, Standing], None]]:
    """One line for each task on standard error."""
    from rich.progress import Progress

    with Progress(*BAR, console=messages) as progress:
        rows = {name: progress.add_task(f"{name}: waiting", total=None) for name in names}

        def tell(name: str, standing: Standing) -> None:
            total = max(standing.steps, standing.done) or None
            progress.update(rows[name], description=f"{name}: {standing.stage}", completed=standing.done, total=total)

        yield tell
