"""The store is shown and emptied, and any command removes what killed ones left."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

import expertprune
from expertprune.files import HOLDINGS, locked, machine, prune_store
from tests.calling import call, call_json

DAY = 24 * 3600


def entry(store: Path, name: str, size: int, days: float) -> Path:
    """A file of the store that was not used for some days."""
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_the_store_is_shown_and_what_is_old_is_removed(store: Path) -> None:
    old = entry(store, "profiles/a.safetensors", 100, 40)
    base = entry(store, "bases/model-0123/model.safetensors", 1000, 31)
    new = entry(store, "profiles/b.safetensors", 10, 2)
    read = entry(store, "evaluations/c.json", 5, 50)
    os.utime(read, (time.time() - DAY, time.time() - 50 * DAY))  # written long ago, read yesterday
    foreign = entry(store, "mine/thesis.txt", 7, 400)
    place = entry(store, "places/d.json", 3, 90)
    shown = call_json("store")
    assert {each["kind"]: (each["entries"], each["bytes"]) for each in shown["holds"]} == {
        "profiles": (2, 110), "bases": (1, 1000), "evaluations": (1, 5), "places": (1, 3)
    }  # fmt: skip
    assert shown["bytes"] == 1118
    gone = call_json("store", "prune", "--older-than", "30d")
    assert gone["bytes"] == 1100
    assert [path.exists() for path in (old, base.parent, new, read)] == [False, False, True, True]
    call("store", "prune", "--older-than", "0d")
    assert [path.exists() for path in (new, foreign, place)] == [False, True, True]
    place.unlink()
    assert "holds nothing" in call("store").stdout
    for text in ("30", "d", "-1d", "soon"):
        assert "is no time" in call("store", "prune", "--older-than", text, code=2).stderr


@pytest.mark.parametrize("before", [True, False])
def test_the_store_that_is_named_is_emptied_not_that_of_the_environment(
    store: Path, tmp_path: Path, before: bool
) -> None:
    kept, other = entry(store, "profiles/a.safetensors", 10, 1), tmp_path / "other"
    gone = entry(other, "profiles/b.safetensors", 10, 1)
    named = ("--store", other)
    words = (
        ("store", *named, "prune", "--older-than", "0d") if before else ("store", "prune", "--older-than", "0d", *named)
    )
    assert call(*words).stdout.startswith(f"{other}: removed")
    assert (kept.exists(), gone.exists()) == (True, False)


def test_what_is_given_before_prune_holds_for_it(store: Path) -> None:
    entry(store, "profiles/a.safetensors", 10, 1)
    assert json.loads(call("store", "--json", "prune", "--older-than", "0d").stdout)["bytes"] == 10


def test_a_folder_that_is_being_removed_when_the_command_is_killed_is_whole_or_gone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a converted base would be taken for the whole one."""
    weights = entry(store, "bases/model-0123/model.safetensors", 10, 1)

    def killed(folder: Path, **_: object) -> None:
        next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_store(store, 0)
    assert not weights.parent.exists()
    call("list", "criteria")
    assert not list((store / "bases").iterdir())


def test_a_lease_that_was_given_back_is_as_old_as_that(store: Path) -> None:
    os.utime(entry(store, "leases/a.1.lease", 5, 0), (0, 0))
    (held,) = call_json("store")["holds"]
    assert held["unused_days"] < 1
    live = entry(store, "leases/b.1.lease", 5, 0)
    call("store", "prune", "--older-than", "0d")
    assert live.exists(), "its process would lose its task to another"
    (store / "repairs/empty").mkdir(parents=True)
    assert all(held["unused_days"] < 1 for held in call_json("store")["holds"])


def test_any_command_removes_what_killed_ones_left(
    store: Path, tmp_path: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside an output that was written elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "elsewhere" / "plan.json"
    call("compose", spec_file, "--set", "relevance=magnitude", "--out", out)
    assert list((store / "parents").iterdir())
    end, foreign = f"{machine()}-0123abcd.partial", out.parent / ".mine.partial"
    left = [tmp_path / f".expertprune.{end}", store / f".rate.{end}", store / "profiles" / f".x.safetensors.{end}",
            out.parent / f".x.{end}"]  # fmt: skip
    for folder in (foreign, *left):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
    call("list", "criteria")
    assert [folder.exists() for folder in (foreign, *left)] == [True] + [False] * 4
    assert not list((store / "parents").iterdir())


def test_everything_that_is_kept_in_the_store_is_shown() -> None:
    code = "".join(path.read_text() for path in Path(expertprune.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'store\w*(?:\(\w*\))? / "([a-z]+)"', code)) == set(HOLDINGS)


@pytest.mark.parametrize("name", ["profiles/.x.working", "repairs/y.unfinished"])
def test_unfinished_work_is_shown_and_goes_after_a_week_unless_a_command_works_there(store: Path, name: str) -> None:
    path = entry(store, f"{name}/layer.safetensors", 100, 6.9)
    os.utime(path.parent, (time.time() - 6.9 * DAY,) * 2)

    def shown() -> list[tuple[str, int]]:
        return [(each["kind"], each["bytes"]) for each in call_json("store")["holds"]]

    assert shown() == [(name.partition("/")[0], 100)]
    for each in (path, path.parent):
        os.utime(each, (time.time() - 7.1 * DAY,) * 2)
    with locked(path.parent):
        call("list", "criteria")
        assert path.exists()
    call("list", "criteria")
    assert not path.parent.exists()
    entry(store, f"{name}/layer.safetensors", 100, 5)
    call("store", "prune", "--older-than", "4d")
    assert shown() == []
