"""Several engines behind one endpoint, with servers that are not vLLM."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertprune.errors import ServingError, UsageError
from expertprune.serving import deployment
from expertprune.serving.deployment import Deployment, Supervisor, model_names
from expertprune.serving.processes import ProcessTree, free_port
from tests.experts import described
from tests.serving.test_routing import ask

pytestmark = pytest.mark.usefixtures("fake_vllm")


def until(said: list[str], text: str) -> Callable[[], bool]:
    """Whether the last message has a text in it; an error when it does not come in time."""
    deadline = time.monotonic() + 60

    def check() -> bool:
        assert time.monotonic() < deadline
        return text in said[-1]

    return check


@pytest.mark.slow
def test_one_that_is_killed_comes_back_until_it_is_given_up_and_the_others_go_on(
    folders: list[Path], tmp_path: Path, started: list[ProcessTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "_LONGEST_PAUSE", 0.1)
    said: list[str] = []
    served = Deployment(folders, port=free_port(), logs=tmp_path / "logs", report=said.append)
    llama, other = served.servers.values()
    statuses: list[int] = []
    enough = threading.Event()

    def status(model: str) -> int:
        return ask(served.url, {"model": model})[0]

    def keep_asking() -> None:
        while not enough.wait(0.01):
            statuses.append(status("other"))

    with served:
        assert [status(name) for name in served.servers] == [200, 200]
        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            llama.tree.members()[0].kill()
            served.watch(until(said, "is back"))
            assert "llama died (SIGKILL)" in said[-2]
            assert "llama is started again in 0.1 s (1 of 5)" in said[-2]
            assert status("llama") == 200
            monkeypatch.setattr(deployment, "LIMIT", 1)
            llama.tree.command.append("--behaviour=die")
            llama.tree.members()[0].kill()
            served.watch(until(said, "given up"))
            assert "started again 1 times and is given up" in said[-1]
            assert "exit code 3" in said[-1]
            assert status("llama") == 503
        finally:
            enough.set()
            asking.join()
        other.tree.command.append("--behaviour=die")
        other.tree.members()[0].kill()
        with pytest.raises(ServingError, match="nothing is left"):
            served.watch(until(said, "never"))
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert not any(tree.members() for tree in started)
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == [f"llama-{served.port}.log", f"other-{served.port}.log"]


def test_one_that_does_not_start_ends_everything(
    folders: list[Path], tmp_path: Path, started: list[ProcessTree]
) -> None:
    served = Deployment(folders, port=free_port(), logs=tmp_path, report=lambda message: None)
    served.servers["other"].tree.command.append("--behaviour=die")
    with pytest.raises(ServingError, match="no room for the weights"):
        served.__enter__()
    assert len(started) == 2
    assert not any(tree.members() for tree in started)


def test_a_port_that_is_taken_while_engines_start_is_named(
    folders: list[Path], tmp_path: Path, started: list[ProcessTree]
) -> None:
    served = Deployment(folders, port=free_port(), logs=tmp_path, report=lambda message: None)
    with (
        socket.create_server(("127.0.0.1", served.port)),
        pytest.raises(UsageError, match=f"port {served.port} of 127.0.0.1 is not free"),
    ):
        served.__enter__()
    assert len(started) == 2
    assert not any(tree.members() for tree in started)


def test_an_adapter_is_served_beside_one_expert_alone(folders: list[Path], tmp_path: Path) -> None:
    """No request could choose it: the proxy knows the models that the folders name."""
    for given in ("--lora-modules", "--lora_modules=triage=adapters/triage", "--lora-mod"):
        with pytest.raises(UsageError, match=r"--lora.mod"):
            Deployment(folders, port=free_port(), logs=tmp_path, arguments=[given, "triage=x"], report=print)


def test_pauses_double_and_a_steady_run_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, failure, starts, states = [0.0], list[ServingError](), list[float](), list[str]()
    monkeypatch.setattr(deployment.time, "monotonic", lambda: clock[0])
    mortal: Any = SimpleNamespace(
        name="mortal",
        tree=ProcessTree([], tmp_path / "log"),
        start=lambda: starts.append(clock[0]),
        healthy=lambda: True,
        failure=lambda: failure.pop() if failure else None,
    )
    watch = Supervisor(mortal, lambda message: None)

    def step(seconds: float) -> None:
        clock[0] += seconds
        watch.step()
        states.append(watch.state)

    for pause in (1, 2, 4, 8, deployment.STEADY, 1, 2, 4, 8, 16):
        if pause == deployment.STEADY:
            step(pause + 1)
            continue
        failure.append(ServingError("it died"))
        for seconds in (0.0, pause - 0.01, 0.02, 0.0):
            step(seconds)
        assert states[-4:] == ["waits", "waits", "starts", "runs"]
    failure.append(ServingError("it died"))
    step(0.0)
    assert states[-1] == "given up"
    assert len(starts) == 9


def test_experts_that_share_a_name_get_those_of_their_folders(tmp_path: Path, tiny_llama: Path) -> None:
    folders = [Path(shutil.copytree(tiny_llama, tmp_path / name)) for name in ("small", "large", "elsewhere")]
    for folder, name in zip(folders, ("qa", "qa", "law"), strict=True):
        described(folder, name).save()
    assert model_names(folders) == ["small", "large", "law"]
    with pytest.raises(UsageError, match="both be served as 'small'"):
        model_names([folders[0], folders[0]])
