"""A stand-in for an OpenAI-compatible endpoint: in this process, or run as a file in the place of vLLM's server.

As a file it takes the same arguments as vLLM, and misbehaves on request. `--behaviour` is one of: `answer` (healthy at
once), `never` (runs, is never healthy), `die` (says why and exits with 3), `stubborn` (answers, starts a child of its own,
and both ignore SIGTERM), or `mute` (healthy, but answers no prompt).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class FakeEndpoint(ThreadingHTTPServer):
    """Streams the n-th of its texts, or the last, to the n-th conversation, a word an event.

    Attributes:
        chats: whether it has a chat template; without one it refuses messages as vLLM does.
        key: what it asks for; `None`: it lets everybody in.
        asked: paths and bodies of the requests for streams.
        go_on: answers stop before their last word until it is set.
        last_event: behind the last word of each answer; default: its usage.
        pause: seconds before each word.
        mute: whether it answers no prompt.
        prints: whether it prints what it is asked.
    """

    daemon_threads = True
    last_event: Any = ...
    pause, mute, prints = 0.0, False, False

    def __init__(
        self, texts: list[str], models: tuple[str, ...] = ("model",), chats: bool = True, key: str | None = "",
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:  # fmt: skip
        super().__init__(address, _Handler)
        self.texts, self.models, self.chats, self.key = texts, models, chats, key
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint

    def log_message(self, form: str, *values: Any) -> None:
        if self.server.prints:
            print(form % values, self.headers.get("Authorization"), flush=True)

    def answer(self, data: Any, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def refused(self) -> bool:
        wanted = f"Bearer {self.server.key}" if self.server.key else None
        refused = self.server.key is not None and self.headers.get("Authorization") != wanted
        if refused:
            self.answer({"error": "Unauthorized"}, 401)
        return refused

    def do_GET(self) -> None:
        if not self.refused():
            self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        if self.refused():
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, chat = self.server.models[0], self.path == "/v1/chat/completions"
        if self.server.mute:
            self.answer({"error": "out of order"}, 500)
        elif chat and not self.server.chats:
            self.answer({"error": {"message": "no chat template", "code": 400}}, 400)
        elif request.get("stream"):
            self.server.asked.append((self.path, request))
            self.stream(self.server.texts[min(len(self.server.asked), len(self.server.texts)) - 1])
        elif chat:
            self.answer({"choices": [{"message": {"content": f"{name} heard {request['messages'][-1]['content']}"}}]})
        else:
            self.answer({"model": request["model"], "choices": [{"text": f" said {name}"}]})

    def stream(self, text: str) -> None:
        if text == "refuse":
            self.answer({"error": {"message": "too long", "code": 400}}, 400)
            return
        self.send_response(200)
        self.end_headers()
        words = text.split(" ")
        for number, piece in enumerate([words[0], *(f" {word}" for word in words[1:])]):
            if number == len(words) - 1:
                self.server.go_on.wait(30)
            time.sleep(self.server.pause)
            self.event({"choices": [{"delta": {"content": piece}} if self.server.chats else {"text": piece}]})
        usage = {"choices": [], "usage": {"completion_tokens": len(words)}}
        self.event(usage if self.server.last_event is ... else self.server.last_event)
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())  # as vLLM does
        self.wfile.flush()


@contextlib.contextmanager
def fake_endpoint(texts: list[str], **about: Any) -> Iterator[FakeEndpoint]:
    """A running endpoint."""
    with FakeEndpoint(texts, **about) as endpoint:
        threading.Thread(target=endpoint.serve_forever, args=(0.05,), daemon=True).start()
        yield endpoint
        endpoint.shutdown()


def main() -> None:
    given = dict(text.removeprefix("--").split("=") for text in sys.argv[1:] if "=" in text)
    name, behaviour = given["served-model-name"], given.get("behaviour")
    print(f"the fake server of {name} starts", flush=True)
    if behaviour == "die":
        print("no room for the weights", flush=True)
        sys.exit(3)
    if behaviour == "never":
        time.sleep(600)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", SLEEPER])
    with FakeEndpoint([f"this is {name}"], (name,), key=None, address=(given["host"], int(given["port"]))) as endpoint:
        endpoint.pause, endpoint.mute, endpoint.prints = 0.3, behaviour == "mute", True
        endpoint.serve_forever()


if __name__ == "__main__":
    main()
