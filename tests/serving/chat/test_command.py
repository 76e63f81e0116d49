"""`expertprune chat`: in the terminal, with engines of its own and with endpoints that run; how it ends."""

from __future__ import annotations

import errno
import io
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from expertprune.cli import main
from expertprune.serving.chat import ChatSettings, running
from expertprune.serving.chat.terminal import Speaker, columns, talk
from expertprune.serving.processes import ProcessTree, check_port, free_port
from tests.calling import call
from tests.serving.fake_endpoint import fake_endpoint

pytestmark = pytest.mark.usefixtures("fake_vllm")
Build = tuple[Path, Path]


@pytest.mark.slow
def test_both_engines_answer_in_the_terminal_and_end_with_it(
    tiny_build: Build, tmp_path: Path, started: list[ProcessTree]
) -> None:
    folder, store = tiny_build
    command = ["chat", str(folder), "--terminal", "--in-turn", "--store", str(store), "--log", str(tmp_path)]
    result = CliRunner().invoke(main, command, input="Which organ pumps blood?\n")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for said in ("base: llama (", "expert: tiny (", "this is base", "this is expert"):
        assert said in text
    assert len(started) == 2
    assert not any(tree.members() for tree in started)


@pytest.mark.slow
def test_the_page_is_served_until_a_signal_comes(
    tiny_build: Build, tmp_path: Path, started: list[ProcessTree], interrupted: Callable[..., Result]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    pages = []

    def look(printed: str) -> None:
        assert f"open:    {url}\n" in printed
        with urllib.request.urlopen(url, timeout=30) as answer:
            pages.append(answer.read().decode())
        assert [len(tree.members()) for tree in started] == [1, 1]

    folder, store = tiny_build
    interrupted(signal.SIGTERM, look, "chat", folder, "--store", store, "--port", port, "--log", tmp_path)
    assert "tiny beside its base" in pages[0]
    assert not any(tree.members() for tree in started)
    check_port("127.0.0.1", port)


def test_each_side_keeps_its_own_history_until_it_is_told_to_forget() -> None:
    prompts = ["Which organ?", "And then?", " ", "/new", "Again?"]
    with (
        fake_endpoint(["The heart pumps", "one", "x"], models=("dense",)) as base,
        fake_endpoint(["The heart moves", "refuse", "x"], models=("cut",)) as expert,
    ):
        text = io.StringIO()
        talk(running(base.url, expert.url), prompts, ChatSettings(), Console(file=text, width=100), in_turn=True)
        heard = [[[m["content"] for m in asked["messages"]] for _, asked in each.asked] for each in (base, expert)]
    assert heard[0] == [["Which organ?"], ["Which organ?", "The heart pumps", "And then?"], ["Again?"]]
    assert heard[1] == [["Which organ?"], ["Which organ?", "The heart moves", "And then?"], ["Again?"]]
    for said in ("base: dense", "expert: cut", "too long", "3 tokens"):
        assert said in text.getvalue()


def test_the_first_word_that_differs_is_marked_in_the_columns() -> None:
    with fake_endpoint([]) as fake:
        speakers = [Speaker(side) for side in running(fake.url, fake.url)]
    speakers[0].answer, speakers[1].answer = "The heart pumps blood", "The heart moves blood"
    text = io.StringIO()
    Console(file=text, width=100, force_terminal=True, color_system="standard").print(columns(speakers))
    for word in ("pumps", "moves"):
        assert f"The heart \x1b[7m{word}\x1b[0m blood" in text.getvalue()


def test_mistakes_are_said_before_engines_start(
    tiny_build: Build, started: list[ProcessTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder, store), url, key = tiny_build, "http://127.0.0.1:9/v1", "schlüssel"
    unspeakable = "an API key (--api-key, or the variable VLLM_API_KEY) holds characters"
    with fake_endpoint([]) as fake:
        for variable, arguments, said in (
            ("", [], "name the folder of an expert"),
            ("", ["--expert-url", url], "give both --expert-url and --base-url"),
            ("", ["--expert-url", url, "--base-url", url], "nothing answers there"),
            ("", [folder, "--expert-url", url, "--base-url", url, "--", "--seed", "1"], "that are started here"),
            (
                "",
                ["--expert-url", url, "--base-url", url, "--base", folder],
                "--base is for engines that are started here",
            ),
            (
                "",
                ["--expert-url", url, "--base-url", url, "--log", folder],
                "--log is for engines that are started here",
            ),
            ("", [folder.parent], "is no expert"),
            ("", [folder, folder], "one expert at a time"),
            ("", [folder, "--store", store, "--", "--api-key", key], unspeakable),
            (key, [folder, "--store", store], unspeakable),
            (
                "",
                [folder, "--store", store, "--", "--api-key", ""],
                "a key is empty, with which vLLM lets everybody in",
            ),
            ("", [folder, "--store", store, "--", "--api-key="], "a key is empty"),
            (key, ["--expert-url", fake.url, "--base-url", fake.url], unspeakable),
        ):
            monkeypatch.setenv("VLLM_API_KEY", variable)
            error = call("chat", "--terminal", *arguments, code=2).stderr
            assert said in error, arguments
            assert key not in error
    assert not started


def test_a_port_that_is_not_ours_to_take_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tiny_build: Build) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    error = call("chat", tiny_build[0], "--port", 80, code=2).stderr
    assert "port 80 of 127.0.0.1 is not free (Permission denied); choose another with --port" in error
