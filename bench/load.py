"""Real vLLM under load: what is answered, refused and lost, and what stays behind.

    python -m bench.load [--number 10000] [--seed 0] [--save]

`expertprune serve` serves two tiny random models behind one endpoint. Requests come in bursts: chats
and completions, whole and as streams. One in ten is cancelled in the middle, and one in ten is
malformed. The first model's engine is killed twice, after a quarter of them and after a half, and its server after three
quarters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
import psutil

from bench.torture.records import save_row
from bench.torture.workplace import WORDS, tiny_chat_model
from expertprune.serving.processes import free_port

AT_ONCE = 96  # requests that are under way
BACK = 60.0  # seconds until a killed engine answers again
ENDED = 10.0  # seconds after which nothing is left of an endpoint that has ended
GROWTH = 1.05  # of memory, from the middle of the run to its end
PATIENCE = 300.0  # seconds for one answer
# Arguments of vLLM for quick starts, and for memory that soon stops growing: on a CPU it keeps a compiled product for
# every number of tokens that it computes at once.
ARGUMENTS = ("--max-model-len", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "16")
TOO_LONG = "w1 " * 3000
KILLS = (True, True, False)  # an engine, an engine again, its server, at equal distances over the requests

Kind = Literal["valid", "cancelled", "malformed"]


@dataclass(frozen=True)
class Asked:
    """A request."""

    kind: Kind
    model: str
    path: str
    body: bytes
    stream: bool = False
    cancel_after: float = 0.0


@dataclass
class Answer:
    """What came back; `problem` says what is wrong with it."""

    asked: Asked
    begun: float
    ended: float = 0.0
    status: int = 0
    tries: int = 1
    problem: str = ""


def malformed(model: str, chance: random.Random) -> tuple[str, bytes]:
    """The path and the body of a request that must be refused."""
    chat = chance.random() < 0.5
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "w1"}]} if chat else {"prompt": "w1"}
    about: dict[str, Any] = {"model": model, "max_tokens": 4, **prompt}
    long = {"messages": [{"role": "user", "content": TOO_LONG}]} if chat else {"prompt": TOO_LONG}
    wrong: list[dict[str, Any]] = [
        {"max_tokens": -1}, {"max_tokens": "many"}, {"max_tokens": 10**30}, {"n": -1}, {"temperature": -1}, {"top_p": 7},
        {"top_k": -9}, {"presence_penalty": 99}, {"stop": 5}, {"model": "nobody"}, {"model": 7}, long,
        {"messages": "w1"} if chat else {"prompt": [-5]}, {"messages": [7]} if chat else {"prompt": [10**9]},
    ]  # fmt: skip
    if chance.random() < 0.2:
        return path, chance.choice((b"{", b"", b"[1]", b"\xff\xfe", b'{"max_tokens": 4}'))
    return path, json.dumps({**about, **chance.choice(wrong)}).encode()


def requests(models: Sequence[str], number: int, seed: int, words: int = 24) -> list[Asked]:
    """So many requests of at most so many words; one in ten is cancelled, one in ten malformed."""
    chance = random.Random(seed)
    made = []
    for _ in range(number):
        model, kind = chance.choice(models), chance.choices(("valid", "cancelled", "malformed"), (8, 1, 1))[0]
        if kind == "malformed":
            made.append(Asked("malformed", model, *malformed(model, chance)))
            continue
        chat, stream = chance.random() < 0.5, chance.random() < 0.5
        text = " ".join(chance.choices(WORDS, k=chance.randint(1, words)))
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        tokens = 64 if kind == "cancelled" else chance.randint(1, 8)
        body = {"model": model, "max_tokens": tokens, "stream": stream, "ignore_eos": True, **prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        made.append(Asked(kind, model, path, json.dumps(body).encode(), stream, chance.uniform(0.0, 0.3)))  # type: ignore[arg-type]
    return made


async def ask(session: aiohttp.ClientSession, root: str, asked: Asked) -> Answer:
    """Ask as clients do: what is answered with 503 is asked again, once a second."""
    answer = Answer(asked, time.monotonic())
    try:
        if asked.kind == "cancelled":
            await asyncio.wait_for(_once(session, root, asked, answer), asked.cancel_after)
        else:
            await _once(session, root, asked, answer)
            while answer.status == 503 and time.monotonic() - answer.begun < PATIENCE:
                await asyncio.sleep(1.0)
                answer.tries += 1
                await _once(session, root, asked, answer)
    except TimeoutError:
        answer.problem = "" if asked.kind == "cancelled" else "no answer in time"
    except (aiohttp.ClientError, OSError) as error:
        answer.problem = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    return answer


async def _once(session: aiohttp.ClientSession, root: str, asked: Asked, answer: Answer) -> None:
    headers = {"Content-Type": "application/json"}
    async with session.post(root + asked.path, data=asked.body, headers=headers) as reply:
        answer.status = reply.status
        content = await reply.read()
    answer.problem = _problem(asked, reply.status, content)


def _problem(asked: Asked, status: int, content: bytes) -> str:
    """What is wrong with a reply; empty if nothing is."""
    said = f"{status}: {content[:200].decode(errors='replace')}"
    if asked.kind == "malformed":
        return "" if 400 <= status < 500 else f"{asked.body[:120]!r} is answered with {said}"
    if status != 200:
        return said
    if asked.stream:
        return "" if content.rstrip().endswith(b"data: [DONE]") else f"a stream without an end: {content[-100:]!r}"
    return "" if json.loads(content)["choices"][0]["finish_reason"] == "length" else said


# --- the endpoint -----------------------------------------------------------------------------------------------------


class Endpoint:
    """`expertprune serve` of several folders, as a user starts it."""

    def __init__(self, folders: Sequence[Path], place: Path) -> None:
        self.port, self.names = free_port(), [folder.name for folder in folders]
        self.root = f"http://127.0.0.1:{self.port}"
        self.log = place / f"serve-{self.port}.log"
        command = [sys.executable, "-m", "expertprune", "serve", *map(str, folders), "--port", str(self.port)]
        environment = {**os.environ, "EXPERTPRUNE_STORE": str(place / "store"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen([*command, "--", *ARGUMENTS], stdout=output, stderr=output, env=environment)
        begun = time.monotonic()
        while "stop it" not in self.log.read_text():
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-3000:])
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def server(self, name: str) -> psutil.Process:
        """The vLLM server of a model; its engine is its child."""
        for member in self.members():
            if f"--served-model-name={name}" in member.cmdline():
                return member
        raise LookupError(name)

    def kill(self, name: str, engine: bool) -> None:
        """Kill a model's engine, or the server in front of it; raises `LookupError` where it has none."""
        server = self.server(name)
        engines = [
            each for each in server.children(recursive=True) if "EngineCore" in " ".join([each.name(), *each.cmdline()])
        ]
        if engine and not engines:
            raise LookupError(f"the server of {name} has no process of an engine")
        for process in engines if engine else [server]:
            process.kill()

    def end(self, number: signal.Signals) -> list[str]:
        """Send a signal; what is left of the processes `ENDED` seconds later."""
        members = self.members()
        self.process.send_signal(number)
        left = psutil.wait_procs([*members, psutil.Process(self.process.pid)], timeout=ENDED)[1]
        self.process.poll()
        return [f"{number.name} leaves {each.name()}" for each in left if _runs(each)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def anonymous(pid: int) -> int:
    """Bytes of a process that are in no file; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("RssAnon:")[2].split()[0]) if "RssAnon:" in status else 0


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """A run of requests against an endpoint."""

    endpoint: Endpoint
    answers: list[Answer] = field(default_factory=list)
    memory: list[dict[int, int]] = field(default_factory=list)  # by process, once a second
    killing: asyncio.Lock = field(default_factory=asyncio.Lock)
    outages: list[tuple[float, float]] = field(default_factory=list)  # from a kill until the model answers again

    async def run(self, everything: Sequence[Asked], seed: int) -> None:
        """Send all requests in bursts; kill the first model's engine twice, and once its server (see `KILLS`)."""
        chance, room, kills = random.Random(seed), asyncio.Semaphore(AT_ONCE), list(KILLS)
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            sampling = asyncio.create_task(self._sample())
            running: list[asyncio.Task[None]] = []
            sent = 0
            while sent < len(everything):
                for asked in everything[sent : (sent := sent + chance.randint(1, 64))]:
                    await room.acquire()
                    running.append(asyncio.create_task(self._ask(session, asked, room)))
                await asyncio.sleep(chance.uniform(0.0, 0.1))
                if kills and sent >= len(everything) * (1 + len(KILLS) - len(kills)) / (1 + len(KILLS)):
                    running.append(asyncio.create_task(self._kill(session, kills.pop(0))))
            await asyncio.gather(*running)
            sampling.cancel()

    async def _ask(self, session: aiohttp.ClientSession, asked: Asked, room: asyncio.Semaphore) -> None:
        asking = asyncio.ensure_future(ask(session, self.endpoint.root, asked))
        await asyncio.wait([asking], timeout=5.0)  # who waits longer, for an engine that is back, stops nobody
        room.release()
        self.answers.append(await asking)

    async def _kill(self, session: aiohttp.ClientSession, engine: bool) -> None:
        name = self.endpoint.names[0]
        body = json.dumps({"model": name, "prompt": "w1", "max_tokens": 1}).encode()
        async with self.killing:  # the model is back before it is killed again
            self.endpoint.kill(name, engine)
            begun = time.monotonic()
            await asyncio.sleep(1.0)  # until the server has noticed
            while (await ask(session, self.endpoint.root, Asked("valid", name, "/v1/completions", body))).status != 200:
                await asyncio.sleep(0.5)
            self.outages.append((begun, time.monotonic()))

    async def _sample(self) -> None:
        while True:
            self.memory.append({each.pid: anonymous(each.pid) for each in self.endpoint.members()})
            await asyncio.sleep(1.0)

    def lost(self) -> list[Answer]:
        """Valid requests without an answer which were under way at the model that was killed."""
        return [each for each in self.answers if each.asked.kind == "valid" and each.problem and self._excused(each)]

    def _excused(self, answer: Answer) -> bool:
        """Whether a request, of any kind, was under way at the dead model; one that is cancelled is not asked again."""
        here = answer.asked.model == self.endpoint.names[0]
        return here and any(answer.begun < back and answer.ended > killed for killed, back in self.outages)

    def growth(self) -> float:
        """Memory at the end over memory in the middle, of the processes that ran all the time."""
        whole = set.intersection(*(set(sample) for sample in self.memory))
        totals = [sum(sample[pid] for pid in whole) for sample in self.memory]
        middle, end = (totals[int(len(totals) * at) : int(len(totals) * (at + 0.2)) + 1] for at in (0.4, 0.8))
        return statistics.median(end) / statistics.median(middle)

    def problems(self) -> list[str]:
        """What did not hold."""
        found = [
            f"{each.asked.kind} request to {each.asked.model}: {each.problem}"
            for each in self.answers
            if each.problem and not self._excused(each)
        ]
        found += [f"back after {back - killed:.0f} s" for killed, back in self.outages if back - killed > BACK]
        if (growth := self.growth()) > GROWTH:
            found.append(f"memory grows by {growth - 1:.1%}")
        return found

    def told(self) -> dict[str, Any]:
        """The numbers of the run."""
        kinds = Counter(each.asked.kind for each in self.answers)
        return {
            **dict(kinds.items()),
            "lost on the dead engine": len(self.lost()),
            "asked again": sum(each.tries > 1 for each in self.answers),
            "back after (s)": [round(back - killed) for killed, back in self.outages],
            "memory, end over middle": round(self.growth(), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="how many requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="put the numbers into bench/results")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="load-"))
    try:
        folders = [tiny_chat_model(place / name, seed) for seed, name in enumerate(("one", "two"))]
        with Endpoint(folders, place) as endpoint:
            print(f"both healthy after {endpoint.seconds:.0f} s", flush=True)
            os.nice(10)  # clients run elsewhere: this one gives way to engines
            load, begun = Load(endpoint), time.monotonic()
            asyncio.run(load.run(requests(endpoint.names, options.number, options.seed), options.seed))
            seconds = time.monotonic() - begun
            problems = [*load.problems(), *endpoint.end(signal.SIGTERM)]
        print(json.dumps(load.told()), flush=True)
        for number in (signal.SIGINT, signal.SIGKILL):
            with Endpoint(folders, place) as endpoint:
                problems += endpoint.end(number)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(*problems[:50], sep="\n")
    print(json.dumps({"part": "load", "broken": len(problems), "seconds": round(seconds)}))
    if options.save:
        save_row("load", len(load.answers), len(problems), seconds)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
