"""How a member learns that another one has ended."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from expertprune.engine import watch as module
from expertprune.engine.watch import Failure, Meeting, Watch


def test_strangers_do_not_hold_a_team_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One says nothing, one something else, one has the word and a rank that is none."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(module, "_INTRODUCTION", 0.3)
    told: list[Meeting] = []
    ready = threading.Event()
    watches: list[Watch] = []

    def announce(meeting: Meeting | None) -> Meeting:
        assert meeting is not None
        told.append(meeting)
        ready.set()
        return meeting

    first = threading.Thread(target=lambda: watches.append(Watch.over(0, 2, ["a", "b"], announce)))
    first.start()
    assert ready.wait(10)
    meeting = told[0]
    with contextlib.ExitStack() as stack:
        for line in (b"", b"GET / HTTP/1.1\n", f"{meeting.word} 7\n".encode()):
            stranger = stack.enter_context(socket.create_connection((meeting.host, meeting.port)))
            stranger.sendall(line)
        watches.append(Watch.over(1, 2, ["a", "b"], lambda _: meeting))
        first.join(20)
        assert not first.is_alive()
    for each in watches:
        each.close(well=True)


def test_the_interrupt_ends_where_the_failure_is_asked_for() -> None:
    """An exchange with the dead member fails at the same time; its error must not be replaced on its way."""
    watch = Watch(0, "here")
    stopping = threading.Timer(0.2, watch._stop, [Failure(1, "there")])
    try:
        stopping.start()
        found = watch.noticed(30)
        watch._ended.set()  # the main thread cleans up
        time.sleep(0.2)
    except KeyboardInterrupt:
        watch._ended.set()
        pytest.fail("interrupted")
    stopping.join()
    assert found == Failure(1, "there")
