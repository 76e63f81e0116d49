"""The life of a server process, and `expertprune serve`, with servers that are not vLLM."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from expertprune.errors import ServingError
from expertprune.serving import processes
from expertprune.serving.engine import check_folder
from expertprune.serving.processes import ProcessTree, check_port, free_port
from expertprune.serving.server import Server, log_file, trial
from tests.calling import call

pytestmark = pytest.mark.usefixtures("fake_vllm")


def test_inside_the_block_it_answers_and_after_it_nothing_runs(
    tiny_llama: Path, started: list[ProcessTree], tmp_path: Path
) -> None:
    arguments = ["--api-key", "secret"]
    with Server(tiny_llama, arguments=arguments, log=tmp_path / "logs" / "log", model_name="mine") as server:
        assert server.url == f"http://127.0.0.1:{server.port}/v1"
        assert server.complete("Is it well?") == " said mine"
        assert server.load_seconds
        assert server.failure() is None
    assert not any(tree.members() for tree in started)
    check_port("127.0.0.1", server.port)
    assert "POST /v1/completions HTTP/1.1 200 - Bearer secret" in server.log.read_text().replace('"', "")


def test_a_model_with_a_chat_template_is_asked_in_a_conversation(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with Server(folder) as server:
        assert server.complete() == "chatty heard What does the heart do?"
        assert server.complete("Is it well?") == "chatty heard Is it well?"
        assert server.log.exists()
    assert not server.log.exists(), "a log of its own stays only where something failed"
    for said in ({"content": None, "reasoning": "Well"}, {"content": "Well", "reasoning": "It"}):
        monkeypatch.setattr(server, "_ask", lambda *_, said=said: {"choices": [{"message": said}]})
        assert server.complete() == "Well"
    asked = {"model": "llama", "max_tokens": 16, "prompt": "The heart pumps"}
    assert trial(check_folder(tiny_llama), "llama", 16) == ("completions", asked)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("die", r"(?s)ended \(exit code 3\).*  no room for the weights$"),
        ("never", "not healthy after 1 s"),
        ("mute", "does not answer a prompt .*500"),
        ("answer", r"died \(SIGKILL\)"),
    ],
)
def test_one_that_fails_is_reported_and_its_log_stays(
    tiny_llama: Path, started: list[ProcessTree], behaviour: str, message: str
) -> None:
    def serve() -> None:
        with server:
            if behaviour == "mute":
                server.complete()
            started[0].members()[0].kill()
            while (failure := server.failure()) is None:
                time.sleep(0.05)
            raise failure

    server = Server(tiny_llama, arguments=[f"--behaviour={behaviour}"], patience=1 if behaviour == "never" else 60)
    with pytest.raises(ServingError, match=message):
        serve()
    assert not any(tree.members() for tree in started)
    server.log.unlink()


def test_every_name_has_a_log_file_of_its_own(tmp_path: Path) -> None:
    long = "medical questions and answers in the language of the patients"
    names = [long + "-de", long + "-fr", "medical qa", "medical/qa", "\udcff", "medical-qa"]
    files = [log_file(tmp_path, name, 8000) for name in names]
    assert len(set(files)) == len(names)
    assert files[-1] == tmp_path / "medical-qa-8000.log"
    assert all(file.parent == tmp_path and len(file.name) < 90 for file in files)


def test_a_log_begins_anew_and_goes_on_after_a_restart(tiny_llama: Path, tmp_path: Path, store: Path) -> None:
    """What is there stays, but for an earlier log in the store."""
    for folder, stays in ((tmp_path, True), (store / "logs", False)):
        folder.mkdir(exist_ok=True)
        (folder / "llama.log").write_text("of yesterday")
        server = Server(tiny_llama, log=folder / "llama.log")
        assert server.log.name == ("llama-2.log" if stays else "llama.log")
        assert (folder / "llama.log").exists() == stays
    with server:
        server.stop()
        server.start()
        server.wait()
    assert server.log.read_text().count("the fake server of llama starts") == 2
    assert "of yesterday" not in server.log.read_text()


def test_mistakes_of_the_command_are_said_before_anything_starts(
    tmp_path: Path, folders: list[Path], started: list[ProcessTree]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = f"error: port {port} of 127.0.0.1 is not free"
        for arguments, said in (
            ([], "name at least one folder"),
            (["--", "--max-num-seqs", 4], "name at least one folder"),
            ([tmp_path], f"error: {tmp_path}: is no expert"),
            ([folders[0], tmp_path], f"error: {tmp_path}: is no expert"),
            ([folders[0], "--port", port], taken),
            ([*folders, "--port", port], taken),
        ):
            assert said in call("serve", *arguments, code=2).stderr, arguments
    assert started == []


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "several"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_the_command_says_how_it_is_asked_and_a_signal_ends_the_whole_tree(
    folders: list[Path],
    tmp_path: Path,
    started: list[ProcessTree],
    interrupted: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals,
    several: bool,
) -> None:
    """One folder whose server asks for a key and ignores SIGTERM, as does a child of it; and two behind the proxy."""
    monkeypatch.setattr(processes, "GRACE", 1.0)
    port, served = free_port(), folders if several else folders[:1]
    ran = []

    def ask(printed: str) -> None:
        curl = next(line for line in printed.splitlines() if line.startswith("try it:")).partition("curl")[2]
        environment = {"VLLM_API_KEY": "sec$ret"}
        tried = subprocess.run(
            f"curl --silent {curl}", shell=True, env=environment, capture_output=True, text=True, check=True
        )
        assert '" said llama"' in tried.stdout
        ran.extend(member for tree in started for member in tree.members())

    behaviour = [] if several else ["--", "--behaviour=stubborn", "--api-key", "sec$ret"]
    result = interrupted(sent, ask, "serve", *served, "--port", port, "--log", tmp_path, *behaviour)
    assert f"endpoint: http://127.0.0.1:{port}/v1" in result.stdout
    assert re.search(rf"^models: +{'llama, other' if several else 'llama'}$", result.stdout, re.MULTILINE)
    assert "sec$ret" not in result.output
    assert f"stopped by {sent.name}" in result.stderr
    log = (tmp_path / f"llama-{port}.log").read_text()
    assert f"POST /v1/completions HTTP/1.1 200 - {None if several else 'Bearer sec$ret'}" in log.replace('"', "")
    assert len(ran) == (3 if several else 2)
    assert not any(member.is_running() for member in ran)
    check_port("127.0.0.1", port)
