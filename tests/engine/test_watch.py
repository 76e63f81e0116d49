"""How a member learns that another one has ended."""

from __future__ import annotations

import threading
import time

import pytest

from expertprune.engine.watch import Failure, Watch


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
