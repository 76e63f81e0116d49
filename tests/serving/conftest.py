"""Servers that are not vLLM, in its place."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from expertprune.commands import chat, serve
from expertprune.serving import engine
from expertprune.serving.processes import ProcessTree
from tests.calling import call
from tests.tiny import save_tiny

FAKE = (sys.executable, str(Path(__file__).parent / "fake_endpoint.py"))
CPU = engine.Platform(cpu=True, memory=64 * 2**30)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is there, runs on a CPU with room enough, and its server is the fake one."""
    monkeypatch.setattr(engine, "COMMAND", FAKE)
    monkeypatch.setattr(engine, "platform", lambda: CPU)
    monkeypatch.setattr(engine, "free_memory", lambda: 32 * 2**30)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ProcessTree]:
    """Every process tree that the test starts, in order."""
    trees: list[ProcessTree] = []
    start = ProcessTree.start

    def noted(tree: ProcessTree) -> None:
        if tree not in trees:
            trees.append(tree)
        start(tree)

    monkeypatch.setattr(ProcessTree, "start", noted)
    return trees


@pytest.fixture(scope="session")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny checkpoints, in folders named `llama` and `other`."""
    return [tiny_llama, save_tiny(tmp_path_factory.mktemp("tiny") / "other", "llama", seed=1)]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Calls a command that serves until a signal comes, and sends the signal.

    As soon as the command has said how to stop it, `meanwhile` runs beside it, and gets what it has printed.
    """
    said: list[str] = []
    serves = threading.Event()
    say = serve.say

    def noted(message: str, **about: Any) -> None:
        say(message, **about)
        said.append(message)
        if message.startswith("stop it"):
            serves.set()

    for command in (serve, chat):
        monkeypatch.setattr(command, "say", noted)

    def run(sent: signal.Signals, meanwhile: Callable[[str], None], *arguments: Any) -> Result:
        def interrupt() -> None:
            assert serves.wait(120)
            try:
                meanwhile("\n".join(said))
            finally:
                os.kill(os.getpid(), sent)

        with ThreadPoolExecutor() as pool:
            watching = pool.submit(interrupt)
            result = call(*arguments, code=128 + sent)
            watching.result()
        return result

    return run
