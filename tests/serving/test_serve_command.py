"""`expertprune serve`: what it prints, how it ends, and that nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from expertprune.commands.serve import _tell
from expertprune.serving.processes import ProcessTree, check_port, free_port
from expertprune.serving.server import Server
from tests.calling import call

ROOT = Path(__file__).parent.parent.parent
# The command with the fake server in vLLM's place, in a process that can be sent a signal.
COMMAND = """
from expertprune.cli import main
from expertprune.serving import engine
from tests.serving.conftest import CPU, FAKE, ROOMY
engine.COMMAND, engine.platform, engine.free_memory = FAKE, lambda: CPU, lambda: ROOMY
main(prog_name="expertprune")
"""


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_does_not_start_shows_the_end_of_its_log(
    tiny_llama: Path, tmp_path: Path, started: list[ProcessTree]
) -> None:
    port = free_port()
    result = call("serve", tiny_llama, "--port", port, "--log", tmp_path, "--", "--behaviour", "die", code=1)
    assert "ended (exit code 3)" in result.stderr
    assert result.stderr.rstrip().endswith("no room for the weights")
    assert str(tmp_path / f"llama-{port}.log") in result.stderr
    assert result.stdout == ""
    assert not any(tree.members() for tree in started)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("both", [False, True])
def test_a_port_that_is_taken_is_the_users_to_mend(
    tiny_llama: Path, other_tiny: Path, started: list[ProcessTree], both: bool
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = call("serve", tiny_llama, *([other_tiny] if both else []), "--port", port, code=2)
    assert f"error: port {port} of 127.0.0.1 is not free" in result.stderr
    assert started == []


@pytest.mark.usefixtures("fake_vllm")
def test_folders_that_cannot_be_served_are_named(tmp_path: Path, tiny_llama: Path) -> None:
    call("serve", code=2)
    call("serve", "--", "--max-num-seqs", 4, code=2)
    for arguments in ([tmp_path], [tiny_llama, tmp_path]):
        assert f"error: {tmp_path}: is no expert" in call("serve", *arguments, code=2).stderr


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("key", ["sec$ret", None])
def test_the_curl_line_sends_the_key_and_does_not_show_it(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str | None
) -> None:
    arguments = ["--api-key", key] if key else []
    with Server(tiny_llama, arguments=arguments, log=tmp_path / "log") as server:
        _tell(server.url, [server])
        printed = capsys.readouterr().out
        curl = next(line for line in printed.splitlines() if line.startswith("try it:")).partition("curl")[2]
        environment = {**os.environ, "VLLM_API_KEY": key or ""}
        subprocess.run(f"curl --silent {curl}", shell=True, env=environment, capture_output=True, check=True)
    assert "sec$ret" not in printed
    assert f"{f'Bearer {key}' if key else None}\n" in server.log.read_text()


@pytest.mark.parametrize(
    ("sent", "code", "stubborn"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGKILL, -9, True)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_signal_ends_the_whole_tree(
    tiny_llama: Path, other_tiny: Path, tmp_path: Path, sent: signal.Signals, code: int, stubborn: bool
) -> None:
    """One folder whose server ignores SIGTERM, as does a child of it; and two folders behind the proxy."""
    port = free_port()
    folders = [str(tiny_llama)] if stubborn else [str(tiny_llama), str(other_tiny)]
    behaviour = ["--", "--behaviour=stubborn"] if stubborn else []
    options = ["--port", str(port), "--log", str(tmp_path), *behaviour]
    command = [sys.executable, "-c", COMMAND, "serve", *folders, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    printed = ""
    while "stop it" not in printed:
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        printed += line
    assert f"endpoint: http://127.0.0.1:{port}/v1" in printed
    names = "llama" if stubborn else "llama, other"
    assert re.search(rf"^models: +{names}$", printed, re.MULTILINE)
    curl = next(line for line in printed.splitlines() if line.startswith("try it:")).partition("curl")[2]
    tried = subprocess.run(f"curl --silent {curl}", shell=True, capture_output=True, text=True, check=True)
    assert '" said llama"' in tried.stdout

    members = psutil.Process(process.pid).children(recursive=True)
    assert len(members) == (2 if stubborn else 3) + 1  # the guard
    process.send_signal(sent)
    left = psutil.wait_procs(members, timeout=10)[1]
    assert [member for member in left if member.status() != psutil.STATUS_ZOMBIE] == []
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert (f"stopped by {sent.name}" in errors) is (sent != signal.SIGKILL)
    assert "Traceback" not in errors
    check_port("127.0.0.1", port)
