"""Run a command with its log, and end it with everything that it started.

Each command gets a session of its own. It ends with its parent, however the parent ends (see `guard`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from expertprune.errors import CheckpointError, UsageError
from expertprune.files import socket_folder
from expertprune.serving import guard

SOCKETS = "VLLM_RPC_BASE_PATH"  # where vLLM puts its sockets, which it never removes
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")  # addresses before which no proxy stands
GRACE = 4.0  # seconds between SIGTERM and SIGKILL
_KILLED = 3.0  # seconds until a killed process is gone
_TAIL = 20  # lines of a log that an error shows
_LOWEST_PORT = 10_000
_TRIES = 100  # ports that are tried before any free one is taken


class ProcessTree:
    """A command that writes into a log and leads a session, so that none of its descendants can be lost.

    vLLM's sockets are in a folder of the tree's own, which goes with it.

    Attributes:
        process: what runs, or ran last.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._sockets: dict[str, str] = {}
        self._own = contextlib.ExitStack()
        weakref.finalize(self, self._own.close)

    def start(self) -> None:
        """Start the command. What it prints goes to the end of its log.

        Raises:
            CheckpointError: the log cannot be written.
        """
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("ab")
        except OSError as error:
            raise CheckpointError(f"{self.log}: cannot be written: {error.strerror}") from None
        with output:
            self._make_sockets()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, **self._sockets, guard.VARIABLE: guard.token()},
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def code(self) -> int | None:
        """The exit code; negative if a signal ended the command."""
        return None if self.process is None else self.process.poll()

    def members(self) -> list[psutil.Process]:
        """The processes of the session that run; its leader may be dead."""
        if self.process is None:
            return []
        leader, found = self.process.pid, []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.Error, PermissionError):
                continue
        return found

    def stop(self) -> None:
        """End all processes, after about `GRACE` seconds at the latest. Processes that have ended are no error."""
        stop_all([self])

    def forget(self) -> None:
        """Remove the sockets of a command that has ended."""
        self._own.close()
        self._sockets.clear()

    def _make_sockets(self) -> None:
        """A folder for vLLM's sockets, unless the user names one, or the path of temporary files is too long."""
        if SOCKETS in self.environment or self._sockets:
            return
        if (folder := self._own.enter_context(socket_folder())) is not None:
            self._sockets[SOCKETS] = str(folder)

    def tail(self) -> str:
        """The log's last lines, indented."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 2**16))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return "  (no log)"
        return "\n".join(f"  {line[:400]}" for line in lines[-_TAIL:]) or "  (the log is empty)"


def stop_all(trees: Iterable[ProcessTree]) -> None:
    """End several trees at the same time: ask their leaders, and kill what is left after `GRACE` seconds.

    A second interruption meanwhile ends the waiting, not the killing.
    """
    trees = [tree for tree in trees if tree.process is not None]
    try:
        for tree in trees:
            if tree.alive and tree.process is not None:
                tree.process.terminate()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(tree.alive or tree.members() for tree in trees):
            time.sleep(0.1)
    finally:
        killed = [process for tree in trees for process in tree.members()]
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for tree in trees:  # before psutil waits: whoever waits first learns the exit code
            if tree.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tree.process.wait(timeout=_KILLED)
        psutil.wait_procs(killed, timeout=_KILLED)
        for tree in trees:
            tree.forget()


def reach_directly(host: str) -> None:
    """Tell all clients of this process, and of those that it starts, that no proxy stands before this machine."""
    for key in ("no_proxy", "NO_PROXY"):
        known = [each for each in os.environ.get(key, "").split(",") if each]
        os.environ[key] = ",".join(dict.fromkeys([*known, *THIS_MACHINE, host]))


def check_port(host: str, port: int) -> None:
    """Raises `UsageError` if the port cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"--host {host}: is no address of this machine") from None
    except OSError as error:
        raise UsageError(f"port {port} of {host} is not free ({error.strerror}); choose another with --port") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A free port."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Free ports, all different.

    A server listens half a minute later. No outgoing connection takes its port meanwhile: they are below those that
    the system gives to such connections, where there are any.
    """
    below = range(_LOWEST_PORT, _outgoing_ports().start)
    wanted = [*random.SystemRandom().sample(below, min(len(below), _TRIES)), *[0] * count]  # 0: any, if all else fails
    found: list[int] = []
    with contextlib.ExitStack() as probes:
        while len(found) < count:
            probe = probes.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            port = wanted.pop(0)
            try:
                probe.bind((host, port))
            except OSError:
                if not port:
                    raise
                continue
            found.append(int(probe.getsockname()[1]))
    return found


def _outgoing_ports() -> range:
    """The ports that the system gives to outgoing connections; where it does not say, IANA's dynamic ones (RFC 6335)."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return range(49_152, 65_536)
    return range(low, high + 1)


def client_address(host: str) -> str:
    """The address, for a URL, at which clients on this machine reach a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def ending(code: int | None) -> str:
    """`"exit code 1"`, or `"SIGKILL"`."""
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
