"""Shards of a sweep and of corpora: each task once, whatever dies, and the same numbers as in one process."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import expertprune
from expertprune.engine import tasks as engine
from expertprune.engine.leases import Leases
from expertprune.engine.tasks import Collect, RemoteCall, Report, Shard, Task
from expertprune.engine.team import Team
from expertprune.errors import UnfinishedError, UsageError
from expertprune.progress import Track, silent
from tests.calling import call, call_json
from tests.processes import server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PAUSE", 0.05)


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    """Two corpora."""
    path = tmp_path / "tiny.yaml"
    data = {**spec_data, "dimensions": {"domain": "medical"}, "evaluate": {"documents": 2}}
    path.write_text(yaml.safe_dump(data))
    return path


def nothing(track: Track) -> None:
    raise AssertionError


class Work:
    """Tasks whose results are files."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.tasks = [self._task(str(number)) for number in range(count)]

    def _task(self, name: str) -> Task:
        def run(track: Track) -> None:
            self.made.append(name)
            (self.folder / name).touch()

        return Task(name, f"d{name}", (self.folder / name).exists, run, RemoteCall(nothing, {}))


def test_a_shard_does_its_own_share_first_then_what_nobody_does(tmp_path: Path) -> None:
    work, leases = Work(tmp_path, 7), Leases(tmp_path / "leases")
    with leases.held("d3"):
        report = Shard(1, 3, leases).work(work.tasks, silent)
    assert work.made == ["1", "4", "2", "5", "0", "6"], "3 is another's, and not in the share 1, 4"
    assert report == Report(work.made, ["3"])
    with pytest.raises(UnfinishedError, match=r"1 of 7 tasks are not done: 3;"):
        Collect(leases).run(work.tasks, silent)
    assert Shard(2, 3, leases).work(work.tasks, silent) == Report(["3"], [])


def test_a_shard_waits_for_its_own_share_until_the_lease_of_a_dead_process_expires(tmp_path: Path) -> None:
    work = Work(tmp_path, 2)
    leases = tmp_path / "leases"
    leases.mkdir()
    (leases / "d0.1.lease").write_text('{"machine": "far-0", "pids": "", "pid": 1, "started": 1}')
    begin = time.monotonic()
    mine = Shard(0, 2, Leases(leases, expires_after=0.6))
    assert mine.work(work.tasks, silent).here == ["1", "0"]
    assert time.monotonic() - begin > 0.5


def test_a_shard_that_is_none_and_two_ways_at_once_are_refused(spec_file: Path, no_model: None) -> None:
    wrong = {"9/8": "no shard 9 of 8", "0/8": "no shard 0", "3": "not NUMBER/COUNT", "-1/8": "not NUMBER/COUNT"}
    for text, words in wrong.items():
        with pytest.raises(UsageError, match=words):
            Shard.parse(text)
    assert wrong["9/8"] in call("sweep", spec_file, "--budgets", "0.5", "--shard", "9/8", code=2).stderr
    assert wrong["3"] in call("profile", spec_file, "--shard", "3", code=2).stderr
    assert "not several" in call("profile", spec_file, "--shard", "1/2", "--collect", code=2).stderr
    whole = ("sweep", spec_file, "--budgets", "0.5", "--shard", "1/2", "--picture", "sweep.png")
    assert "--picture: a shard knows only its own points" in call(*whole, code=2).stderr
    alone = (*whole[:-2], "--out", "sweep")
    assert "--out: a shard knows only its own points" in call(*alone, code=2).stderr
    assert "need --engine ray" in call("profile", spec_file, "--members", "2", code=2).stderr


def test_members_of_a_team_take_no_tasks_of_their_own(
    tmp_path: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would work on different ones, and add up their sums."""
    work = Work(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "team", lambda: Team(0, 2))
        with pytest.raises(UsageError, match="a shard is one process: run it without torchrun"):
            Shard(0, 2, Leases(tmp_path / "leases")).work(work.tasks, silent)
    assert work.made == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in (["--shard", "1/2"], ["--collect"], ["--engine", "ray"]):
        assert "give them without torchrun" in call("profile", spec_file, *options, code=2).stderr


@pytest.mark.slow
def test_three_shards_of_which_one_is_killed(tmp_path: Path, spec_file: Path, store: Path) -> None:
    """The killed one holds a lease in the middle of a profile; the others do its work too."""
    shared = tmp_path / "shared"
    arguments = ["sweep", spec_file, "--budgets", "0.5,0.25", "--store", shared]
    assert "tasks are not done: profile" in call(*arguments, "--collect", code=1).stderr
    shards = [[*arguments, "--shard", f"{number}/3", "--json"] for number in (1, 2, 3)]
    killed, *others = server().beside(*shards, held=0, hold="first profile")
    assert killed.code == -signal.SIGKILL
    assert [each.code for each in others] == [0, 0], others
    done = [name for each in others for name in json.loads(each.stdout)["done_here"]]
    assert sorted(done) == ["budget 0.25", "budget 0.5"]
    collected = call_json(*arguments, "--collect", "--out", tmp_path / "out")
    assert collected == expertprune.sweep(spec_file, [0.5, 0.25], store=store).document()
    assert (tmp_path / "out" / "sweep.json").is_file()
    assert list((shared / "leases").iterdir()) == []


def test_profiles_are_shared_out_and_listed(spec_file: Path) -> None:
    report = call_json("profile", spec_file, "--shard", "2/2")
    assert report["left"] == []
    assert sorted(report["done_here"]) == ["profile domain/medical", "profile general/general"]
    assert len(call_json("profile", spec_file, "--collect")["profiles"]) == 2
    assert "shard 1/2 did nothing; everything is done" in call("profile", spec_file, "--shard", "1/2").stdout
