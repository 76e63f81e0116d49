"""A stand-in for vLLM's server, for tests of everything around it: takes the same arguments, and misbehaves on request.

`--behaviour` is one of: `answer` (healthy at once), `never` (runs, is never healthy), `die` (says why and exits with 3),
`stubborn` (answers, starts a child of its own, and both ignore SIGTERM), `mute` (healthy, but answers no prompt), or
`once=FILE` (answers, but dies at once when the file is there already, which it writes).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = ""
    mute = False

    def log_message(self, form: str, *values: Any) -> None:
        print(form % values, flush=True)

    def answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": self.model}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        print(self.headers.get("Authorization"), flush=True)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.mute:
            self.answer({"error": "out of order"}, 500)
        elif request.get("stream"):
            self.stream()
        elif self.path == "/v1/chat/completions":
            (message,) = request["messages"]
            self.answer({"choices": [{"message": {"content": f"{self.model} heard {message['content']}"}}]})
        else:
            self.answer({"model": request["model"], "choices": [{"text": f" said {self.model}"}]})

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(3):
            said = {"choices": [{"delta": {"content": f"{self.model} {number}"}}]}
            event = f"data: {json.dumps(said)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
            time.sleep(0.3)
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host"):
        parser.add_argument(name)
    parser.add_argument("--served-model-name", default="fake")
    parser.add_argument("--port", type=int)
    parser.add_argument("--behaviour", default="answer")
    known = parser.parse_known_args()[0]
    behaviour, _, file = known.behaviour.partition("=")
    print(f"the fake server of {known.served_model_name} starts", flush=True)
    if behaviour == "die":
        print("no room for the weights", flush=True)
        sys.exit(3)
    if behaviour == "once":
        if Path(file).exists():
            sys.exit(4)
        Path(file).touch()
    if behaviour == "never":
        time.sleep(600)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", SLEEPER])
    Handler.model, Handler.mute = known.served_model_name, behaviour == "mute"
    ThreadingHTTPServer((known.host, known.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
