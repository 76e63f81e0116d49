"""One vLLM server as a process: started, waited for, asked, and ended with all its descendants."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
import urllib.request
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from expertprune.errors import ServingError, UsageError
from expertprune.files import digest_of, numbered, store_folder, temporary_folder, unused
from expertprune.formats import file_name
from expertprune.serving import engine
from expertprune.serving.processes import ProcessTree, check_port, client_address, ending, free_port, reach_directly

PROMPT = "The heart pumps"
QUESTION = "What does the heart do?"  # for models that chat
PATIENCE = 900.0  # seconds until a server that is not healthy is given up


class Server:
    """vLLM's OpenAI-compatible server of one folder.

    It is a context manager: inside the block the server is healthy, after the block nothing of it runs.

        with Server("experts/medical-qa") as server:
            client = openai.OpenAI(base_url=server.url, api_key="none")

    Attributes:
        servable: what it serves.
        name: the model's name in requests.
        url: the endpoint, such as `http://127.0.0.1:8000/v1`.
        log: what vLLM prints.
        load_seconds: from the start of the process until it was healthy.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        arguments: Sequence[str] = (),
        log: str | Path | None = None,
        model_name: str | None = None,
        patience: float = PATIENCE,
        engines: int = 1,
    ) -> None:
        """Check what can be checked before anything starts.

        Args:
            port: default: any that is free.
            arguments: of vLLM's command line; they win over the project's own.
            log: default: a temporary file, which is kept after a failure. Where a file is, it stays,
                and the log is written beside it: `log-2`.
            model_name: default: the expert's name, or the folder's if it is no expert.
            patience: seconds to wait for a server to get healthy.
            engines: number of engines that share the memory.

        Raises:
            CheckpointError: the folder is no expert and no checkpoint, or is incomplete.
            UsageError: the port is taken, vLLM is missing, memory is short, an argument is one of the server's own, or
                a key is none.
        """
        self.servable = servable = engine.check_folder(folder, model_name)
        self.host, self.port = host, free_port(host) if port is None else port
        check_port(self.host, self.port)
        reach_directly(client_address(host))
        own = engine.server_arguments(servable, self.host, self.port, arguments, engines)
        self.name, self.patience = servable.name, patience
        self.root = f"http://{client_address(host)}:{self.port}"
        self.url = f"{self.root}/v1"
        self.load_seconds: float | None = None
        self.keys = api_keys(arguments)
        self._own = contextlib.ExitStack()
        weakref.finalize(self, self._own.close)
        self._own_log = log is None
        self.log = self._own.enter_context(temporary_folder()) / "vllm.log" if log is None else _new_log(Path(log))
        variables = engine.environment(engine.platform(), engines)
        self.tree = ProcessTree([*engine.COMMAND, *own], self.log, variables)
        self._started = 0.0

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self.tree.process

    def start(self) -> None:
        """Start the process without waiting for it."""
        self._started = time.monotonic()
        self.load_seconds = None
        self.tree.start()

    def healthy(self) -> bool:
        """Whether the server answers.

        Raises:
            ServingError: it has ended, or `patience` is over; the message holds its log's last lines.
        """
        if not self.tree.alive:
            raise self.failed(f"ended ({ending(self.tree.code)}) before it was healthy")
        try:
            with urllib.request.urlopen(f"{self.root}/health", timeout=5) as answer:
                if answer.status == 200:
                    if self.load_seconds is None:
                        self.load_seconds = time.monotonic() - self._started
                    return True
        except OSError:
            pass
        if time.monotonic() - self._started > self.patience:
            raise self.failed(f"was not healthy after {self.patience:g} s")
        return False

    def wait(self) -> None:
        """Return as soon as the server is healthy; raises `ServingError` as `healthy` does."""
        while not self.healthy():
            time.sleep(0.25)

    def complete(self, prompt: str | None = None, max_tokens: int = 8) -> str:
        """The server's greedy continuation of a prompt, or its answer where the model chats.

        Args:
            prompt: default: `PROMPT`, or `QUESTION` where the model chats.

        Raises:
            ServingError: it does not answer as it should.
        """
        path, request = trial(self.servable, self.name, max_tokens, prompt)
        try:
            choice = self._ask(f"/v1/{path}", {**request, "temperature": 0})["choices"][0]
            if not self.servable.chat:
                return str(choice["text"])
            said = choice["message"]
            return str(said["content"] or said.get("reasoning") or "")  # where vLLM parts thoughts from what is said
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self.failed(f"is healthy but does not answer a prompt ({error})") from None

    def _ask(self, path: str, request: dict[str, Any]) -> Any:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.keys[0]}"} if self.keys else {}),
        }
        asked = urllib.request.Request(self.root + path, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=self.patience) as answer:
            return json.load(answer)

    def failure(self) -> ServingError | None:
        """Why the server no longer runs; `None` while it runs."""
        return None if self.tree.alive else self.failed(f"died ({ending(self.tree.code)})")

    def failed(self, what: str) -> ServingError:
        """An error that says what the server did, with the end of its log, which stays."""
        self._keep_log()
        return ServingError(f"the server of {self.name} {what}; the end of its log, {self.log}:\n{self.tree.tail()}")

    def stop(self) -> None:
        """End the server and all its descendants, within 10 s."""
        self.tree.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            self._keep_log()
        self._own.close()

    def _keep_log(self) -> None:
        """Move a log of the server's own to where nothing removes it: it is worth keeping."""
        if self._own_log and self.log.is_file():
            self._own_log = False
            kept = _temporary_log()
            self.log = self.tree.log = self.log.replace(kept)


def trial(
    servable: engine.Servable, name: str, max_tokens: int, prompt: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The route behind `/v1/` and the request that try a model: a message where it chats."""
    about: dict[str, Any] = {"model": name, "max_tokens": max_tokens}
    if servable.chat:
        return "chat/completions", {**about, "messages": [{"role": "user", "content": prompt or QUESTION}]}
    return "completions", {**about, "prompt": prompt or PROMPT}


def log_file(folder: Path, name: str, port: int) -> Path:
    """The log file of a server that outlives this process's temporary files; every name has one of its own."""
    short = file_name(name)
    own = short if short == name else f"{short[:51]}-{digest_of(ascii(name))[:8]}"  # not all names are UTF-8
    return folder / f"{own}-{port}.log"


def _new_log(path: Path) -> Path:
    """Where a log is written for which `path` is wanted: what is there stays, but for an earlier log in the store."""
    if path.parent == store_folder() / "logs":
        with contextlib.suppress(OSError):
            path.unlink()
    return next(place for place in itertools.chain([path], numbered(path)) if unused(place))


def api_keys(arguments: Sequence[str]) -> list[str]:
    """The API keys that vLLM accepts: those of `--api-key KEY...`, else of the variable VLLM_API_KEY.

    Raises:
        UsageError: no request can carry one of them, or one is empty.
    """
    given = list(_given_keys(arguments).values())
    if not all(given):
        raise UsageError("--api-key: a key is empty, with which vLLM lets everybody in; give another, or leave it out")
    keys = given or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise UsageError("an API key (--api-key, or the variable VLLM_API_KEY) holds characters that no header of HTTP can "
                         "carry; choose one of ASCII letters, digits and signs")  # fmt: skip
    return keys


def without_keys(arguments: Sequence[str]) -> list[str]:
    """Arguments of vLLM as they may be written down: stars stand for API keys."""
    keys = _given_keys(arguments)
    return [
        text if place not in keys else text.removesuffix(keys[place]) + "***" for place, text in enumerate(arguments)
    ]


def _given_keys(arguments: Sequence[str]) -> dict[int, str]:
    """The keys of `--api-key KEY...` or `--api-key=KEY`, by the position of the argument that holds each."""
    keys: dict[int, str] = {}
    taking = False
    for place, text in enumerate(arguments):
        name, sign, value = text.partition("=")
        if text.startswith("-"):
            taking = name.replace("_", "-") == "--api-key"
            if taking and sign:
                keys[place] = value
        elif taking:
            keys[place] = text
    return keys


def _temporary_log() -> Path:
    with tempfile.NamedTemporaryFile(prefix="expertprune-", suffix=".log", delete=False) as file:
        return Path(file.name)
