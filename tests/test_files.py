"""Files and folders appear whole or not at all, and digests say what the bytes say."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from expertprune.errors import CheckpointError
from expertprune.files import digests, outputs, ownership, places, reading, renaming, staging
from expertprune.files.places import EXPERT_FILE
from expertprune.files.staging import staged_file, staged_folder


def names(folder: Path) -> list[str]:
    """Every path below a folder, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def texts(folder: Path) -> dict[str, str]:
    """What every file below a folder holds, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def expert(folder: Path, content: str = "old") -> Path:
    """A folder that counts as an expert."""
    folder.mkdir(parents=True)
    (folder / EXPERT_FILE).write_text(content)
    return folder


# --- store and digests ----------------------------------------------------------------------------------------------


def test_the_store_is_the_argument_the_variable_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(tmp_path / "variable"))
    assert places.store_folder(tmp_path / "argument") == tmp_path / "argument"
    assert places.store_folder() == tmp_path / "variable"
    monkeypatch.setenv("EXPERTPRUNE_STORE", "")
    monkeypatch.setattr(places, "user_cache_path", lambda name: tmp_path / "cache" / name)
    assert places.store_folder() == tmp_path / "cache" / "expertprune"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.store_folder("~/profiles") == tmp_path / "profiles"


def test_a_digest_is_of_the_canonical_json() -> None:
    expected = hashlib.sha256('{"a":null,"b":[1,"ä"]}'.encode()).hexdigest()
    assert digests.digest_of({"b": [1, "ä"], "a": None}) == digests.digest_of({"a": None, "b": [1, "ä"]}) == expected


def test_a_file_digest_is_of_the_bytes_and_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    """It counts a step for each part that it reads."""
    path, store = tmp_path / "weights", tmp_path / "store"

    def check(content: bytes, steps: int, changed: int | None = None) -> None:
        counted: list[int] = []
        path.write_bytes(content)
        os.utime(path, ns=(len(content), len(content)) if changed is None else (changed, changed))
        digest = staging.file_digest(path, store, lambda: counted.append(1))
        assert (digest, len(counted)) == (hashlib.sha256(content).hexdigest(), steps)

    for size, steps in ((0, 0), (1, 1), (staging.HASHED, 1), (staging.HASHED + 1, 2)):
        check(b"x" * size, steps)
    check(b"x", 0)
    check(b"y", 1, changed=2)  # of the same size, later
    for remembered in (store / "digests").iterdir():
        remembered.write_text("damaged")
    check(b"x", 1)
    shutil.rmtree(store / "digests")
    (store / "digests").write_text("a file where the folder should be")
    check(b"x", 1)


class Counted(BaseModel):
    count: int


def test_a_file_of_the_store_that_is_damaged_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "count.json"
    assert reading.read_kept(path, Counted) is None
    wrong = (b'{"count": "many"}', b'{"count": NaN}', b'{"count": 1e999}')
    for content in (b"", b"{", b"\xff", b"[" * 9999, b"[]", b"9" * 9999, *wrong):
        path.write_bytes(content)
        assert reading.read_kept(path, Counted) is None, content
    staging.write_json(path, {"count": 3})
    assert reading.read_kept(path, Counted) == Counted(count=3)


def test_write_json_writes_in_order_and_null_for_a_number_that_json_cannot_say(tmp_path: Path) -> None:
    staging.write_json(
        tmp_path / "data.json", {"b": [math.nan, 0.5], "a": {"c": math.inf}, "d": (-math.inf, "ä", True)}
    )
    text = (tmp_path / "data.json").read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [("b", [None, 0.5]), ("a", {"c": None}), ("d", [None, "ä", True])]
    assert "ä" in text
    assert text.endswith("}\n")


# --- whole or not at all --------------------------------------------------------------------------------------------


@pytest.fixture(params=["with renameat2", "without"])
def _system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that can rename with flags, and one that cannot."""
    if request.param == "without":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)


STAGED = pytest.mark.parametrize("staged", [staged_file, staged_folder])


def within(made: Path) -> Path:
    """The file that is staged, or one in the folder that is."""
    return made / EXPERT_FILE if made.is_dir() else made


@STAGED
@pytest.mark.usefixtures("_system")
def test_what_is_staged_appears_at_the_end_or_not_at_all(tmp_path: Path, staged: Any) -> None:
    """Also where something older is, which then stays."""
    out = tmp_path / "deep" / "out"
    again = {} if staged is staged_file else {"overwrite": True}

    def write(content: str, fails: bool) -> dict[str, str]:
        before = texts(out.parent)
        with contextlib.suppress(KeyboardInterrupt), staged(out, **again) as made:
            assert out.parent in made.parents  # on one disk with it, so that renaming is all or nothing
            within(made).write_text(content)
            assert {name: text for name, text in texts(out.parent).items() if not name.startswith(".")} == before
            if fails:
                raise KeyboardInterrupt
        return texts(tmp_path)

    name = "deep/out" if staged is staged_file else f"deep/out/{EXPERT_FILE}"
    assert write("first", fails=True) == {}
    assert write("first", fails=False) == {name: "first"}
    if staged is staged_folder:
        (out / "stale").write_text("x")
    old = texts(tmp_path)
    assert write("second", fails=True) == old
    assert write("second", fails=False) == {name: "second"}
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no folder is left either"


FULL, DENIED = "no room left on the disk", "cannot be written"
DISK_ERRORS: list[tuple[Exception, type[Exception], str]] = [
    *((OSError(number, "x"), CheckpointError, FULL) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    *((OSError(number, "x"), CheckpointError, DENIED) for number in (errno.EACCES, errno.EROFS, errno.EPERM)),
    (OSError(errno.EIO, "broken"), OSError, "broken"),
    (SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})"), CheckpointError, FULL),
    (SafetensorError("I/O error: Input/output error (os error 5)"), SafetensorError, "os error 5"),
]


def test_the_disks_errors_become_messages_that_name_the_path_and_others_stay(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with staged_folder(tmp_path / "out") as made:
            within(made).write_text("half")
            raise error

    for error, kind, words in DISK_ERRORS:
        with pytest.raises(kind, match=words) as caught:
            fail(error)
        assert kind is not CheckpointError or str(tmp_path / "out") in str(caught.value)
        assert names(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="out"), staged_file(tmp_path / "file" / "out"):
        pass


def test_everything_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    """Libraries that write files themselves give them 0600."""
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "expert") as folder:
            (folder / "sub").mkdir(0o700)
            for path in (folder / "weights", folder / "sub" / "part"):
                path.touch(0o600)
        with staged_file(tmp_path / "profile") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = dict.fromkeys(("expert/weights", "expert/sub/part", "profile"), 0o640)
    assert modes == {"expert": 0o750, "expert/sub": 0o750, **files}


@STAGED
def test_everything_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: Any) -> None:
    """What is renamed, and new folders above it."""
    events: list[str] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def synced(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda old, new: events.append(f"rename {new.name}") or rename(old, new))
    with staged(tmp_path / "one" / "two" / "out") as made:
        assert {"sync one", f"sync {tmp_path.name}"} <= set(events)
        events.clear()
        within(made).write_text("new")
        monkeypatch.setattr(os, "replace", lambda old, new: events.append(f"rename {new.name}") or replace(old, new))
    content = [f"sync {EXPERT_FILE}", "sync out"] if staged is staged_folder else ["sync out"]
    assert events == [*content, "rename out", "sync two"]


# --- what others left, and what they write --------------------------------------------------------------------------

HERE = f".expert.{ownership.machine()}-0123abcd"  # of this host and boot; no process has its lock
HOST, _, BOOT = ownership.machine().rpartition("-")
WEEK = 7 * 24 * 3600
YOUNG, OLD = WEEK - 3600, WEEK + 3600
STAGES = """
import os, sys
from pathlib import Path
from expertprune.files import staged_folder

with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""
# where the system allows it, in a container: with process ids of its own
CONTAINER = ["unshare", "--pid", "--fork", "--kill-child"]
CONTAINED = subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode == 0


def stage(out: Path) -> None:
    with staged_folder(out) as folder:
        assert names(folder) == []


def overwrite(out: Path, fails: bool = False) -> None:
    with contextlib.suppress(KeyboardInterrupt), staged_folder(out, overwrite=True) as made:
        within(made).write_text("new")
        if fails:
            raise KeyboardInterrupt


def check_expert(folder: Path, content: str) -> None:
    """One expert, and nothing else, is in the folder."""
    assert names(folder) == ["expert", f"expert/{EXPERT_FILE}"]
    assert (folder / "expert" / EXPERT_FILE).read_text() == content


def test_what_another_run_writes_stays_until_that_run_is_killed(tmp_path: Path) -> None:
    """However long it takes, and whatever its process id."""
    command = [*(CONTAINER if CONTAINED else []), sys.executable, "-c", STAGES, str(tmp_path / "expert")]
    environment = {**os.environ, "PYTHONPATH": str(Path(staging.__file__).parents[2])}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, **pipes) as run:
        assert run.stdout is not None
        assert int(run.stdout.readline()) == 1 or not CONTAINED
        (leftover,) = tmp_path.iterdir()
        for path in (*leftover.rglob("*"), leftover):
            os.utime(path, (time.time() - 2 * WEEK,) * 2)
        stage(tmp_path / "expert")
        assert names(leftover) == ["expert", "expert/weights"]
        run.kill()
        assert run.stdout.read() == b""  # until all of it has ended
        stage(tmp_path / "expert")
        assert not leftover.exists()


LEFTOVERS = [
    (f"{HERE}.partial", 0, False, True),
    (f".expert.elsewhere-{BOOT}-0123abcd.partial", YOUNG, True, True),
    (f".expert.elsewhere-{BOOT}-0123abcd.partial", OLD, False, True),
    (f".expert.{HOST}-ffffffff-0123abcd.partial", OLD, False, True),
    (f".another.v2.{HERE[8:]}.partial", 0, False, True),  # whatever it was to become
    (".expert.4711.partial", OLD, True, True),  # of another program
    (".film.mp4.partial", OLD, True, True),
    (f"{HERE}.partial", YOUNG, True, False),
    (f"{HERE}.partial", OLD, False, False),
]


@pytest.mark.parametrize(("name", "age", "stays", "locks"), LEFTOVERS)
def test_a_leftover_without_an_owner_goes_if_it_is_of_this_boot_or_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, age: float, stays: bool, locks: bool
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(ownership.fcntl, "flock", refused)
    leftover = tmp_path / name
    leftover.mkdir()
    (leftover / "vocab.json").write_text("half")
    for path, seconds in ((leftover / "vocab.json", age), (leftover, OLD)):  # its own time says nothing of its files
        os.utime(path, (time.time() - seconds,) * 2)
    outputs.check_output(tmp_path / "new" / "expert", False)  # where `new` is not yet
    assert leftover.exists() == stays
    stage(tmp_path / "expert")
    staging.write_file(tmp_path / "plan.json", b"whole")
    assert (leftover.exists(), (tmp_path / "plan.json").read_bytes()) == (stays, b"whole")


def test_an_expert_that_a_killed_run_had_moved_aside_comes_back_until_it_is_replaced(tmp_path: Path) -> None:
    """Killed between its two renamings: no expert in its place, the old one under another name."""
    aside = tmp_path / f"{HERE}.replaced" / "expert"
    expert(aside, "old")
    with pytest.raises(CheckpointError, match="--overwrite"), staged_folder(tmp_path / "expert"):
        pass
    check_expert(tmp_path, "old")
    for fails, content in ((True, "old"), (False, "new")):
        aside.parent.mkdir()
        os.replace(tmp_path / "expert", aside)
        overwrite(tmp_path / "expert", fails)
        check_expert(tmp_path, content)
    expert(aside, "old")  # one that had been replaced
    overwrite(tmp_path / "expert")
    check_expert(tmp_path, "new")


def test_an_expert_stays_where_the_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, new, calls = expert(tmp_path / "expert"), staging.rename_new, itertools.count(1)

    def failing(source: Path, target: Path) -> None:
        if next(calls) == 2:  # the first finds that the expert is there
            raise KeyboardInterrupt
        new(source, target)

    monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    monkeypatch.setattr(staging, "rename_new", failing)
    overwrite(out)
    check_expert(tmp_path, "old")


def test_an_expert_is_at_the_path_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if renaming._renameat2() is None:
        pytest.skip("this system cannot swap")
    with staged_folder(expert(tmp_path / "expert"), overwrite=True) as made:
        within(made).write_text("new")
        monkeypatch.setattr(os, "replace", None)  # so nothing is moved aside
    check_expert(tmp_path, "new")


@pytest.mark.parametrize("again", [False, True], ids=["new", "overwrite"])
@pytest.mark.usefixtures("_system")
def test_what_comes_to_the_output_meanwhile_stays_beside_the_result(tmp_path: Path, again: bool) -> None:
    out, plan = tmp_path / "expert", tmp_path / "plan.json"
    if again:
        expert(out, "old")
        plan.write_text('{"kind": "plan"}')

    def write_folder() -> None:
        with staged_folder(out, overwrite=again) as temporary:
            (temporary / EXPERT_FILE).write_text("new")
            shutil.rmtree(out, ignore_errors=True)
            expert(out, "of another run")
            (out / "thesis.txt").write_text("precious")

    def write_plan() -> None:
        with staging.staged_output(plan, outputs.PLAN, overwrite=again) as temporary:
            temporary.write_text("new")
            (tmp_path / "theirs").write_text("precious")
            os.replace(tmp_path / "theirs", plan)

    with pytest.raises(CheckpointError, match=r"something else came there .*the result is .*expert-2$"):
        write_folder()
    with pytest.raises(CheckpointError, match=r"the result is .*plan-2.json$"):
        write_plan()
    theirs = {f"expert/{EXPERT_FILE}": "of another run", "expert/thesis.txt": "precious", "plan.json": "precious"}
    assert texts(tmp_path) == {**theirs, f"expert-2/{EXPERT_FILE}": "new", "plan-2.json": "new"}


@pytest.mark.parametrize("again", [False, True], ids=["once", "and once more"])
def test_what_comes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    out, replace = expert(tmp_path / "expert"), os.replace

    def late(old: Path, place: Path) -> None:
        if old == out:
            shutil.rmtree(out)
            expert(out, "of another run")
        replace(old, place)
        if old == out and again:
            expert(out, "of a third run")

    monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(CheckpointError, match="something else came there"):
        overwrite(out)
    found = [path.parent.name + " " + path.read_text() for path in sorted(tmp_path.rglob(EXPERT_FILE))]
    others = ["expert of a third run", "expert-2 of another run"] if again else ["expert of another run"]
    assert found == [*others, f"expert-{len(others) + 1} new"]


# --- what may be written, and where ---------------------------------------------------------------------------------


def test_an_output_is_never_what_the_command_reads(tmp_path: Path) -> None:
    base = expert(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    for inputs in ([base], [base / "corpus.jsonl"], [tmp_path / "link" / "corpus.jsonl"]):
        with pytest.raises(CheckpointError, match="the command reads"):
            outputs.check_output(base, True, inputs=inputs)
    outputs.check_output(base, True, inputs=[tmp_path / "basement", tmp_path])


def test_names_as_long_as_the_file_system_allows_are_written(tmp_path: Path) -> None:
    for name in ("n" * 250, "ä" * 120):
        stage(tmp_path / name)
        staging.write_file(tmp_path / f"{name[:-1]}f", b"x")
        assert (tmp_path / name).is_dir()
        assert (tmp_path / f"{name[:-1]}f").read_bytes() == b"x"


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is never touched, unless it is an expert; an empty folder is fine."""
    monkeypatch.chdir(tmp_path)
    for out in ("n" * 256, "new/" + "n" * 256, ".", "..", "/"):
        with pytest.raises(CheckpointError):
            outputs.check_output(Path(out), False)
    assert names(tmp_path) == []
    target, thesis = expert(tmp_path / "target"), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("precious")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    before = names(tmp_path)
    for overwrite in (False, True):
        for name, words in (("file", "not a folder"), ("link", "symbolic link"), ("dangling", "symbolic link")):
            with pytest.raises(CheckpointError, match=words):
                outputs.check_output(tmp_path / name, overwrite)
        with pytest.raises(CheckpointError, match=f"{thesis}.*{'no expert' if overwrite else '--overwrite'}"):
            outputs.check_output(thesis, overwrite)
        with pytest.raises(CheckpointError), staged_folder(thesis, overwrite):
            raise AssertionError("the block must not run")
    assert names(tmp_path) == before
    (tmp_path / "empty").mkdir()
    stage(tmp_path / "empty")


def test_room_is_counted_by_disk_on_folders_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, folder, free = [], tmp_path / "not" / "yet", 1000 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or SimpleNamespace(free=free))
    places.require_room(folder, free)
    with pytest.raises(CheckpointError, match=rf"{folder}: needs 1,001 MiB of disk, 1,000 MiB are free"):
        places.require_room(folder, free + 2**20)
    assert asked == [tmp_path] * 2
    needs = {"--out": (tmp_path / "new" / "expert", 600 * 2**20), "--store": (tmp_path / "store", 300 * 2**20)}
    places.require_rooms(needs)  # each of two folders would fit alone, and these do together
    with pytest.raises(CheckpointError) as caught:
        places.require_rooms({**needs, "--spool": (tmp_path, 200 * 2**20), "HF_HOME": (tmp_path, 0)})
    words = f"600 MiB in {tmp_path}/new/expert (--out), 300 MiB in {tmp_path}/store (--store), 200 MiB in {tmp_path}"
    assert f"{words} (--spool); 1,000 MiB are free; free some" in str(caught.value)
    assert str(caught.value).endswith("with --out or --store or --spool")
