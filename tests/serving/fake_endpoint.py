"""A stand-in for an OpenAI-compatible endpoint in this process: it says its words one by one, and notes what it is asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeEndpoint(ThreadingHTTPServer):
    """Answers the n-th conversation with the n-th of its texts, a word an event.

    Attributes:
        chats: whether it has a chat template; without one it refuses messages as vLLM does.
        asked: paths and bodies of the requests for streams.
        go_on: answers stop before their last word until it is set.
        last_event: behind the last word of each answer; default: its usage.
    """

    daemon_threads = True

    def __init__(
        self, texts: list[str], models: tuple[str, ...] = ("model",), chats: bool = True, key: str = ""
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.texts, self.models, self.chats, self.key = texts, models, chats, key
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.last_event: Any = ...
        self.go_on = threading.Event()
        self.go_on.set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint

    def log_message(self, form: str, *values: Any) -> None:
        pass

    def answer(self, data: Any, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def refused(self) -> bool:
        wanted = f"Bearer {self.server.key}" if self.server.key else None
        if self.headers.get("Authorization") != wanted:
            self.answer({"error": "Unauthorized"}, 401)
            return True
        return False

    def do_GET(self) -> None:
        if not self.refused():
            self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        if self.refused():
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions" and not self.server.chats:
            self.answer({"error": {"message": "no chat template", "code": 400}}, 400)
        elif request.get("stream"):
            self.server.asked.append((self.path, request))
            self.stream(self.server.texts[len(self.server.asked) - 1])
        else:
            self.answer({"choices": [{"message": {"content": "x"}}]})

    def stream(self, text: str) -> None:
        if text == "refuse":
            self.answer({"error": {"message": "too long", "code": 400}}, 400)
            return
        self.send_response(200)
        self.end_headers()
        words = text.split(" ")
        for number, word in enumerate(words):
            if number == len(words) - 1:
                self.server.go_on.wait(30)
            piece = word if number == 0 else f" {word}"
            self.event({"choices": [{"delta": {"content": piece}} if self.server.chats else {"text": piece}]})
        usage = {"choices": [], "usage": {"completion_tokens": len(words)}}
        self.event(usage if self.server.last_event is ... else self.server.last_event)
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


@contextlib.contextmanager
def fake_endpoint(texts: list[str], **about: Any) -> Iterator[FakeEndpoint]:
    """A running endpoint."""
    with FakeEndpoint(texts, **about) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        yield endpoint
        endpoint.shutdown()
