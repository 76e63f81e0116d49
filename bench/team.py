"""How much faster a team builds than one process, stage by stage, and whether it builds the same.

    python -m bench.team [--spec profiles/english-medical-qa.yaml] [--members 1 2] [--documents 256] [--save]
    python -m bench.team --hosts    # as root: each member has a network namespace and a host name of its own

Each process computes in one thread. Nothing is evaluated. Seconds are those that pass, so the machine needs a free core
for each member. A base in bfloat16 rounds by the shapes of batches, which members cut in their own way: of units whose
scores are nearly equal, others may be kept. Weights are compared where the same units are kept, as they are stored: in
bfloat16, numbers that are next to each other differ by up to 0.008.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from expertprune.artifacts.expert import Expert

from .records import Table, made, save_table

ROOT = Path(__file__).parents[1]
PORT = 29517


@dataclass(frozen=True)
class Host:
    """A network namespace, which is one end of a cable.

    Attributes:
        name: of the namespace, of its interface, and of the host.
        address: in the network of both ends.
    """

    name: str
    address: str

    @property
    def command(self) -> list[str]:
        """What runs a command there."""
        inside = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", inside, "sh"]


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two network namespaces that reach each other by a cable, and nothing else."""
    hosts = [Host("expertprune-a", "10.213.7.1"), Host("expertprune-b", "10.213.7.2")]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        _ip("link", "add", first.name, "netns", first.name, "type", "veth", "peer", second.name, "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.name)
            _ip("-n", host.name, "link", "set", host.name, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def run_team(members: int, hosts: Sequence[Host], given: Sequence[str]) -> dict[str, Any]:
    """Build in so many processes, and return what the first one tells: seconds of stages."""
    processes = []
    for rank in range(members):
        host = hosts[rank] if hosts else None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(members), "MASTER_PORT": str(PORT)}
        environment |= {"MASTER_ADDR": hosts[0].address if hosts else "127.0.0.1"}
        if host is not None:
            environment["GLOO_SOCKET_IFNAME"] = host.name
        command = [*(host.command if host else []), sys.executable, "-m", "bench.team", "--member", *given]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0] for process in processes]
    if codes := [process.returncode for process in processes if process.returncode]:
        raise SystemExit(f"a member ended with {codes[0]}")
    found: dict[str, Any] = json.loads(told[0].splitlines()[-1])
    return found


def build_here(spec: str, folder: Path, documents: int) -> None:
    """This process' part of a build; the first member prints the seconds of each stage."""
    import expertprune
    from expertprune.engine.team import joined

    stages: dict[str, float] = {}

    @contextlib.contextmanager
    def track(stage: str, steps: int) -> Iterator[Any]:
        start = time.perf_counter()
        yield lambda: None
        name = stage.split()[0]
        stages[name] = stages.get(name, 0.0) + time.perf_counter() - start

    with joined() as team:
        overrides = {"evaluate.enabled": False, "calibration.documents": documents}
        expertprune.build(spec, folder / "expert", overrides, store=folder / "store", track=track)
        if team.leads:
            print(json.dumps(stages | {"both": sum(stages.values())}))


def compared(one: Path, other: Path) -> tuple[int, float]:
    """How many FFN neurons of an expert another one does not keep, and by how much their weights differ.

    Where layers keep the same neurons: the largest difference of a weight, over the largest weight of its tensor.
    """
    mine, theirs = ([set(layer.ffn) for layer in Expert.load(folder).plan.kept] for folder in (one, other))
    pairs = list(zip(mine, theirs, strict=True))
    apart = 0.0
    for file in sorted(one.glob("*.safetensors")):
        here, there = load_file(file), load_file(other / file.name)
        for name, weight in here.items():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            if layer is None or operator.eq(*pairs[int(layer[1])]):
                scale = weight.float().abs().max().clamp_min(1e-30)
                apart = max(apart, float((weight.float() - there[name].float()).abs().max() / scale))
    return sum(len(kept - others) for kept, others in pairs), apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="profiles/english-medical-qa.yaml")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=256, help="of each corpus")
    parser.add_argument("--hosts", action="store_true", help="two members in network namespaces of their own")
    parser.add_argument("--save", action="store_true", help="save the table in bench/results")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.member is not None:
        build_here(chosen.spec, chosen.member, chosen.documents)
        return
    columns = ["members", "profile (s)", "prune and repair (s)", "both (s)", "times as fast"]
    table = Table([*columns, "other units", "weights differ by"])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = stack.enter_context(two_hosts()) if chosen.hosts else []
        alone: dict[str, Any] = {}
        for members in chosen.members:
            place = folder / str(members)
            place.mkdir()
            settings = [str(place), "--spec", chosen.spec, "--documents", str(chosen.documents)]
            found = run_team(members, hosts if members > 1 else [], settings)
            alone = alone or found
            others, apart = compared(folder / str(chosen.members[0]) / "expert", place / "expert")
            table.add(
                str(members), f"{found['profile']:.1f}", f"{found['prune']:.1f}", f"{found['both']:.1f}",
                f"{alone['both'] / found['both']:.2f}", str(others), f"{apart:.1e}",
            )  # fmt: skip
            print(table, flush=True)
    where = "in network namespaces of their own" if chosen.hosts else "on one host"
    note = f"{Path(chosen.spec).stem}, {chosen.documents} documents a corpus; members of one thread, {where}."
    print(note)
    if chosen.save:
        save_table("team_hosts" if chosen.hosts else "team", table, made(), note)


if __name__ == "__main__":
    main()
