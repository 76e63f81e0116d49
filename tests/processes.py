"""Commands in processes of their own, to be interrupted or to run out of disk.

Importing everything takes seconds, so one server process does it once and forks a child for each command. A child can be
held at a named place, where it waits for a signal.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HOLD_AT_MOST = 60  # seconds after which a child that got no signal gives up


@dataclass(frozen=True)
class Finished:
    """Exit code (negative: the signal that ended it) and output of a command; seconds since a signal was sent."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0


class Server:
    """The test's side: starts the server, and asks it for one command after the other."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hub"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            cwd=Path(__file__).parent.parent, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def run(
        self,
        *arguments: Any,
        hold: str | None = None,
        send: signal.Signals | None = None,
        file_limit: int | None = None,
        packages: Path | None = None,
    ) -> Finished:
        """Run a command.

        Args:
            hold: a place of `PLACES` where the command waits.
            send: the signal that it gets there.
            file_limit: bytes above which no file can grow, as on a full disk.
            packages: a folder of distributions that the command finds installed beside all others.
        """
        path = [] if packages is None else [str(packages)]
        (finished,) = self._run(arguments, [{"hold": hold, "path": path}], send, file_limit)
        return finished

    def team(
        self,
        *members: Sequence[Any],
        held: int | None = None,
        hold: str | None = None,
        send: signal.Signals | None = None,
    ) -> list[Finished]:
        """Run commands side by side, as `torchrun` would start the members of a team.

        Args:
            members: the arguments of each command.
            held: the rank that gets the signal at the place `hold`.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(len(members)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(members))]
        return self._beside(members, places, held, hold, send)

    def beside(
        self, *commands: Sequence[Any], held: int, hold: str, send: signal.Signals = signal.SIGKILL
    ) -> list[Finished]:
        """Run commands side by side, each for itself; the one numbered `held` gets the signal at the place `hold`.

        The others begin when it is there, and cannot do first what it is to be held in.
        """
        there = self.folder / "there"
        there.unlink(missing_ok=True)
        return self._beside(commands, [{}] * len(commands), held, hold, send, str(there))

    def _beside(
        self,
        commands: Sequence[Sequence[Any]],
        environments: Sequence[dict[str, str]],
        held: int | None,
        hold: str | None,
        send: signal.Signals | None,
        there: str | None = None,
    ) -> list[Finished]:
        given: list[dict[str, Any]] = [
            {
                "arguments": [str(each) for each in arguments],
                "environment": environment,
                "hold": hold if number == held else None,
                "path": [],
                "there": there,
            }
            for number, (arguments, environment) in enumerate(zip(commands, environments, strict=True))
        ]
        return self._run((), given, send, None)

    def _run(
        self,
        arguments: Sequence[Any],
        members: list[dict[str, Any]],
        send: signal.Signals | None,
        file_limit: int | None,
    ) -> list[Finished]:
        for number, member in enumerate(members):
            member["output"] = [str(self.folder / f"{name}-{number}") for name in ("stdout", "stderr")]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "store": os.environ.get("EXPERTPRUNE_STORE", ""),
            "environment": {},
            "file_limit": file_limit,
            "members": members,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        told: dict[str, Any] = {}
        sent = time.monotonic()
        while "codes" not in told:
            line = self._process.stdout.readline()
            assert line, "the server is gone"
            told |= json.loads(line)
            if send is not None and "held" in told:
                os.kill(told["pid"], send)
                send, sent = None, time.monotonic()
        seconds = time.monotonic() - sent
        texts = [[Path(path).read_text(encoding="utf-8") for path in member["output"]] for member in members]
        assert "held" in told or not any(member["hold"] for member in members), f"never came to its place: {texts}"
        return [Finished(code, *text, seconds) for code, text in zip(told["codes"], texts, strict=True)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@functools.cache
def server() -> Server:
    """The one server of this test run; the first call starts it and does not wait for it."""
    return Server()


# --- the server's side ----------------------------------------------------------------------------------------------

# Where a child can be held: module, name of a function in it, and after which call of it.
PLACES = {
    "first profile": ("expertprune.artifacts.profile", "save_file", 1),
    "profile": ("expertprune.artifacts.profile", "save_file", 2),  # the second profile is not yet in its place
    "repair": ("expertprune.pruning.solve", "least_squares", 2),  # in the second layer
    "prune": ("expertprune.models.shards", "written_file", 2),  # one shard is written, the next begun
    "evaluate": ("expertprune.evaluation.measure", "compare", 1),  # the expert is whole but for its evaluation
}


def serve() -> None:
    """Read requests from standard input, and answer each with perhaps a line `held`, and the line `codes`."""
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for member in request["members"]:
            pids.append(os.fork())
            if pids[-1] == 0:
                child({**request, **member})
        say(1, {"codes": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]})


def prepare() -> None:
    """Import what a command needs; nothing is computed, so that no thread is lost in the fork."""
    rooms = ("stages.build", "stages.sweep", "cli", "reporting.explain")
    for module in ("sklearn.feature_extraction.text", *(f"expertprune.{name}" for name in rooms)):
        importlib.import_module(module)
    transformers = importlib.import_module("transformers")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


def say(descriptor: int, message: dict[str, Any]) -> None:
    os.write(descriptor, (json.dumps(message) + "\n").encode())


def child(request: dict[str, Any]) -> NoReturn:
    code = 70
    # Where the suite itself runs in the background, its children inherit that interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        protocol = os.dup(1)
        for descriptor, path in zip((1, 2), request["output"], strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ.update(request["environment"], EXPERTPRUNE_STORE=request["store"])
        sys.path[:0] = request["path"]
        there = Path(request["there"]) if request.get("there") else None
        if request["hold"]:
            hold_after(*PLACES[request["hold"]], protocol, there)
        elif there is not None:
            until = time.monotonic() + HOLD_AT_MOST
            while not there.exists() and time.monotonic() < until:
                time.sleep(0.02)
        if request["file_limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        from expertprune.cli import main

        main(request["arguments"], prog_name="expertprune")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hold_after(module: str, name: str, calls: int, protocol: int, there: Path | None) -> None:
    """Let a function run so many times, make the file `there`, and then wait for a signal before it returns."""
    original: Callable[..., Any] = getattr(importlib.import_module(module), name)
    counted = iter(range(1, 10**6))

    def held(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(counted) == calls:
            if there is not None:
                there.touch()
            say(protocol, {"held": name, "pid": os.getpid()})
            until = time.monotonic() + HOLD_AT_MOST
            while time.monotonic() < until:
                select.select([], [], [], 0.05)
            os._exit(71)
        return result

    setattr(sys.modules[module], name, held)


if __name__ == "__main__":
    serve()
