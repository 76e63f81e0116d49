"""Several engines behind one endpoint, with servers that are not vLLM."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertprune.errors import ServingError, UsageError
from expertprune.serving import deployment
from expertprune.serving.deployment import Deployment, Supervisor, model_names
from expertprune.serving.processes import ProcessTree, free_port
from tests.experts import described
from tests.serving.test_routing import ask

pytestmark = pytest.mark.usefixtures("fake_vllm")


def until(condition: Callable[[], bool], seconds: float = 60) -> Callable[[], bool]:
    """`condition`, or an error when it does not come true in time."""
    deadline = time.monotonic() + seconds

    def check() -> bool:
        assert time.monotonic() < deadline
        return condition()

    return check


def test_one_that_is_killed_comes_back_and_the_others_go_on(
    tiny_llama: Path, other_tiny: Path, tmp_path: Path, started: list[ProcessTree]
) -> None:
    said: list[str] = []
    served = Deployment([tiny_llama, other_tiny], port=free_port(), logs=tmp_path / "logs", report=said.append)
    answers: list[tuple[int, Any]] = []
    enough = threading.Event()

    def keep_asking() -> None:
        while not enough.is_set():
            answers.append(ask(served.url, {"model": "other"}))

    with served:
        assert [ask(served.url, {"model": name})[0] for name in served.servers] == [200, 200]
        asking = threading.Thread(target=keep_asking)
        asking.start()
        killed = served.servers["llama"]
        assert killed.process is not None
        killed.process.kill()
        try:
            served.watch(until(lambda: any("is back" in message for message in said)))
        finally:
            enough.set()
            asking.join()
        assert ask(served.url, {"model": "llama"})[0] == 200
    assert len(answers) > 10
    assert {status for status, _ in answers} == {200}
    assert "llama died (SIGKILL)" in said[-2]
    assert "llama is started again in 1 s (1 of 5)" in said[-2]
    assert "llama is back after" in said[-1]
    assert not any(tree.members() for tree in started)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        f"llama-{served.port}.log",
        f"other-{served.port}.log",
    ]


def test_one_that_keeps_dying_is_given_up_and_the_others_go_on(
    tiny_llama: Path, other_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "LIMIT", 1)
    said: list[str] = []
    served = Deployment([tiny_llama, other_tiny], port=free_port(), logs=tmp_path, report=said.append)
    dying = served.servers["llama"]
    dying.tree.command.append(f"--behaviour=once={tmp_path / 'was here'}")
    with served:
        assert dying.process is not None
        dying.process.kill()
        served.watch(until(lambda: any("given up" in message for message in said)))
        assert "started again 1 times and is given up" in said[-1]
        assert "exit code 4" in said[-1]
        assert ask(served.url, {"model": "other"})[0] == 200
        assert ask(served.url, {"model": "llama"})[0] == 503
        other = served.servers["other"]
        assert other.process is not None
        other.tree.command.append("--behaviour=die")
        other.process.kill()
        with pytest.raises(ServingError, match="nothing is left"):
            served.watch(until(lambda: False))


def test_one_that_does_not_start_ends_everything(
    tiny_llama: Path, other_tiny: Path, tmp_path: Path, started: list[ProcessTree]
) -> None:
    served = Deployment([tiny_llama, other_tiny], port=free_port(), logs=tmp_path, report=lambda message: None)
    served.servers["other"].tree.command.append("--behaviour=die")
    with pytest.raises(ServingError, match="no room for the weights"):
        served.__enter__()
    assert len(started) == 2
    assert not any(tree.members() for tree in started)


class Mortal:
    """Something supervised whose life the test decides, on a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.name, self.tree, self.dead, self.starts = "mortal", ProcessTree([], folder / "log"), False, 0

    def start(self) -> None:
        self.starts += 1

    def healthy(self) -> bool:
        return True

    def failure(self) -> ServingError | None:
        return ServingError("it died") if self.dead else None


def test_pauses_double_and_a_steady_run_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(deployment.time, "monotonic", lambda: clock[0])
    mortal, said = Mortal(tmp_path), []
    watch = Supervisor(mortal, said.append)

    def die_and_come_back(pause: float) -> None:
        mortal.dead = True
        watch.step()
        mortal.dead = False
        clock[0] += pause - 0.01
        watch.step()
        assert watch.state == "waits"
        clock[0] += 0.02
        watch.step()
        assert watch.state == "starts"
        watch.step()
        assert watch.state == "runs"

    for pause in (1, 2, 4, 8):
        die_and_come_back(pause)
    clock[0] += deployment.STEADY + 1
    watch.step()
    for pause in (1, 2, 4, 8, 16):
        die_and_come_back(pause)
    mortal.dead = True
    watch.step()
    assert watch.state == "given up"
    assert mortal.starts == 9


def test_experts_that_share_a_name_get_those_of_their_folders(tmp_path: Path, tiny_llama: Path) -> None:
    folders = [Path(shutil.copytree(tiny_llama, tmp_path / name)) for name in ("small", "large", "elsewhere")]
    for folder, name in zip(folders, ("qa", "qa", "law"), strict=True):
        described(folder, name).save()
    assert model_names(folders) == ["small", "large", "law"]
    with pytest.raises(UsageError, match="both be served as 'small'"):
        model_names([folders[0], folders[0]])
