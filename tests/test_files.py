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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from expertprune.errors import CheckpointError
from expertprune.files import (
    GGUF,
    PAGE,
    PICTURE,
    PLAN,
    OutputKind,
    check_output,
    digest_of,
    file_digest,
    machine,
    ownership,
    places,
    read_kept,
    remove_leftovers,
    renaming,
    require_room,
    staged_file,
    staged_folder,
    staged_output,
    staging,
    store_folder,
    temporary_folder,
    write_file,
    write_json,
)


def names(folder: Path) -> list[str]:
    """Every path below a folder, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def expert(folder: Path, content: str = "old") -> Path:
    """A folder that counts as an expert."""
    folder.mkdir(parents=True)
    (folder / "expertprune.json").write_text(content)
    return folder


# --- store and digests ----------------------------------------------------------------------------------------------


def test_the_store_is_the_argument_then_the_variable_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(tmp_path / "variable"))
    assert store_folder(tmp_path / "argument") == tmp_path / "argument"
    assert store_folder() == tmp_path / "variable"
    monkeypatch.setenv("EXPERTPRUNE_STORE", "")
    monkeypatch.setattr(places, "user_cache_path", lambda name: tmp_path / "cache" / name)
    assert store_folder() == tmp_path / "cache" / "expertprune"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_folder("~/profiles") == tmp_path / "profiles"


def test_a_digest_is_of_the_canonical_json() -> None:
    expected = hashlib.sha256('{"a":null,"b":[1,"ä"]}'.encode()).hexdigest()
    assert digest_of({"b": [1, "ä"], "a": None}) == digest_of({"a": None, "b": [1, "ä"]}) == expected


def test_a_file_digest_is_of_the_bytes_and_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = tmp_path / "weights", tmp_path / "store"

    def check(content: bytes) -> None:
        assert file_digest(path, store) == hashlib.sha256(content).hexdigest()

    path.write_bytes(b"first")
    os.utime(path, ns=(1, 1))
    check(b"first")
    with monkeypatch.context() as patched:
        patched.setattr(staging.hashlib, "file_digest", None)  # the file is not read again
        check(b"first")
    path.write_bytes(b"other")  # of the same size, later
    os.utime(path, ns=(2, 2))
    check(b"other")
    path.write_bytes(b"longer than first")
    check(b"longer than first")
    for remembered in (store / "digests").iterdir():
        remembered.write_text("damaged")
    check(b"longer than first")
    shutil.rmtree(store / "digests")
    (store / "digests").write_text("a file where the folder should be")
    check(b"longer than first")


# --- staged files ---------------------------------------------------------------------------------------------------


STAGED = pytest.mark.parametrize("staged", [staged_file, staged_folder])
FAILS = pytest.mark.parametrize("fails", [False, True])


@FAILS
@STAGED
def test_what_is_staged_appears_at_the_end_or_not_at_all(tmp_path: Path, staged: Any, fails: bool) -> None:
    out = tmp_path / "deep" / "out"
    with contextlib.suppress(KeyboardInterrupt), staged(out) as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("new")
        assert not out.exists()
        assert out.parent in temporary.parents  # on one disk with it, so that renaming is all or nothing
        if fails:
            raise KeyboardInterrupt
    whole = ["deep", "deep/out"] if staged is staged_file else ["deep", "deep/out", "deep/out/part"]
    assert names(tmp_path) == (["deep"] if fails else whole)


@FAILS
def test_a_staged_file_replaces_the_old_one_or_leaves_it(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "plan.json").write_text("old")
    with contextlib.suppress(KeyboardInterrupt), staged_file(tmp_path / "plan.json") as temporary:
        temporary.write_text("new")
        if fails:
            raise KeyboardInterrupt
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == ("old" if fails else "new")


def test_write_json_writes_in_order_and_null_for_a_number_that_json_cannot_say(tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", {"b": [math.nan, 0.5], "a": {"c": math.inf}, "d": (-math.inf, "ä", True)})
    text = (tmp_path / "data.json").read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [("b", [None, 0.5]), ("a", {"c": None}), ("d", [None, "ä", True])]
    assert "ä" in text
    assert text.endswith("}\n")


FULL = "no room left on the disk"
DENIED = "cannot be written"
DISK_ERRORS: list[tuple[Exception, type[Exception], str]] = [
    *((OSError(number, "x"), CheckpointError, FULL) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    *((OSError(number, "x"), CheckpointError, DENIED) for number in (errno.EACCES, errno.EROFS, errno.EPERM)),
    (OSError(errno.EIO, "broken"), OSError, "broken"),
    (SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})"), CheckpointError, FULL),
    (SafetensorError("I/O error: Input/output error (os error 5)"), SafetensorError, "os error 5"),
]


@pytest.mark.parametrize(("error", "kind", "words"), DISK_ERRORS, ids=[str(error) for error, _, _ in DISK_ERRORS])
@STAGED
def test_the_disks_errors_become_messages_that_name_the_path_and_others_stay(
    tmp_path: Path, error: Exception, kind: type[Exception], words: str, staged: Any
) -> None:
    def fail() -> None:
        with staged(tmp_path / "out") as temporary:
            (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
            raise error

    with pytest.raises(kind, match=words) as caught:
        fail()
    assert kind is not CheckpointError or str(tmp_path / "out") in str(caught.value)
    assert names(tmp_path) == []


@STAGED
def test_a_file_in_the_way_of_the_parent_folder_becomes_a_message(tmp_path: Path, staged: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="out"), staged(tmp_path / "file" / "out"):
        pass


# --- staged folders -------------------------------------------------------------------------------------------------

HERE = f".expert.{ownership.machine()}-0123abcd"  # of this host and boot; no process has its lock
HOST, _, BOOT = ownership.machine().rpartition("-")
WEEK = 7 * 24 * 3600
YOUNG, OLD = WEEK - 3600, WEEK + 3600

STAGES = """
import sys
from pathlib import Path
from expertprune.files import staged_folder

with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_run(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun to write `out`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(staging.__file__).parents[2])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STAGES, str(out)], env=environment, **pipes) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        yield run
        run.kill()


def aged(path: Path, seconds: float) -> None:
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - seconds,) * 2)


def stage(out: Path) -> None:
    with staged_folder(out) as folder:
        assert names(folder) == []


def overwrite(out: Path, fails: bool = False) -> None:
    with contextlib.suppress(KeyboardInterrupt), staged_folder(out, overwrite=True) as temporary:
        (temporary / "expertprune.json").write_text("new")
        if fails:
            raise KeyboardInterrupt


def check_expert(folder: Path, content: str) -> None:
    """One expert, and nothing else, is in the folder."""
    assert names(folder) == ["expert", "expert/expertprune.json"]
    assert (folder / "expert" / "expertprune.json").read_text() == content


@pytest.mark.skipif(subprocess.run(["unshare", "--pid", "true"], check=False).returncode != 0, reason="no namespaces")
def test_two_containers_that_share_a_disk_do_not_take_each_other_for_dead(tmp_path: Path) -> None:
    """Both processes have the id 1; the second begins, and publishes, while the first is in the middle."""
    out = tmp_path / "expert"
    code = """
import os, sys, time
from pathlib import Path
from expertprune.files import staged_folder
out, number = Path(sys.argv[1]), sys.argv[2]
with staged_folder(out) as made:
    (made / "weights").write_text(number)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    (made / "expertprune.json").write_text("{}")
"""
    alone = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code, str(out)]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    first, second = (subprocess.Popen([*alone, number], **pipes) for number in ("first", "second"))
    with first, second:
        assert [each.stdout.readline() for each in (first, second)] == ["1\n", "1\n"]
        assert second.communicate("go\n")[1] == ""
        said = first.communicate("go\n")[1]
    assert "something else came there while this command ran, and stays; the result is" in said
    assert (out / "weights").read_text() == "second"
    assert (tmp_path / "expert-2" / "weights").read_text() == "first"


def test_what_another_run_writes_stays_until_that_run_is_killed(tmp_path: Path) -> None:
    """However long it takes."""
    with other_run(tmp_path / "expert") as run:
        (leftover,) = tmp_path.iterdir()
        aged(leftover, 2 * WEEK)
        stage(tmp_path / "expert")
        assert names(leftover) == ["expert", "expert/model.safetensors"]
        run.kill()
        run.wait()
        stage(tmp_path / "expert")
        assert not leftover.exists()


@pytest.mark.parametrize(
    ("name", "age", "stays"),
    [
        (f"{HERE}.partial", 0, False),
        (f".expert.elsewhere-{BOOT}-0123abcd.partial", YOUNG, True),
        (f".expert.elsewhere-{BOOT}-0123abcd.partial", OLD, False),
        (f".expert.{HOST}-ffffffff-0123abcd.partial", OLD, False),
        (f".another.v2.{HERE[8:]}.partial", 0, False),  # whatever it was to become
        (".expert.4711.partial", OLD, True),  # of another program
        (".film.mp4.partial", OLD, True),
    ],
)
def test_a_leftover_without_an_owner_goes_if_it_is_of_this_boot_or_old(
    tmp_path: Path, name: str, age: float, stays: bool
) -> None:
    leftover = tmp_path / name
    (leftover / "tokenizer").mkdir(parents=True)
    (leftover / "tokenizer" / "vocab.json").write_text("half")
    aged(leftover, age)
    stage(tmp_path / "expert")
    assert leftover.exists() == stays


def test_room_is_counted_by_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two folders would fit alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 * 2**20))
    needs = {"--out": (tmp_path / "new" / "expert", 600 * 2**20), "--store": (tmp_path / "store", 300 * 2**20)}
    places.require_rooms(needs)
    with pytest.raises(CheckpointError) as caught:
        places.require_rooms({**needs, "--spool": (tmp_path, 200 * 2**20), "HF_HOME": (tmp_path, 0)})
    words = f"600 MiB in {tmp_path}/new/expert (--out), 300 MiB in {tmp_path}/store (--store), 200 MiB in {tmp_path}"
    assert f"{words} (--spool); 1,000 MiB are free; free some" in str(caught.value)
    assert str(caught.value).endswith("with --out or --store or --spool")


def test_what_is_left_of_trying_an_output_goes_with_the_next_command(tmp_path: Path) -> None:
    """A killed command tried `new/expert` where `new` was not yet."""
    leftover = tmp_path / f".expert.{machine()}-0123abcd.partial"
    (leftover / "new").mkdir(parents=True)
    check_output(tmp_path / "new" / "expert", False)
    assert names(tmp_path) == []


class Counted(BaseModel):
    count: int


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 9999, b"[]", b'{"count": "many"}', b'{"count": NaN}', b'{"count": 1e999}', b"9" * 9999],
)
def test_a_file_of_the_store_that_is_damaged_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "count.json"
    assert read_kept(path, Counted) is None
    path.write_bytes(content)
    assert read_kept(path, Counted) is None
    write_json(path, {"count": 3})
    assert read_kept(path, Counted) == Counted(count=3)


@pytest.mark.parametrize(("age", "stays"), [(YOUNG, True), (OLD, False)])
def test_without_locks_a_leftover_of_this_boot_goes_by_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, stays: bool
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    leftover = tmp_path / f"{HERE}.partial"
    leftover.mkdir()
    (leftover / "young").write_text("half")
    aged(leftover, OLD)
    os.utime(leftover / "young", (time.time() - age,) * 2)  # the folder's own time says nothing of its files
    monkeypatch.setattr(ownership.fcntl, "flock", refused)
    stage(tmp_path / "expert")
    assert leftover.exists() == stays
    write_file(tmp_path / "plan.json", b"whole")
    assert (tmp_path / "plan.json").read_bytes() == b"whole"


def test_a_folder_that_another_run_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = ownership.fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        seen.extend(tmp_path.glob("*.partial"))
        if len(seen) == 1:
            seen[0].rmdir()
        lock(handle, operation)

    monkeypatch.setattr(ownership.fcntl, "flock", late)
    overwrite(tmp_path / "expert")
    assert len(set(seen)) == 3  # the output is tried once, and made twice
    check_expert(tmp_path, "new")


@FAILS
def test_an_expert_that_a_killed_run_had_moved_aside_comes_back_until_it_is_replaced(
    tmp_path: Path, fails: bool
) -> None:
    """Killed between its two renamings: no expert in its place, the old one under another name."""
    aside = tmp_path / f"{HERE}.replaced" / "expert"
    expert(aside, "old")
    with pytest.raises(CheckpointError, match="--overwrite"), staged_folder(tmp_path / "expert"):
        pass
    check_expert(tmp_path, "old")
    aside.parent.mkdir()
    os.replace(tmp_path / "expert", aside)
    overwrite(tmp_path / "expert", fails)
    check_expert(tmp_path, "old" if fails else "new")


@FAILS
def test_overwriting_replaces_the_whole_expert_or_nothing(tmp_path: Path, fails: bool) -> None:
    out = expert(tmp_path / "expert")
    if not fails:
        (out / "stale").write_text("x")
    overwrite(out, fails)
    check_expert(tmp_path, "old" if fails else "new")


def test_an_old_expert_that_a_killed_run_had_replaced_is_removed(tmp_path: Path) -> None:
    expert(tmp_path / f"{HERE}.replaced" / "expert", "old")
    overwrite(expert(tmp_path / "expert", "newer"))
    check_expert(tmp_path, "new")


@pytest.fixture(params=["with renameat2", "without"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can rename with flags, and one that cannot."""
    if request.param == "without":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    return str(request.param)


@FAILS
def test_an_expert_is_replaced_or_stays_where_the_system_cannot_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    out, new = expert(tmp_path / "expert"), staging.rename_new
    monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    calls = itertools.count(1)

    def failing(source: Path, target: Path) -> None:
        if next(calls) == 2:  # the first finds that the expert is there
            raise KeyboardInterrupt
        new(source, target)

    if fails:
        monkeypatch.setattr(staging, "rename_new", failing)
    overwrite(out)
    check_expert(tmp_path, "old" if fails else "new")


@pytest.mark.parametrize("again", [False, True], ids=["new", "overwrite"])
def test_what_comes_to_the_output_meanwhile_stays_and_the_result_lies_beside_it(
    tmp_path: Path, system: str, again: bool
) -> None:
    out = tmp_path / "expert"
    if again:
        expert(out, "old")

    def write() -> None:
        with staged_folder(out, overwrite=again) as temporary:
            (temporary / "expertprune.json").write_text("new")
            shutil.rmtree(out, ignore_errors=True)
            expert(out, "of another run")
            (out / "thesis.txt").write_text("precious")

    with pytest.raises(CheckpointError, match=r"something else came there .*the result is .*expert-2$"):
        write()
    assert names(tmp_path) == [
        "expert",
        "expert-2",
        "expert-2/expertprune.json",
        "expert/expertprune.json",
        "expert/thesis.txt",
    ]
    assert (out / "expertprune.json").read_text() == "of another run"
    assert (tmp_path / "expert-2" / "expertprune.json").read_text() == "new"


@pytest.mark.parametrize("again", [False, True], ids=["once", "and once more"])
def test_what_comes_while_the_old_one_is_moved_aside_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    out, replace = expert(tmp_path / "expert"), os.replace
    monkeypatch.setattr(renaming, "_renameat2", lambda: None)

    def late(old: Path, place: Path) -> None:
        if old == out:
            shutil.rmtree(out)
            expert(out, "of another run")
        replace(old, place)
        if old == out and again:
            expert(out, "of a third run")

    monkeypatch.setattr(staging.os, "replace", late)
    with pytest.raises(CheckpointError, match="something else came there"):
        overwrite(out)
    found = {path.parent.name: path.read_text() for path in tmp_path.rglob("expertprune.json")}
    first = {"expert": "of a third run", "expert-2": "of another run", "expert-3": "new"}
    assert found == (first if again else {"expert": "of another run", "expert-2": "new"})


def test_where_the_system_can_swap_an_expert_is_at_the_path_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing is moved aside."""
    if renaming._renameat2() is None:
        pytest.skip("this system cannot swap")
    own = staging.own_folder

    def beside(path: Path, kind: str = "partial") -> Any:
        assert kind == "partial"
        return own(path, kind)

    out = expert(tmp_path / "expert")
    monkeypatch.setattr(staging, "own_folder", beside)
    overwrite(out)
    check_expert(tmp_path, "new")


@pytest.mark.parametrize("again", [False, True], ids=["new", "overwrite"])
def test_a_file_that_comes_to_the_output_meanwhile_stays(tmp_path: Path, system: str, again: bool) -> None:
    out = tmp_path / "plan.json"
    if again:
        out.write_text('{"kind": "plan"}')

    def write() -> None:
        with staged_output(out, PLAN, overwrite=again) as temporary:
            temporary.write_text("new")
            (tmp_path / "theirs").write_text("precious")
            os.replace(tmp_path / "theirs", out)

    with pytest.raises(CheckpointError, match=r"the result is .*plan-2.json$"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "plan.json": "precious",
        "plan-2.json": "new",
    }


@pytest.mark.parametrize(
    ("kind", "content"),
    [(PLAN, '{\n  "schema": 2,\n  "kind": "plan"'), (GGUF, "GGUF\x03"), (PICTURE, "<?xml?><svg"),
     (PAGE, '<meta name="generator" content="expertprune report">')],
    ids=lambda each: each.name if isinstance(each, OutputKind) else "",
)  # fmt: skip
def test_overwriting_replaces_files_of_the_same_kind_only(
    tmp_path: Path, system: str, kind: OutputKind, content: str
) -> None:
    out = tmp_path / "out"
    out.write_text("name: a spec")
    for overwrite, words in ((False, f"exists; choose another {kind.option}"), (True, f"is no {kind.name}")):
        with pytest.raises(CheckpointError, match=words):
            check_output(out, overwrite, kind)
    out.write_text(content)
    with staged_output(out, kind, overwrite=True) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["out"]
    assert out.read_text() == "new"


def test_an_output_is_never_what_the_command_reads(tmp_path: Path) -> None:
    base = expert(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    for inputs in ([base], [base / "corpus.jsonl"], [tmp_path / "link" / "corpus.jsonl"]):
        with pytest.raises(CheckpointError, match="the command reads"):
            check_output(base, True, inputs=inputs)
    check_output(base, True, inputs=[tmp_path / "basement", tmp_path])


@pytest.mark.parametrize("name", ["n" * 250, "ä" * 120])
def test_names_as_long_as_the_file_system_allows_are_written(tmp_path: Path, name: str) -> None:
    stage(tmp_path / name)
    write_file(tmp_path / f"{name[:-1]}f", b"x")
    assert names(tmp_path) == sorted([name, f"{name[:-1]}f"])


@pytest.mark.parametrize("out", ["n" * 256, "new/" + "n" * 256, ".", "..", "/"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        check_output(Path(out), False)
    assert names(tmp_path) == []


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
    assert modes == {
        "expert": 0o750,
        "expert/sub": 0o750,
        "expert/weights": 0o640,
        "expert/sub/part": 0o640,
        "profile": 0o640,
    }


@STAGED
def test_everything_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: Any
) -> None:
    events: list[str] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def named(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(f"sync {named(handle)}") or sync(handle))
    monkeypatch.setattr(os, "rename", lambda old, new: events.append(f"rename {new.name}") or rename(old, new))
    with staged(tmp_path / "out") as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("new")
        monkeypatch.setattr(os, "replace", lambda old, new: events.append(f"rename {new.name}") or replace(old, new))
    content = ["sync part", "sync out"] if staged is staged_folder else ["sync out"]
    assert events == [*content, "rename out", f"sync {tmp_path.name}"]


def test_new_folders_above_a_result_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle)
    )
    with staged_folder(tmp_path / "one" / "two" / "out"):
        pass
    for folder in (tmp_path, tmp_path / "one", tmp_path / "one" / "two"):
        assert str(folder) in synced


def test_temporary_folders_of_killed_commands_go_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = tmp_path / f".expertprune.{ownership.machine()}-0123abcd.partial"
    (killed / "folder").mkdir(parents=True)
    with temporary_folder() as folder:
        remove_leftovers(tmp_path)
        assert not killed.exists()
        assert names(tmp_path) == [folder.parent.name, f"{folder.parent.name}/folder"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_expert_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="no expert" if overwrite else "--overwrite") as caught:
        check_output(out, overwrite)
    assert str(out) in str(caught.value)
    with pytest.raises(CheckpointError), staged_folder(out, overwrite):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["thesis", "thesis/chapter.txt"]


def test_an_output_that_is_no_folder_is_refused_and_an_empty_one_is_fine(tmp_path: Path) -> None:
    target = expert(tmp_path / "target")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    before = names(tmp_path)
    for name, again in itertools.product(("file", "link", "dangling"), (False, True)):
        with pytest.raises(CheckpointError, match="not a folder"):
            check_output(tmp_path / name, again)
    assert names(tmp_path) == before
    (tmp_path / "empty").mkdir()
    stage(tmp_path / "empty")


# --- room -----------------------------------------------------------------------------------------------------------


def test_room_is_measured_on_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, folder, free = [], tmp_path / "not" / "yet", 5 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or SimpleNamespace(free=free))
    require_room(folder, free)
    with pytest.raises(CheckpointError, match=rf"{folder}: needs 6 MiB of disk, 5 MiB are free"):
        require_room(folder, 6 * 2**20)
    with pytest.raises(CheckpointError):
        require_room(folder, free + 1)
    assert asked == [tmp_path] * 3
