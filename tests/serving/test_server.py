"""The life of a server process, with servers that are not vLLM."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from expertprune.errors import ServingError
from expertprune.serving.engine import check_folder
from expertprune.serving.processes import ProcessTree, check_port
from expertprune.serving.server import Server, log_file, trial

pytestmark = pytest.mark.usefixtures("fake_vllm")


def nothing_runs(trees: list[ProcessTree]) -> bool:
    return bool(trees) and not any(tree.alive or tree.members() for tree in trees)


def test_inside_the_block_it_answers_and_after_it_nothing_runs(
    tiny_llama: Path, started: list[ProcessTree], tmp_path: Path
) -> None:
    with Server(tiny_llama, log=tmp_path / "logs" / "log", model_name="mine") as server:
        assert server.url == f"http://127.0.0.1:{server.port}/v1"
        assert server.complete("Is it well?") == " said mine"
        assert server.load_seconds is not None
        assert server.load_seconds > 0
        assert server.process is not None
        assert server.process.poll() is None
        assert server.failure() is None
    assert nothing_runs(started)
    check_port("127.0.0.1", server.port)
    assert "POST /v1/completions" in server.log.read_text()


def test_a_model_with_a_chat_template_is_asked_in_a_conversation(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with Server(folder) as server:
        assert server.complete() == "chatty heard What does the heart do?"
        assert server.complete("Is it well?") == "chatty heard Is it well?"
        path, request = trial(server.servable, server.name, 16)
    assert path == "chat/completions"
    assert request["messages"] == [{"role": "user", "content": "What does the heart do?"}]
    assert trial(check_folder(tiny_llama), "llama", 16) == (
        "completions", {"model": "llama", "max_tokens": 16, "prompt": "The heart pumps"},
    )  # fmt: skip


def test_one_that_dies_is_reported_with_the_end_of_its_log(tiny_llama: Path, started: list[ProcessTree]) -> None:
    server = Server(tiny_llama, arguments=["--behaviour=die"])
    with pytest.raises(ServingError, match="ended \\(exit code 3\\)") as raised:
        server.__enter__()
    assert str(raised.value).endswith("  no room for the weights")
    assert raised.value.exit_code == 1
    assert nothing_runs(started)
    assert server.log.exists(), "a log of its own stays only where something failed"
    server.log.unlink()


def test_one_that_never_gets_healthy_is_given_up(tiny_llama: Path, started: list[ProcessTree]) -> None:
    with pytest.raises(ServingError, match="not healthy after 1 s"):
        Server(tiny_llama, arguments=["--behaviour=never"], patience=1).__enter__()
    assert nothing_runs(started)


def test_one_that_is_healthy_but_does_not_answer_is_reported(tiny_llama: Path) -> None:
    with Server(tiny_llama, arguments=["--behaviour=mute"]) as server, pytest.raises(ServingError, match="500"):
        server.complete()
    server.log.unlink()


def test_a_log_of_its_own_goes_where_nothing_failed(tiny_llama: Path) -> None:
    with Server(tiny_llama) as server:
        assert server.log.exists()
    assert not server.log.exists()


def test_one_that_dies_later_says_how(tiny_llama: Path) -> None:
    with Server(tiny_llama) as server:
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        failure = server.failure()
        assert failure is not None
        assert "died (SIGKILL)" in str(failure)
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{server.root}/health", timeout=5)
    server.log.unlink()


def test_a_key_that_vllm_asks_for_is_sent(tiny_llama: Path, tmp_path: Path) -> None:
    with Server(tiny_llama, arguments=["--api-key", "secret"], log=tmp_path / "log") as server:
        assert server.complete() == " said llama"
    assert "Bearer secret" in server.log.read_text()


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
