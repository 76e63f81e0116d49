"""Leases: one holder at a time, whatever dies, and however many reach for one."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from expertprune.engine.leases import Leases, Owner
from expertprune.errors import CheckpointError

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, told: Any) -> None:
    with Leases(folder, "shard 1/2").held("task") as mine:
        told.put(mine)
        time.sleep(60)


def taken(folder: Path, **changes: Any) -> bool:
    with Leases(folder, **changes).held("task") as mine:
        return mine


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
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="leases cannot be written"):
        taken(tmp_path / "file" / "leases")


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    told = CONTEXT.Queue()
    holder = CONTEXT.Process(target=hold, args=(tmp_path, told), daemon=True)
    holder.start()
    assert told.get(timeout=60)
    assert not taken(tmp_path)
    assert "shard 1/2" in str(Leases(tmp_path).owner("task"))
    holder.kill()
    holder.join()
    assert taken(tmp_path)


def test_the_lease_of_another_machine_expires_with_its_heartbeat(tmp_path: Path) -> None:
    """By the file system's clock: the owner's process cannot be looked at. A lease may not be written yet."""
    lease = tmp_path / "task.7.lease"
    lease.touch()
    assert not taken(tmp_path)
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
    (tmp_path / "task.9.lease").touch()
    os.utime(tmp_path / "task.9.lease", (1, 1))
    assert taken(tmp_path)


def test_the_heart_beats_while_the_work_lasts(tmp_path: Path) -> None:
    with Leases(tmp_path, expires_after=1).held("task"):
        lease = tmp_path / "task.1.lease"
        os.utime(lease, (1, 1))
        last = time.monotonic() + 20
        while lease.stat().st_mtime == 1:
            assert time.monotonic() < last
            time.sleep(0.02)
        assert not taken(tmp_path, expires_after=60)


def race(folder: Path, start: Any, told: Any) -> None:
    """Take the lease some times, and say when it was held."""
    start.wait()
    held: list[tuple[float, float]] = []
    while len(held) < 8:
        with Leases(folder).held("task") as mine:
            if mine:
                begin = time.monotonic()
                time.sleep(0.002)
                held.append((begin, time.monotonic()))
    told.put(held)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_many_that_race_one_holds_it_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Leases have the mode that the umask says."""

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    start, told = CONTEXT.Event(), CONTEXT.Queue()
    racing = [CONTEXT.Process(target=race, args=(tmp_path, start, told)) for _ in range(3)]
    for process in racing:
        process.start()
    start.set()
    spans = sorted(span for _ in racing for span in told.get(timeout=60))
    for process in racing:
        process.join()
    assert len(spans) == 8 * len(racing)
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
