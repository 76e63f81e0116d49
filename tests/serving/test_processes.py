"""Processes that end as a whole, whatever they do against it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

import psutil
import pytest

from expertprune.errors import CheckpointError, UsageError
from expertprune.serving import guard, processes
from expertprune.serving.processes import (
    ProcessTree,
    check_port,
    client_address,
    ending,
    free_ports,
    reach_directly,
    stop_all,
)

# A leader that ignores SIGTERM, as does its child, in a process group of its own; it says when both are ready.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import os, signal, time; os.setpgrp(); signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"
subprocess.Popen([sys.executable, "-c", child + "; time.sleep(600)"])
time.sleep(600)
"""
WILLING = "import time; print('ready', flush=True); time.sleep(600)"


def started(folder: Path, code: str, name: str = "log") -> ProcessTree:
    tree = ProcessTree([sys.executable, "-c", code], folder / name)
    tree.start()
    return tree


def wait_for(text: str, tree: ProcessTree) -> None:
    deadline = time.monotonic() + 60
    while text not in tree.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_what_ignores_the_request_to_end_is_killed_with_its_descendants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tree whose leader is asked, one whose leader was killed before, and one that ends as it is asked."""
    monkeypatch.setattr(processes, "GRACE", 1.0)
    trees = [started(tmp_path, code, name) for name, code in (("a", STUBBORN), ("b", STUBBORN), ("c", WILLING))]
    for tree in trees:
        wait_for("ready", tree)
    members = [member for tree in trees for member in tree.members()]
    assert len(members) == 5
    orphaned = trees[1]
    assert orphaned.process is not None
    orphaned.process.kill()
    orphaned.process.wait()
    assert len(orphaned.members()) == 1
    stop_all(trees)
    assert psutil.wait_procs(members, timeout=1)[1] == []
    assert [tree.code for tree in trees] == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGTERM]
    orphaned.stop()  # twice is no error
    assert (ending(3), ending(-9)) == ("exit code 3", "SIGKILL")


@pytest.mark.parametrize("temporary", ["t", "t" * 90])
def test_sockets_of_an_engine_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str) -> None:
    """vLLM makes sockets named by UUIDs where this variable says, and removes none."""
    place = Path(tempfile.mkdtemp()) / temporary
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    tree = started(tmp_path, "import os; print(os.environ.get('VLLM_RPC_BASE_PATH'), end=' '); " + WILLING)
    wait_for("ready", tree)
    said = tree.log.read_text().split()[0]
    assert (said == "None") is (len(temporary) > 80)  # a socket's path has at most 107 bytes
    if said != "None":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"{said}/{uuid.uuid4()}")
        assert Path(said).is_relative_to(place)
    tree.stop()
    assert list(place.iterdir()) == []


def test_logs(tmp_path: Path) -> None:
    tree = ProcessTree([], tmp_path / "log")
    assert "no log" in tree.tail()
    tree.log.write_text("\n".join(f"line {number}" for number in range(30_000)))
    shown = tree.tail().splitlines()
    assert shown == [f"  line {number}" for number in range(29_980, 30_000)]
    with pytest.raises(CheckpointError, match="cannot be written"):
        ProcessTree([sys.executable], tree.log / "log").start()


def test_what_cannot_be_listened_on_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host, number, said in (
            ("127.0.0.1", port, f"port {port} .*--port"),
            ("192.0.2.1", 8000, r"192\.0\.2\.1"),  # kept for documentation, so never ours
            ("no such host", 8000, "is no address of this machine"),
            (".local", 8000, "is no address of this machine"),
        ):
            with pytest.raises(UsageError, match=said):
                check_port(host, number)
    check_port("127.0.0.1", port)


def test_free_ports_differ_and_no_outgoing_connection_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=300))
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(200)]
        assert max(ports) < min(client.getsockname()[1] for client in clients)
    monkeypatch.setattr(processes, "_outgoing_ports", lambda: range(1024, 65_536))  # none is left below
    assert len(set(free_ports(3))) == 3


def test_where_a_client_finds_a_server() -> None:
    hosts = ("127.0.0.1", "0.0.0.0", "::", "::1", "10.0.0.7")
    assert [client_address(host) for host in hosts] == ["127.0.0.1", "127.0.0.1", "[::1]", "[::1]", "10.0.0.7"]


# A parent that starts a stubborn tree and a child that leaves its session, and says their process ids. Its guard kills
# sooner than others.
PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from expertprune.serving import guard
from expertprune.serving.processes import ProcessTree
impatient = Path(sys.argv[1], "guard.py")
impatient.write_text(Path(guard.__file__).read_text().replace("GRACE = 4.0", "GRACE = 0.5"))
guard.__file__ = str(impatient)
fled = "import os, time; os.setsid() if os.fork() == 0 else os._exit(0); print(os.getpid(), flush=True); time.sleep(600)"
code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', %r])" % fled
trees = [ProcessTree([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1], "stubborn"))]
trees += [ProcessTree([sys.executable, "-c", code + "; import time; time.sleep(600)"], Path(sys.argv[1], "fled"))]
for tree in trees:
    tree.start()
while not all(tree.log.read_text() for tree in trees):
    time.sleep(0.05)
print(*(member.pid for tree in trees for member in tree.members()), trees[1].log.read_text(), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_parent_that_is_killed_takes_all_with_it(tmp_path: Path) -> None:
    """Even what ignores SIGTERM, and what has left its session and lost its own parent."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path, STUBBORN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    members = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(members) >= 4
    parent.kill()
    parent.wait()
    left = psutil.wait_procs(members, timeout=30)[1]
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


# As setproctitle does for vLLM's engines: zeros over the first variables of the environment.
RENAMED = """
import ctypes, time
first = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")[0]
ctypes.memset(first, 0, len(ctypes.string_at(first)))
print("ready", flush=True)
time.sleep(600)
"""


def test_the_guard_finds_a_process_whose_environment_begins_with_zeros() -> None:
    token = uuid.uuid4().hex
    environment = {"FIRST": "1", **os.environ, guard.VARIABLE: token}
    with subprocess.Popen([sys.executable, "-c", RENAMED], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready, found = process.stdout.readline(), [each.pid for each in guard.marked(token)]
        guard.end_all(token)
        try:
            process.wait(timeout=5)
        finally:
            process.kill()  # if it was not found
    assert (ready, found, process.returncode) == (b"ready\n", [process.pid], -signal.SIGTERM)


def test_no_proxy_stands_between_a_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    reach_directly("10.0.0.1")
    reach_directly("127.0.0.1")
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1,10.0.0.1"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert urllib.request.proxy_bypass("127.0.0.1")
