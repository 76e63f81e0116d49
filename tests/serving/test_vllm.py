"""Real vLLM: an expert and another checkpoint behind the command, and what an unkind world sends them."""

from __future__ import annotations

import asyncio
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import expertprune
from bench import load
from bench.torture.workplace import tiny_chat_model
from expertprune.artifacts.timing import Load
from expertprune.models.loading import MUCH_FASTER, bfloat16_gain
from expertprune.serving import throughput
from expertprune.serving.chat import ChatSettings, Ended, running
from expertprune.serving.processes import check_port
from tests.test_examples import probe_path

if find_spec("vllm") is None:  # which takes seconds to import
    pytest.skip("vLLM is not installed", allow_module_level=True)
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
aiohttp = pytest.importorskip("aiohttp")
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(2400)]

SPEC = Path(__file__).parents[2] / "profiles" / "english-medical-qa.yaml"
QUESTION = [{"role": "user", "content": "Which organ pumps blood?"}]


ON_CPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> list[Path]:
    """An expert of SmolLM2, cut after a short look at text and not repaired, as nobody asks how good it is; a tiny model."""
    folder = tmp_path_factory.mktemp("served")
    overrides = {
        "evaluate.enabled": False, "compensation.method": "none", "relevance.criterion": "magnitude",
        "calibration.documents": 2, "name": "expert", "budget.ffn": 0.05,
    }  # fmt: skip
    return [
        expertprune.build(SPEC, folder / "expert", overrides, store=real_store),
        tiny_chat_model(folder / "tiny", seed=0),
    ]


@pytest.fixture(scope="module")
def bytes_of_number() -> int:
    """In weights and KV cache: float32 where a CPU multiplies bfloat16 slowly."""
    return 4 if ON_CPU and bfloat16_gain() * MUCH_FASTER < 1 else 2


@pytest.fixture(scope="module")
def endpoint(
    folders: list[Path], bytes_of_number: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[load.Endpoint]:
    """`expertprune serve` of both, as a user starts it, healthy."""
    with pytest.MonkeyPatch.context() as patch:
        if bytes_of_number == 4:
            patch.setattr(load, "ARGUMENTS", (*load.ARGUMENTS, "--dtype=float32"))
        served = load.Endpoint(folders, tmp_path_factory.mktemp("serving"))
    with served:
        yield served


def engine_root(endpoint: load.Endpoint, name: str) -> str:
    """Where a model's own server listens, behind the endpoint."""
    (port,) = (text.partition("=")[2] for text in endpoint.server(name).cmdline() if text.startswith("--port="))
    return f"http://127.0.0.1:{port}"


def test_a_chat_is_answered_whole_and_piece_by_piece(endpoint: load.Endpoint) -> None:
    """By OpenAI's client whole, and by the chat command as a stream: the same words, and as many as are counted."""
    client = openai.OpenAI(base_url=f"{endpoint.root}/v1", api_key="none", max_retries=0, timeout=300)
    assert httpx.get(f"{endpoint.root}{probe_path()}").status_code == 200  # what Kubernetes asks
    assert [model.id for model in client.models.list()] == ["expert", "tiny"]
    whole = client.chat.completions.create(model="expert", messages=QUESTION, max_tokens=12, temperature=0)
    assert whole.model == "expert"
    assert whole.choices[0].message.content.strip()
    url = f"{endpoint.root}/v1#expert"
    for side in running(url, url):
        *pieces, end = side.endpoint.answer(QUESTION, ChatSettings(max_tokens=12))
        assert side.endpoint.chats
        assert isinstance(end, Ended)
        assert end.tokens == whole.usage.completion_tokens
        assert 1 < len(pieces) <= end.tokens <= 12
        assert "".join(map(str, pieces)) == whole.choices[0].message.content


def test_vllms_benchmark_measures_it(
    endpoint: load.Endpoint, folders: list[Path], bytes_of_number: int, tmp_path: Path
) -> None:
    """A token of KV cache takes 30 layers × (K and V) × 3 heads × 64 channels, and blocks hold 128 tokens."""
    asked = Load(prompts=4, input_tokens=16, output_tokens=4, concurrency=2)
    process = endpoint.server("expert")
    server: Any = SimpleNamespace(
        root=engine_root(endpoint, "expert"),
        name="expert",
        servable=SimpleNamespace(folder=folders[0]),
        keys=(),
        tree=SimpleNamespace(members=lambda: [process, *process.children(recursive=True)]),
        load_seconds=1.0,
        failure=lambda: None,
    )
    prompts = throughput._write_prompts(tmp_path / "prompts.jsonl", folders[0], asked)
    row = throughput._measure(server, prompts, asked, "expert", 1, 100)
    assert row.output_tokens == 16
    assert abs(row.input_tokens - 64) <= 4  # a piece cut out of a text may be tokenized a little differently
    assert row.output_tokens_per_second == pytest.approx(16 / row.seconds)
    assert row.time_to_first_token_ms > 0
    assert row.time_per_output_token_ms > 0
    assert row.memory_bytes is not None
    assert row.memory_bytes > folders[0].joinpath("model.safetensors").stat().st_size
    if ON_CPU:
        assert row.kv_cache_tokens == 2**30 // (30 * 2 * 3 * 64 * bytes_of_number * 128) * 128


def requests_under_way(endpoint: load.Endpoint, name: str) -> float:
    with urllib.request.urlopen(f"{engine_root(endpoint, name)}/metrics") as page:
        found = re.search(r"^vllm:num_requests_running\{.*\} ([\d.]+)$", page.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_bursts_of_requests_are_all_answered_and_what_is_malformed_is_refused(endpoint: load.Endpoint) -> None:
    """One in ten is cancelled in the middle, and must not go on in the engine; one in ten is malformed."""
    everything = load.requests(endpoint.names, 200, seed=0, words=5)

    async def send() -> list[load.Answer]:
        answers = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for start in range(0, len(everything), 50):
                burst = everything[start : start + 50]
                answers += await asyncio.gather(*(load.ask(session, endpoint.root, asked) for asked in burst))
        return answers

    answers = asyncio.run(send())
    assert [answer.problem for answer in answers if answer.problem] == []
    statuses = {kind: {each.status for each in answers if each.asked.kind == kind} for kind in ("valid", "malformed")}
    assert statuses["valid"] == {200}
    assert statuses["malformed"] <= {400, 404, 422}
    assert {each.asked.kind for each in answers} == {"valid", "cancelled", "malformed"}
    deadline = time.monotonic() + 10
    while any(requests_under_way(endpoint, name) for name in endpoint.names):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and that nobody asks for (as under some containers' init) does not."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_one_outlives_the_others_death_and_an_interruption_ends_all(endpoint: load.Endpoint) -> None:
    """Last of those that share the endpoint."""

    def status(name: str) -> int:
        request = {"model": name, "prompt": "The heart pumps", "max_tokens": 8}
        return int(httpx.post(f"{endpoint.root}/v1/completions", json=request, timeout=600).status_code)

    killed = endpoint.server("tiny")
    orphans = killed.children(recursive=True)
    killed.kill()
    psutil.wait_procs([killed], timeout=10)
    assert status("tiny") == 503
    assert status("expert") == 200
    deadline = time.monotonic() + 1500
    while status("tiny") != 200:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "tiny died (SIGKILL)" in endpoint.log.read_text()
    assert not any(alive(orphan) for orphan in orphans)
    members = endpoint.members()
    assert len(members) >= 3
    endpoint.process.send_signal(signal.SIGINT)
    assert endpoint.process.wait(timeout=60) == 130
    assert not any(alive(member) for member in members)
    check_port("127.0.0.1", endpoint.port)
