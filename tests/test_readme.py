"""Every command in README, and the snippet in docs/python.md, work as they stand."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, blocks, commands, page

SERVING = [command for command in commands() if command.startswith(("expertprune serve", "curl "))]
EXPERTPRUNE = [command for command in commands() if command.startswith("expertprune ") and command not in SERVING]
SETUP = [command for command in commands() if command.startswith((".venv/bin/", "python3 -m venv"))]
MAKE = [command for command in commands() if command.startswith("make ")]


def test_every_command_belongs_to_a_group_that_is_tested() -> None:
    assert len(EXPERTPRUNE) + len(SETUP) + len(MAKE) + len(SERVING) == len(commands())
    assert [command.split()[1] for command in EXPERTPRUNE] == ["init", "validate", "build", "evaluate", "report"]
    assert len(SERVING) == 2
    assert len(page("README.md").splitlines()) <= 150


def dry_run(*command: str) -> str:
    return subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_targets_exist_and_the_lines_without_make_are_what_make_runs() -> None:
    """`make --always-make --dry-run demo` prints the commands that README gives to those who have no make."""
    for command in MAKE:
        dry_run(*shlex.split(command))
    printed = dry_run("make", "--always-make", "demo")
    printed = printed.replace(" --quiet", "").replace(" --disable-pip-version-check", "")
    for command in SETUP[1:]:
        assert command in printed
    assert any(line.endswith("-m venv .venv") for line in printed.splitlines())
    assert SETUP[0].endswith("-m venv .venv")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, where commands may leave what they write."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("profiles", "corpora"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(store: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "EXPERTPRUNE_STORE": str(store), "PATH": path}


def output_of(command: str, workplace: Path, store: Path) -> str:
    options: dict[str, Any] = {"cwd": workplace, "env": environment(store), "capture_output": True, "text": True}
    done = subprocess.run(command, shell=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_in_their_order(workplace: Path, real_store: Path) -> None:
    for command in EXPERTPRUNE:
        output_of(command, workplace, real_store)
    about = json.loads((workplace / "experts" / "my-expert" / "expertprune.json").read_text())
    kept = about["plan"]["budget"]["ffn"]["kept"]
    assert sum(kept) == 32_256  # of 30 layers of 1536 together, 0.3 less: 504 times 64
    assert list(about["evaluation"]["corpora"]) == ["domain/medical"]
    assert (workplace / "experts" / "my-expert" / "report.html").is_file()


@pytest.mark.slow
def test_the_python_snippet(workplace: Path, real_store: Path) -> None:
    (snippet,) = blocks("python", page("docs/python.md"))
    printed = output_of(shlex.join([sys.executable, "-c", snippet]), workplace, real_store)
    parameters, retention = printed.strip().splitlines()[-2:]
    assert parameters == "114608448"
    assert 0.5 < float(retention) < 1.1


@pytest.mark.slow
@pytest.mark.vllm
def test_the_serving_command_answers_the_curl_line(workplace: Path, real_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if not (workplace / "experts" / "my-expert").is_dir():
        pytest.skip("the commands before it did not run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve, curl = (command.replace("8000", port) for command in SERVING)
    settings = {**environment(real_store), "VLLM_CPU_KVCACHE_SPACE": "1"}
    arguments = [*shlex.split(serve), "--patience", "600", "--", "--enforce-eager", "--max-model-len", "256"]
    arguments[:1] = [sys.executable, "-m", "expertprune.cli"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(arguments, cwd=workplace, env=settings, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        said = [next(server.stdout, "") for _ in range(4)]  # it speaks once the server is healthy, or ends
        assert f"endpoint: http://127.0.0.1:{port}/v1\n" in said, (tmp_path / "log").read_text()
        done = subprocess.run(curl, shell=True, cwd=workplace, capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(done.stdout)["choices"][0]["text"].strip()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130
