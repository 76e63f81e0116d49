"""Servers that are not vLLM, in its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expertprune.serving import engine
from expertprune.serving.processes import ProcessTree
from tests.tiny import save_tiny

FAKE = (sys.executable, str(Path(__file__).parent / "fake_server.py"))
CPU = engine.Platform(cpu=True, memory=64 * 2**30)
ROOMY = 32 * 2**30  # bytes that are free, whatever this machine has


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is there, runs on a CPU with room enough, and its server is the fake one."""
    monkeypatch.setattr(engine, "COMMAND", FAKE)
    monkeypatch.setattr(engine, "platform", lambda: CPU)
    monkeypatch.setattr(engine, "free_memory", lambda: ROOMY)


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
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second tiny checkpoint, whose folder is named `other`."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "other", "llama", seed=1)
