"""Real vLLM: one expert behind the command, two behind one endpoint, and what an unkind world sends them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import expertprune
from bench.load import Answer, ask, requests
from expertprune.artifacts.timing import Load
from expertprune.models.loading import MUCH_FASTER, bfloat16_gain
from expertprune.serving import engine, throughput
from expertprune.serving.chat import ChatSettings, Ended, Page, running
from expertprune.serving.deployment import Deployment
from expertprune.serving.processes import check_port, free_port
from tests.browsers import CHROMIUM, opened
from tests.test_examples import probe_path

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
aiohttp = pytest.importorskip("aiohttp")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ROOT = Path(__file__).parent.parent.parent
SPEC = ROOT / "profiles" / "english-medical-qa.yaml"
# Arguments of vLLM for quick starts. On a CPU it keeps a compiled product for every number of tokens that it has computed at
# once, so its memory grows until it has seen them all: there are 16 here.
SMALL = ["--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "16"]
QUESTION = [{"role": "user", "content": "Which organ pumps blood?"}]


@functools.cache
def slow_bfloat16() -> bool:
    return engine.platform().cpu and bfloat16_gain() * MUCH_FASTER < 1


def quick() -> list[str]:
    """Arguments of vLLM for quick starts and answers."""
    return [*SMALL, "--dtype=float32"] if slow_bfloat16() else SMALL


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> list[Path]:
    """Two experts of SmolLM2, cut and not repaired: here nobody asks how good they are."""
    folder = tmp_path_factory.mktemp("experts")
    plain = {"evaluate.enabled": False, "compensation.method": "none"}
    return [
        expertprune.build(SPEC, folder / name, {**plain, "name": name, "budget.ffn": fraction}, store=real_store)
        for name, fraction in (("quarter", 0.25), ("half", 0.5))
    ]


@dataclass
class Serving:
    """A running `expertprune serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=300)

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def serving(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`expertprune serve` of one expert, as a user starts it, healthy."""
    folder, port = tmp_path_factory.mktemp("serving"), free_port()
    command = [sys.executable, "-m", "expertprune.cli", "serve", str(experts[0]), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        [*command, "--log", str(folder), "--", *quick()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(folder / "errors").open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        printed = ""
        while "stop it" not in printed:
            line = process.stdout.readline()
            assert line, (folder / "errors").read_text()
            printed += line
        yield Serving(process, port, folder / f"quarter-{port}.log")
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_chat_is_answered_whole_and_as_a_stream(serving: Serving) -> None:
    client = serving.client()
    assert httpx.get(f"{serving.root}{probe_path()}").status_code == 200  # what Kubernetes asks
    assert [model.id for model in client.models.list()] == ["quarter"]
    request = {"model": "quarter", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**request)
    assert whole.usage.completion_tokens <= 12
    assert whole.choices[0].message.content.strip()
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole.choices[0].message.content


def test_the_chat_command_speaks_to_it(serving: Serving) -> None:
    """The same model on both sides: the same words, piece by piece, as many as it counts."""
    base, expert = running(f"{serving.root}/v1", f"{serving.root}/v1")
    said = []
    for side in (base, expert):
        *pieces, end = side.endpoint.answer(QUESTION, ChatSettings(max_tokens=12))
        assert side.endpoint.chats
        assert isinstance(end, Ended)
        assert 1 < len(pieces) <= end.tokens <= 12
        said.append("".join(map(str, pieces)))
    assert said[0] == said[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_chat_page_speaks_to_it(serving: Serving) -> None:
    """The same real model on both sides, in a browser: the same answer, no word marked."""
    sides = running(f"{serving.root}/v1", f"{serving.root}/v1")
    with (
        Page(sides, 0, ChatSettings(max_tokens=12)) as page,
        opened() as browser,
        contextlib.closing(browser.new_page()) as tab,
    ):
        threading.Thread(target=page.serve_forever, daemon=True).start()
        tab.goto(page.url)
        tab.fill("#prompt", QUESTION[0]["content"])
        tab.press("#prompt", "Enter")
        said = []
        for role in ("base", "expert"):
            answer = tab.locator(f"[data-role={role}]")
            answer.get_by_text("tokens/s").wait_for(timeout=180_000)
            said.append(answer.locator(".text").inner_text())
        assert said[0] == said[1]
        assert said[0].strip()
        assert tab.locator("mark").count() == 0
        page.shutdown()


def test_vllms_benchmark_measures_it(serving: Serving, experts: list[Path], tmp_path: Path) -> None:
    """A token of KV cache takes 30 layers × (K and V) × 3 heads × 64 channels, and blocks hold 128 tokens."""
    load = Load(prompts=4, input_tokens=16, output_tokens=4, concurrency=2)
    server = SimpleNamespace(
        root=serving.root,
        name="quarter",
        servable=SimpleNamespace(folder=experts[0]),
        keys=(),
        tree=SimpleNamespace(members=serving.members),
        load_seconds=1.0,
        failure=lambda: None,
    )
    row = throughput._measure(
        server, throughput._write_prompts(tmp_path / "prompts.jsonl", experts[0], load), load, "expert", 1, 100
    )
    assert row.output_tokens == 16
    assert abs(row.input_tokens - 64) <= 4  # a piece cut out of a text may be tokenized a little differently
    assert row.output_tokens_per_second == pytest.approx(16 / row.seconds)
    assert row.time_to_first_token_ms > 0
    assert row.time_per_output_token_ms > 0
    assert row.memory_bytes > experts[0].joinpath("model.safetensors").stat().st_size
    if engine.platform().cpu:
        item = 4 if slow_bfloat16() else 2  # bytes
        assert row.kv_cache_tokens == 2**30 // (30 * 2 * 3 * 64 * item * 128) * 128


def test_bursts_of_requests_are_all_answered_and_what_is_malformed_is_refused(serving: Serving) -> None:
    """One in ten is cancelled in the middle, and must not go on in the engine; one in ten is malformed."""
    everything = requests(["quarter"], 200, seed=0, words=5)

    async def send() -> list[Answer]:
        # vLLM closes idle connections after 5 s, perhaps just as a request goes out
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session:
            bursts = [everything[start : start + 50] for start in range(0, len(everything), 50)]
            return [
                answer
                for burst in bursts
                for answer in await asyncio.gather(*(ask(session, serving.root, asked) for asked in burst))
            ]

    answers = asyncio.run(send())
    assert [answer.problem for answer in answers if answer.problem] == []
    statuses = {kind: {each.status for each in answers if each.asked.kind == kind} for kind in ("valid", "malformed")}
    assert statuses["valid"] == {200}
    assert statuses["malformed"] <= {400, 404, 422}
    assert {each.asked.kind for each in answers} == {"valid", "cancelled", "malformed"}
    for _ in range(50):
        with urllib.request.urlopen(f"{serving.root}/metrics") as page:
            running = re.search(r"^vllm:num_requests_running\{.*\} ([\d.]+)$", page.read().decode(), re.MULTILINE)
        assert running is not None
        if float(running[1]) == 0:
            break
        time.sleep(0.2)
    assert float(running[1]) == 0


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and that nobody asks for (as under some containers' init) does not."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_an_interruption_ends_it_and_frees_the_port(serving: Serving) -> None:
    """Last of those that share the server."""
    members = serving.members()
    assert len(members) >= 2
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(timeout=60) == 130
    assert not any(alive(member) for member in members)
    check_port("127.0.0.1", serving.port)


@pytest.mark.timeout(2400)
def test_two_experts_share_an_endpoint_and_one_outlives_the_others_death(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    said: list[str] = []
    served = Deployment(experts, port=free_port(), arguments=quick(), logs=tmp_path, report=said.append)
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=600)

    def ask(model: str) -> int:
        answer = client.completions.create(model=model, prompt="The heart pumps", max_tokens=8, temperature=0)
        assert answer.model == model
        return int(answer.usage.completion_tokens)

    with served:
        assert [model.id for model in client.models.list()] == ["quarter", "half"]
        chunks = client.completions.create(model="half", prompt="The", max_tokens=8, temperature=0, stream=True)
        assert len(list(chunks)) > 1
        begin, killed = time.monotonic(), served.servers["half"]
        orphans = killed.tree.members()[1:]
        assert orphans
        assert killed.process is not None
        killed.process.kill()
        assert ask("quarter") > 0
        served.watch(lambda: any("is back" in message for message in said) or time.monotonic() - begin > 1500)
        print("\n".join(said))
        assert not any(alive(orphan) for orphan in orphans)
        assert ask("half") > 0
        trees = [served.router.tree, *(server.tree for server in served.servers.values())]
    assert any("half died (SIGKILL)" in message for message in said)
    assert not any(tree.alive or tree.members() for tree in trees)
    check_port("127.0.0.1", served.port)
