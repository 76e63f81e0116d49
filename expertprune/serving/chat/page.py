"""The chat's page: one HTML file, and a server on 127.0.0.1 that asks the two endpoints for it."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertprune.errors import ExpertpruneError
from expertprune.serving.chat.endpoints import ChatSettings, Ended
from expertprune.serving.chat.sides import Side
from expertprune.serving.processes import check_port

ADDRESS = "127.0.0.1"
_LARGEST = 4 * 2**20  # bytes of a request


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str


class _Asked(BaseModel):
    """What the page asks of one side: a conversation whose last message is the user's, and how to answer."""

    model_config = ConfigDict(extra="forbid")

    messages: list[_Message] = Field(min_length=1)
    seed: int
    temperature: float = Field(ge=0, le=2)
    max_tokens: int = Field(ge=1)


class Page(ThreadingHTTPServer):
    """Serves the page, and streams the answers of both sides to it as lines of JSON.

    Lines are `{"text": ...}` for a piece of the answer, then `{"ended": ...}` or `{"error": ...}`.
    Requests for another host name, from another page, or in another type than JSON are refused, so
    that no website can reach the models through a browser that runs here.

    Attributes:
        url: the page's address.
    """

    daemon_threads = True

    def __init__(self, sides: Sequence[Side], port: int, settings: ChatSettings, in_turn: bool = False) -> None:
        """Listen on a port of 127.0.0.1; `serve_forever` answers.

        Args:
            in_turn: whether the sides answer one after the other at first; the page can change it.

        Raises:
            UsageError: the port is taken.
        """
        check_port(ADDRESS, port)
        self.sides = {side.role: side for side in sides}
        self.settings, self.in_turn = settings, in_turn
        super().__init__((ADDRESS, port), _Handler)
        self.url = f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def html(self, nonce: str) -> str:
        """The page; `nonce` is what its content security policy lets run."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("expertprune.serving.chat"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        return environment.get_template("chat.html").render(
            sides=list(self.sides.values()), settings=asdict(self.settings), in_turn=self.in_turn, nonce=nonce
        )


class _Handler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        if not self._from_here():
            return
        if self.path != "/":
            self._refuse(404, "there is only one page, /")
            return
        nonce = secrets.token_urlsafe(16)
        body = self.server.html(nonce).encode()
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; " \
                 "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        if not self._from_here():
            return
        side = next((side for role, side in self.server.sides.items() if self.path == f"/{role}"), None)
        if side is None:
            self._refuse(404, f"ask one of {', '.join(f'/{role}' for role in self.server.sides)}")
            return
        length = self.headers.get("Content-Length", "")
        known = re.fullmatch(r"[0-9]{1,9}", length) is not None and int(length) <= _LARGEST
        if self.headers.get_content_type() != "application/json" or not known:
            self._refuse(400, "a request is JSON of at most 4 MiB, with its length")
            return
        try:
            asked = _Asked.model_validate_json(self.rfile.read(int(length)))
        except ValidationError as error:
            self._refuse(400, str(error))
            return
        self._stream(side, asked)

    def _stream(self, side: Side, asked: _Asked) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()  # HTTP/1.0: the answer ends with the connection
        messages = [message.model_dump() for message in asked.messages]
        settings = ChatSettings(asked.seed, asked.temperature, asked.max_tokens)
        pieces = side.endpoint.answer(messages, settings)
        try:
            for piece in pieces:
                if isinstance(piece, Ended):
                    self._line({"ended": {**asdict(piece), "words": piece.words}})
                else:
                    self._line({"text": piece})
        except ExpertpruneError as error:
            self._line({"error": str(error)})
        except ConnectionError:  # the page was closed, or its reader stopped the answer
            pass
        finally:
            pieces.close()  # then the engine stops writing too

    def _line(self, data: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(data).encode() + b"\n")
        self.wfile.flush()

    def _from_here(self) -> bool:
        """Whether a request is for this address and from this page; else it is refused."""
        hosts = {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{host}" for host in hosts}):
            return True
        self._refuse(403, "this page is for browsers on this machine")
        return False

    def _refuse(self, status: int, reason: str) -> None:
        body = reason.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *values: Any) -> None:
        """Say nothing: the terminal is for what the command says."""
