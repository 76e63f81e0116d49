"""Members of a team notice when another one ends before its time."""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from expertprune.errors import UnfinishedError
from expertprune.formats import printable

log = logging.getLogger(__name__)

_GRACE = 8.0  # seconds in which the main thread may clean up before the process ends
_BYE = b"bye\n"
_INTRODUCTION = 5.0  # seconds in which a new connection must say who it is
# A machine that vanishes closes no connection: the kernel asks it, and gives up after 5 + 3 x 5 seconds.
_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class Failure:
    """A member that has ended before its time; `message` is its error, if it had one to tell."""

    rank: int
    host: str
    message: str = ""
    exit_code: int = 1

    def error(self) -> UnfinishedError:
        """What the other members say."""
        why = f"stopped: {self.message}" if self.message else "has died or is not reachable any more"
        found = UnfinishedError(
            f"rank {self.rank} of the team, on {self.host}, {why}; what is finished is stored: run the same command again"
        )
        found.exit_code = self.exit_code
        return found


@dataclass(frozen=True)
class Meeting:
    """Where the members connect to the first one; the word keeps strangers out."""

    host: str
    port: int
    word: str


class Watch:
    """Connections from every member to the first one, which live as long as their processes.

    The kernel closes the connections of a process that dies, however it dies. Whoever notices that
    tells the first member, which tells all others. Each interrupts its main thread, and ends the
    process if that does not answer: it may hang in an exchange with the dead one.
    """

    def __init__(self, rank: int, host: str) -> None:
        self.rank, self.host = rank, host
        self.failure: Failure | None = None
        self._noticed, self._ended = threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._hosts: dict[int, str] = {}
        self._lock = threading.Lock()

    @classmethod
    def over(cls, rank: int, size: int, hosts: list[str], announce: Callable[[Meeting | None], Meeting]) -> Self:
        """The watch of one member; all of them call this at the same time.

        Args:
            hosts: of all members, by rank.
            announce: gives to all members what the first one has to say.
        """
        watch = cls(rank, hosts[rank])
        watch._hosts = dict(enumerate(hosts))
        connection: socket.socket
        if rank == 0:
            with socket.create_server(("", 0), family=_family(), dualstack_ipv6=_family() == socket.AF_INET6) as server:
                server.settimeout(60)
                meeting = Meeting(os.environ["MASTER_ADDR"], server.getsockname()[1], secrets.token_hex(16))
                announce(meeting)
                while len(watch._connections) < size - 1:
                    connection, _ = server.accept()
                    connection.settimeout(_INTRODUCTION)
                    try:
                        word, _, other = connection.makefile("rb").readline().decode(errors="replace").partition(" ")
                        member = int(other) if secrets.compare_digest(word.encode(), meeting.word.encode()) else 0
                    except (OSError, ValueError):  # a stranger that says nothing, or something else
                        member = 0
                    if 0 < member < size:
                        watch._connections[member] = connection
                    else:
                        connection.close()
        else:
            meeting = announce(None)
            connection = socket.create_connection((meeting.host, meeting.port), timeout=60)
            connection.sendall(f"{meeting.word} {rank}\n".encode())
            watch._connections[0] = connection
        for number, connection in watch._connections.items():
            connection.settimeout(None)
            _keep_asking(connection)
            threading.Thread(target=watch._listen, args=(number, connection), daemon=True).start()
        return watch

    def noticed(self, seconds: float) -> Failure | None:
        """The failure of another member, if there is one within some seconds.

        The main thread calls this when an exchange has failed. The interrupt may come only then; it
        ends here, or it would replace the error that is on its way.
        """
        with contextlib.suppress(KeyboardInterrupt):
            self._noticed.wait(seconds)
            time.sleep(0)  # Python delivers what is pending
        return self.failure

    def tell(self, message: str, exit_code: int) -> None:
        """Tell the other members that this one stops. That they end then is no news."""
        self._end()
        self._spread(Failure(self.rank, self.host, message, exit_code), self.rank)

    def close(self, well: bool) -> None:
        """End the watch; without a word unless the work has come to its end well."""
        self._end()
        for connection in self._connections.values():
            if well:
                _send(connection, _BYE)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # the listener still reads from it
            connection.close()

    def _end(self) -> None:
        """From here on nothing interrupts the main thread. An interrupt that is on its way ends here."""
        with contextlib.suppress(KeyboardInterrupt):
            with self._lock:
                self._ended.set()
            time.sleep(0)  # Python delivers what is pending
        self._ended.set()

    def _listen(self, other: int, connection: socket.socket) -> None:
        line = b""
        try:
            line = connection.makefile("rb").readline()
        except OSError as error:  # reset, or no answer
            log.info("rank %d: %s", other, error)
        if line == _BYE or self._ended.is_set():
            return
        try:
            failure = Failure(**json.loads(line))
        except (ValueError, TypeError):  # closed without a word
            failure = Failure(other, self._hosts[other])
        self._spread(failure, other)
        self._stop(failure)

    def _spread(self, failure: Failure, known_to: int) -> None:
        for other, connection in self._connections.items():
            if other not in (known_to, failure.rank):
                _send(connection, json.dumps(asdict(failure)).encode() + b"\n")

    def _stop(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None or self._ended.is_set():
                return
            self.failure = failure
            _thread.interrupt_main()
        self._noticed.set()  # after the interrupt: see `noticed`
        if not self._ended.wait(_GRACE):
            sys.stderr.write(printable(f"error: {failure.error()}\n"))
            sys.stderr.flush()
            os._exit(failure.exit_code)


def _send(connection: socket.socket, message: bytes) -> None:
    try:
        connection.sendall(message)
    except OSError as error:  # it is gone, which its own listener tells
        log.info("%s", error)


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def _keep_asking(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        option: Any = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
