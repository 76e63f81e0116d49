"""One model behind an OpenAI-compatible endpoint, which answers as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from expertprune.errors import ServingError, UsageError
from expertprune.serving.processes import THIS_MACHINE

_CONNECTING = 10.0  # seconds
_SILENCE = 600.0  # seconds between two pieces of an answer, or before the first
_NO_TEMPLATE = (400, 404, 405, 422, 501)  # what servers answer where a model takes no messages

Message = Mapping[str, str]  # `role` and `content`


@dataclass(frozen=True)
class ChatSettings:
    """How both models write; temperature 0 is greedy."""

    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 256


@dataclass(frozen=True)
class Ended:
    """The end of an answer: its tokens, if the endpoint counts them, and the time from the request.

    Attributes:
        first: seconds until the first piece; `None` where the answer is empty.
        seconds: until the last.
    """

    tokens: int | None
    first: float | None
    seconds: float

    @property
    def speed(self) -> float | None:
        """Tokens per second, the reading of the prompt included."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def words(self) -> str:
        """Tokens, speed and time for people."""
        parts = [] if self.tokens is None else [f"{self.tokens:,} tokens"]
        parts += [] if self.speed is None else [f"{self.speed:,.1f} tokens/s"]
        parts += ["empty"] if self.first is None else [f"first after {self.first:.2f} s"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint.

    Attributes:
        url: it ends in `/v1`.
        chats: whether the model takes messages; else it continues the text of the conversation.
        key: of the endpoint, if it asks for one.
    """

    url: str
    model: str
    chats: bool
    key: str | None = None

    def answer(self, messages: Sequence[Message], settings: ChatSettings) -> Generator[str | Ended, None, None]:
        """The pieces of the answer to a conversation as they come, and its end.

        Raises:
            ServingError: the endpoint refuses, or stops answering.
        """
        begin, first, tokens = time.monotonic(), None, None
        for event in self._events(messages, settings):
            try:
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                choices = event.get("choices") or []
                pieces = [
                    (each.get("delta") or {}).get("content") if self.chats else each.get("text") for each in choices
                ]
            except (AttributeError, TypeError):
                raise ServingError(f"{self.url}: sends what is no part of an answer: {str(event)[:200]}") from None
            for piece in filter(None, pieces):
                first = time.monotonic() - begin if first is None else first
                yield str(piece)
        yield Ended(tokens, first, time.monotonic() - begin)

    def _events(self, messages: Sequence[Message], settings: ChatSettings) -> Iterator[dict[str, Any]]:
        path, asked = self._request(messages)
        asked |= {
            "model": self.model,
            "seed": settings.seed,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timeout = httpx.Timeout(_SILENCE, connect=_CONNECTING)
        try:
            with httpx.stream("POST", f"{self.url}/{path}", json=asked, headers=_headers(self.key),
                              timeout=timeout, trust_env=_through_proxies(self.url)) as stream:  # fmt: skip
                if stream.is_error:
                    stream.read()
                    raise ServingError(f"{self.url}: {_reason(stream)}")
                for line in _lines(stream):
                    text = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or text == "[DONE]":
                        continue
                    event = json.loads(text)
                    if isinstance(event, Mapping) and (event.get("error") or event.get("object") == "error"):
                        raise ServingError(f"{self.url}: {_message(event)}")
                    yield event
        except (httpx.HTTPError, ValueError) as error:
            raise ServingError(f"{self.url}: stopped answering ({error or type(error).__name__})") from None

    def _request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        if self.chats:
            return "chat/completions", {"messages": [dict(message) for message in messages]}
        return "completions", {"prompt": "\n\n".join(message["content"] for message in messages)}


def _lines(stream: httpx.Response) -> Iterator[str]:
    """The lines of a stream of events.

    httpx would also end them at U+2028 and U+0085, which stand as they are in the text of an answer.
    """
    rest = ""
    for part in stream.iter_text():
        *lines, rest = (rest + part.replace("\r", "\n")).split("\n")
        yield from lines
    yield rest


def connect(url: str, model: str | None = None, key: str | None = None) -> Endpoint:
    """Find out what an endpoint serves, and whether the model takes messages: it is asked for one token.

    Args:
        url: such as `http://127.0.0.1:8000/v1`; `#NAME` at its end names one of several models.
        model: the one to take if the endpoint serves several.

    Raises:
        UsageError: there is no endpoint, it wants another key, or it serves other models.
    """
    address, _, named = url.partition("#")
    address = address.rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"{url}: is no endpoint, such as http://127.0.0.1:8000/v1")
    try:
        found = httpx.get(f"{address}/models", headers=_headers(key), timeout=_CONNECTING,
                          trust_env=_through_proxies(address))  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # the last two: of another proxy
        raise UsageError(f"{address}: nothing answers there ({error})") from None
    try:
        models = [str(each["id"]) for each in found.json()["data"]] if found.is_success else []
    except (ValueError, LookupError, TypeError):
        models = []
    if not models:
        raise UsageError(f"{address}: is no OpenAI-compatible endpoint: {_reason(found)}; its address ends in /v1")
    chosen = named or (models[0] if len(models) == 1 else model)
    if chosen not in models:
        raise UsageError(f"{address}: serves {', '.join(models)}: name one of them, such as {address}#{models[0]}")
    return Endpoint(address, chosen, _takes_messages(address, chosen, key), key)


def _takes_messages(url: str, model: str, key: str | None) -> bool:
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        found = httpx.post(f"{url}/chat/completions", json=asked, headers=_headers(key), timeout=_SILENCE,
                           trust_env=_through_proxies(url))  # fmt: skip
    except httpx.HTTPError as error:
        raise UsageError(f"{url}: does not answer a message ({error})") from None
    if found.is_error and found.status_code not in _NO_TEMPLATE:
        raise UsageError(f"{url}: does not answer a message: {_reason(found)}")
    return found.is_success


def _through_proxies(url: str) -> bool:
    """Whether the proxies of the environment count for an address: none stands between this machine and itself."""
    parts = httpx.URL(url)
    return parts.scheme == "https" or parts.host not in THIS_MACHINE


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _reason(answer: httpx.Response) -> str:
    """Why an endpoint refused, in its own words."""
    try:
        return f"{_message(answer.json())} (HTTP {answer.status_code})"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"HTTP {answer.status_code}"


def _message(data: Any) -> str:
    error = data.get("error") or data["message"]
    return str(error.get("message", error) if isinstance(error, Mapping) else error)
