"""Serve several experts behind one endpoint: one engine each, memory divided, dead engines restarted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from expertprune.errors import ServingError, UsageError
from expertprune.files import temporary_folder
from expertprune.serving import engine
from expertprune.serving.processes import ProcessTree, check_port, free_ports, stop_all
from expertprune.serving.routing import Router, proxy_command
from expertprune.serving.server import PATIENCE, Server, api_keys, log_file

LIMIT = 5  # restarts in a row, without a steady run between them
STEADY = 300.0  # seconds
_LONGEST_PAUSE = 60.0


class Supervised(Protocol):
    """A server or the router."""

    name: str
    tree: ProcessTree

    def start(self) -> None: ...
    def healthy(self) -> bool: ...
    def failure(self) -> ServingError | None: ...


class Supervisor:
    """Watch one process, and restart it. Its state: it runs, waits for a restart, starts, or is given up.

    The pauses before restarts in a row are 1, 2, 4, ... seconds, at most a minute.
    """

    def __init__(self, supervised: Supervised, report: Callable[[str], None]) -> None:
        self.supervised, self.report = supervised, report
        self.starts = 0
        self.state = "runs"
        self._since = time.monotonic()

    def step(self) -> None:
        """Look at the process once, and act."""
        now = time.monotonic()
        if self.state == "runs":
            if self.starts and now - self._since > STEADY:
                self.starts = 0
            if (failure := self.supervised.failure()) is not None:
                self._died(failure)
        elif self.state == "waits" and now >= self._since:
            self.supervised.start()
            self.state, self._since = "starts", now
        elif self.state == "starts":
            try:
                if self.supervised.healthy():
                    self.report(f"{self.supervised.name} is back after {now - self._since:.0f} s")
                    self.state, self._since = "runs", now
            except ServingError as failure:
                self._died(failure)

    def _died(self, failure: ServingError) -> None:
        self.supervised.tree.stop()  # its descendants still hold memory
        if self.starts == LIMIT:
            self.state = "given up"
            self.report(f"{failure}\n{self.supervised.name} was started again {LIMIT} times and is given up")
            return
        pause = min(2.0**self.starts, _LONGEST_PAUSE)
        self.starts += 1
        self.state, self._since = "waits", time.monotonic() + pause
        self.report(f"{failure}\n{self.supervised.name} is started again in {pause:g} s ({self.starts} of {LIMIT})")


class Deployment:
    """An engine for each folder, and a router that sends each request to the engine of its `model`.

    It is a context manager: inside the block everything is healthy, and `watch` keeps it so; after the block
    nothing runs.

    Attributes:
        servers: by model name. Experts that share a name are named after their folders.
        url: the endpoint, such as `http://127.0.0.1:8000/v1`.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        *,
        port: int,
        host: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        logs: Path,
        report: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        """Check what can be checked before anything starts.

        Args:
            arguments: of vLLM's command line, for every engine.
            logs: folder of the engines' logs.
            report: gets a message when a process dies, restarts, is back or is given up.

        Raises:
            CheckpointError: a folder is no expert and no checkpoint, or is incomplete.
            UsageError: the port is taken, names clash, vLLM, the proxy or memory is missing, or an argument is of one
                engine alone.
        """
        if "lora_modules" in engine.option_names(arguments):
            raise UsageError(
                "--lora-modules: an adapter is of one expert, and all engines get what follows --: serve the expert that it "
                "fits alone, on another --port"
            )
        check_port(host, port)
        proxy_command(Path())
        self.servers: dict[str, Server] = {}
        own_ports = [own for own in free_ports(len(folders) + 1) if own != port]
        for folder, name, own in zip(folders, model_names(folders), own_ports, strict=False):
            self.servers[name] = Server(
                folder,
                port=own,
                arguments=arguments,
                log=log_file(logs, name, port),
                model_name=name,
                patience=patience,
                engines=len(folders),
            )
        self.host, self.port, self.report = host, port, report
        self._folder = contextlib.ExitStack()
        ports = {name: server.port for name, server in self.servers.items()}
        self.router = Router(ports, host, port, self._folder.enter_context(temporary_folder()), api_keys(arguments))
        self.url = self.router.url

    def start(self) -> None:
        """Start the engines, then the router. Each must be healthy before the next starts: it measures free memory.

        Raises:
            ServingError: an engine or the router does not get healthy.
            UsageError: the port has been taken meanwhile.
        """
        everything: list[Supervised] = [*self.servers.values(), self.router]
        for supervised in everything:
            if supervised is self.router:
                check_port(self.host, self.port)
            self.report(f"starting {supervised.name}")
            supervised.start()
            while not supervised.healthy():
                time.sleep(0.25)

    def watch(self, until: Callable[[], bool] = lambda: False) -> None:
        """Restart what dies, until `until()` is true.

        Raises:
            ServingError: the router, or the last engine, has been given up.
        """
        watches = [Supervisor(server, self.report) for server in self.servers.values()]
        router = Supervisor(self.router, self.report)
        while not until():
            for watched in (*watches, router):
                watched.step()
            if router.state == "given up" or all(watched.state == "given up" for watched in watches):
                raise ServingError("nothing is left that serves; the logs say why")
            time.sleep(0.25)

    def stop(self) -> None:
        """End everything, within 10 s."""
        stop_all([self.router.tree, *(server.tree for server in self.servers.values())])
        with contextlib.suppress(OSError):
            self._folder.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def model_names(folders: Sequence[str | Path]) -> list[str]:
    """The experts' names. Experts that share a name get the names of their folders instead.

    Raises:
        CheckpointError: a folder is no expert and no checkpoint, or is incomplete.
        UsageError: two folders have the same name, too.
    """
    names = [engine.check_folder(folder).name for folder in folders]
    names = [
        name if names.count(name) == 1 else Path(folder).resolve().name
        for name, folder in zip(names, folders, strict=True)
    ]
    for number, name in enumerate(names):
        if name in names[:number]:
            first = folders[names.index(name)]
            raise UsageError(
                f"{first} and {folders[number]} would both be served as {name!r}; rename one of the folders"
            )
    return names
