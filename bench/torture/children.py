"""Commands in forked children, disturbed at a chosen moment.

Importing everything takes seconds, so one process does it once and forks a child for each command.
An audit hook counts what a child changes on the disk; at a chosen change, the child is killed, or
told that the disk is full if the change needs room.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

GROWS = {"os.rename", "os.mkdir", "os.link", "shutil.copyfile"}  # what a full disk may refuse, beside writing
CHANGES = GROWS | {"os.rmdir", "os.remove", "os.chmod", "shutil.rmtree"}
GIVEN_UP = (
    120.0  # seconds after which a command counts as hanging; those do not count in which others have the processor
)


_COUNT = struct.Struct("q")


@dataclass(frozen=True)
class Disturbance:
    """What happens to a command.

    Attributes:
        after: seconds after which it is killed.
        change: the number of the change to the disk at which `kind` happens to it, from 1; a full disk is met at the
            first one from there that needs room.
        file_limit: bytes above which no file can grow: the command is killed while it writes one, or told.
    """

    after: float | None = None
    change: int | None = None
    kind: Literal["kill", "full"] = "kill"
    file_limit: int | None = None


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit code (negative: a signal), output, peak memory, and changes to the disk.

    `seconds` are of the clock, `busy` of the processor: other work on the machine does not count.
    """

    code: int
    output: str
    seconds: float
    busy: float
    megabytes: float
    changes: int

    @property
    def clean(self) -> bool:
        """Whether it ended as a command may: well, or with a message for the user."""
        return self.code in (0, 2) and "Traceback" not in self.output


def prepare() -> None:
    """Import what commands need; nothing is computed, so that no thread is lost in the forks."""
    import_rooms()
    warm()
    gc.collect()
    gc.freeze()  # children then copy fewer pages


def import_rooms() -> None:
    """Import what commands need, which takes seconds."""
    rooms = (
        "stages.build",
        "stages.sweep",
        "stages.suites",
        "stages.export",
        "cli",
        "reporting.explain",
        "reporting.page",
    )
    for module in ("sklearn.feature_extraction.text", "gguf", *(f"expertprune.{name}" for name in rooms)):
        importlib.import_module(module)
    transformers = importlib.import_module("transformers")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


def warm() -> None:
    """Read what each command reads anew, and no trial changes: families, and what plugins register."""
    from expertprune.arch import families
    from expertprune.composition.scoring import rules
    from expertprune.pruning.repair import repairs
    from expertprune.relevance.statistics import criteria

    for each in (families(), rules, repairs, criteria):
        len(each)


@dataclass(frozen=True)
class Started:
    """A command that runs, the pipe of its output, and the memory that counts its changes."""

    pid: int
    begun: float
    output: int
    counter: mmap.mmap


def start(arguments: list[str], store: Path, temporary: Path, disturbed: Disturbance | None = None) -> Started:
    """Start a command in a child."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    counter = mmap.mmap(-1, _COUNT.size)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, store, temporary, disturbed or Disturbance(), writing, counter)
    os.close(writing)
    return Started(pid, begun, reading, counter)


def finish(started: Started, kill_after: float | None = None) -> Finished:
    """Wait for a command, kill it where that is wanted, and read what it left."""
    asleep, looked, output = 0.0, started.begun, b""
    while True:
        output += _read(started.output)
        pid, status, used = os.wait4(started.pid, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        asleep, looked = asleep + (now - looked) * (not _ready(started.pid)), now
        if asleep > GIVEN_UP or (kill_after is not None and now - started.begun > kill_after):
            os.kill(started.pid, signal.SIGKILL)
        time.sleep(0.002)
    seconds = time.monotonic() - started.begun
    output += _read(started.output)
    os.close(started.output)
    (changes,) = _COUNT.unpack(started.counter)
    started.counter.close()
    busy = used.ru_utime + used.ru_stime
    text = output.decode(errors="replace")
    return Finished(os.waitstatus_to_exitcode(status), text, seconds, busy, used.ru_maxrss / 1024, changes)


def _read(pipe: int) -> bytes:
    """What a pipe holds now."""
    read = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(pipe, 65536):
            read += more
    return read


def _ready(pid: int) -> bool:
    """Whether a process runs, or could run if it had a processor."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def run(arguments: list[str], store: Path, temporary: Path, disturbed: Disturbance | None = None) -> Finished:
    """A command from its start to its end."""
    started = start(arguments, store, temporary, disturbed)
    return finish(started, disturbed.after if disturbed is not None else None)


def _child(
    arguments: list[str], store: Path, temporary: Path, disturbed: Disturbance, output: int, counter: mmap.mmap
) -> NoReturn:
    code = 70
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that nobody forked
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"EXPERTPRUNE_STORE": str(store), "TMPDIR": str(temporary)}
        tempfile.tempdir = str(temporary)
        if disturbed.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN if disturbed.kind == "full" else signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (disturbed.file_limit,) * 2)
        _watch(counter, disturbed)
        from bench.torture.inputs import entry

        resource.setrlimit(resource.RLIMIT_CPU, (int(GIVEN_UP), int(GIVEN_UP) + 5))
        entry(arguments)(arguments, prog_name="expertprune")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(counter: mmap.mmap, disturbed: Disturbance) -> None:
    """Count changes to the disk, in memory that outlives the child, and disturb the command at the chosen one."""
    from expertprune.files import renaming

    count, due = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, due
        written = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if event not in CHANGES and not written:
            return
        if written and not str(arguments[0]).startswith("/tmp"):
            return  # devices, pipes
        count += 1
        _COUNT.pack_into(counter, 0, count)
        due = due or count == disturbed.change
        if due and disturbed.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and (written or event in GROWS):
            due = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def renamed(old: Path, new: Path, flag: int) -> bool:  # renameat2(2) passes by Python's audit
        sys.audit("os.rename", str(old), str(new), -1, -1)
        done = rename(old, new, flag)
        sys.audit("os.rename", str(old), str(new), -1, -1)
        return done

    rename, renaming._rename = renaming._rename, renamed
    sys.addaudithook(hook)
