"""Leases: one holder at a time, whatever dies, and however many reach for one."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from expertprune.engine import leases
from expertprune.engine.leases import Leases, Owner
from expertprune.errors import CheckpointError

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, told: Any) -> None:
    with Leases(folder, "shard 1/2").held("task") as mine:
        told.put(mine)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """Another process that holds the lease of `task`."""
    told = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold, args=(tmp_path, told), daemon=True)
    process.start()
    assert told.get(timeout=20)
    yield process
    process.kill()
    process.join()


def taken(folder: Path, **changes: Any) -> bool:
    with Leases(folder, **changes).held("task") as mine:
        return mine


def test_without_hard_links_too_a_lease_has_the_mode_that_the_umask_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refused)
    before = os.umask(0o027)
    try:
        with Leases(tmp_path).held("task"):
            (path,) = tmp_path.iterdir()
            assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_lease_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path).held("task") as first, Leases(tmp_path).held("other") as other:
        assert (first, other, taken(tmp_path)) == (True, True, False)
        owner = Leases(tmp_path).owner("task")
        assert owner is not None
        assert owner.pid == os.getpid()
    assert Leases(tmp_path).owner("task") is None
    assert taken(tmp_path)
    with pytest.raises(KeyError), Leases(tmp_path).held("task"):
        raise KeyError
    assert taken(tmp_path), "an error gives it back too"


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path: Path, holder: Any) -> None:
    assert not taken(tmp_path)
    assert "shard 1/2" in str(Leases(tmp_path).owner("task"))
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert taken(tmp_path)


def test_the_lease_of_another_machine_expires_with_its_heartbeat(tmp_path: Path) -> None:
    """By the file system's clock: the owner's process cannot be looked at."""
    lease = tmp_path / "task.7.lease"
    lease.write_text(json.dumps(asdict(replace(Owner.of_this_process(), machine="far-away-01234567"))))
    assert not taken(tmp_path, expires_after=5)
    beat = lease.stat().st_mtime
    os.utime(lease, (beat - 4, beat - 4))
    assert not taken(tmp_path, expires_after=5)
    os.utime(lease, (beat - 6, beat - 6))
    with Leases(tmp_path, expires_after=5).held("task") as mine:
        assert mine
        assert (tmp_path / "task.8.lease").exists()
        assert not taken(tmp_path, expires_after=5)


def test_a_lease_that_is_not_written_yet_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "task.1.lease").touch()
    assert not taken(tmp_path)
    os.utime(tmp_path / "task.1.lease", (1, 1))
    assert taken(tmp_path)


def test_the_heart_beats_while_the_work_lasts(tmp_path: Path) -> None:
    with Leases(tmp_path, expires_after=0.4).held("task"):
        time.sleep(1)
        assert not taken(tmp_path, expires_after=0.4)


def race(folder: Path, start: Any, told: Any) -> None:
    """Take the lease as often as possible, and say when it was held."""
    start.wait()
    until = time.monotonic() + 1.5
    held = []
    while time.monotonic() < until:
        with Leases(folder).held("task") as mine:
            if mine:
                begin = time.monotonic()
                time.sleep(0.002)
                held.append((begin, time.monotonic()))
    told.put(held)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_many_that_race_one_holds_it_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refused(*_: Any) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(leases.os, "link", refused)
    start, told = CONTEXT.Event(), CONTEXT.Queue()
    racing = [CONTEXT.Process(target=race, args=(tmp_path, start, told)) for _ in range(4)]
    for process in racing:
        process.start()
    start.set()
    held = [told.get(timeout=30) for _ in racing]
    for process in racing:
        process.join()
    spans = sorted(span for each in held for span in each)
    assert len(spans) > 20
    assert sum(bool(each) for each in held) > 1, "more than one got it in turn"
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="leases cannot be written"):
        taken(tmp_path / "file" / "leases")
