"""`expertprune chat`: in the terminal, with engines of its own and with endpoints that run; how it ends."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from expertprune.cli import main
from expertprune.serving.chat import ChatSettings, running
from expertprune.serving.chat.terminal import Speaker, columns, talk
from expertprune.serving.processes import ProcessTree, check_port, free_port
from tests.calling import call
from tests.serving.fake_endpoint import fake_endpoint
from tests.serving.test_serve_command import COMMAND, ROOT

Build = tuple[Path, Path]


@pytest.mark.usefixtures("fake_vllm")
def test_both_engines_answer_in_the_terminal_and_end_with_it(
    tiny_build: Build, tmp_path: Path, started: list[ProcessTree]
) -> None:
    folder, store = tiny_build
    command = ["chat", str(folder), "--terminal", "--in-turn", "--store", str(store), "--log", str(tmp_path)]
    result = CliRunner().invoke(main, command, input="Which organ pumps blood?\n")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "base: llama (" in text
    assert "expert: tiny (" in text
    for role in ("base", "expert"):  # the fake server says these three pieces
        assert f"{role} 0{role} 1{role} 2" in text
    assert len(started) == 2
    assert not any(tree.members() for tree in started)


@pytest.mark.usefixtures("fake_vllm")
def test_the_page_is_served_until_a_signal_comes(tiny_build: Build, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", COMMAND, "chat", str(tiny_build[0]), "--port", str(port), "--log", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EXPERTPRUNE_STORE": str(tiny_build[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"open:    http://127.0.0.1:{port}/\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert "tiny beside its base" in answer.read().decode()
        members = psutil.Process(process.pid).children(recursive=True)
        assert len(members) == 2 + 1  # the guard
        process.send_signal(signal.SIGTERM)
        left = psutil.wait_procs(members, timeout=10)[1]
        assert [member for member in left if member.status() != psutil.STATUS_ZOMBIE] == []
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        check_port("127.0.0.1", port)
    finally:
        process.kill()
        process.communicate()


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
    shown = text.getvalue()
    assert "base: dense" in shown
    assert "expert: cut" in shown
    assert "too long" in shown
    assert "3 tokens" in shown


def test_the_first_word_that_differs_is_marked_in_the_columns() -> None:
    with fake_endpoint([]) as fake:
        speakers = [Speaker(side) for side in running(fake.url, fake.url)]
    speakers[0].answer, speakers[1].answer = "The heart pumps blood", "The heart moves blood"
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(columns(speakers))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "The heart \x1b[7mpumps\x1b[0m blood" in shown
    assert "The heart \x1b[7mmoves\x1b[0m blood" in shown


@pytest.mark.usefixtures("fake_vllm")
def test_a_key_that_no_request_can_carry_is_refused_before_engines_start(
    tiny_build: Build, started: list[ProcessTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tiny_build
    given = [folder, "--terminal", "--store", store, "--", "--api-key", "schlüssel"]
    assert "an API key (--api-key" in call("chat", *given, code=2).stderr
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    with fake_endpoint([]) as fake:
        for arguments in ([folder, "--store", store], ["--expert-url", fake.url, "--base-url", fake.url]):
            error = call("chat", "--terminal", *arguments, code=2).stderr
            assert "an API key (--api-key, or the variable VLLM_API_KEY) holds characters" in error
            assert "schlüssel" not in error
    assert not started


def test_a_port_that_is_not_ours_to_take_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tiny_build: Build) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    error = call("chat", tiny_build[0], "--port", 80, code=2).stderr
    assert "port 80 of 127.0.0.1 is not free (Permission denied); choose another with --port" in error


def test_what_is_missing_or_too_much_is_said(tiny_build: Build) -> None:
    folder, url = tiny_build[0], "http://127.0.0.1:9/v1"
    call("chat", code=2)
    for arguments, said in (
        (["--expert-url", url], "give both --expert-url and --base-url"),
        (["--expert-url", url, "--base-url", url], "nothing answers there"),
        ([folder, "--expert-url", url, "--base-url", url, "--", "--seed", "1"], "for engines that are started here"),
        ([folder.parent], "is no expert"),
        ([folder, folder], "one expert at a time"),
    ):
        assert said in call("chat", *arguments, code=2).stderr, arguments
