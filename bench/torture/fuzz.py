"""Inputs made hostile: mutated specs, plans, experts, tokenizers, configs, GGUF files, corpora and suites."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from bench.torture.children import run
from bench.torture.inputs import Kind, kinds
from bench.torture.mutations import garbled, mutated
from bench.torture.workplace import Workplace

SECONDS, MEGABYTES = 5.0, 500.0  # that a refusal may take, the memory above that of a command which does nothing

PLACE = b"@PLACE@"  # stands for the workplace in inputs that are kept


def hostile(kind: Kind, original: bytes, chance: random.Random) -> bytes:
    """A mutated file of a kind."""
    if kind.data is None or chance.random() < 0.1:
        return garbled(original, chance)
    changed = mutated(kind.data(original.decode()), chance)
    try:
        return kind.write(changed).encode(errors="surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return garbled(original, chance)


def fuzz(
    place: Workplace, begin: Path, number: int | None, seed: int, keep: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """One hostile input at a time, and the commands that read it."""
    chance = random.Random(seed)
    groups: dict[str, list[Kind]] = {}
    for each in kinds(place, begin):
        groups.setdefault(each.group or each.name, []).append(each)
    turns = list(groups.values())
    idle = run(["--help"], place.store, place.temporary)
    for count in range(10_000 if number is None else number):
        turn = turns[count % len(turns)]
        kind = turn[count // len(turns) % len(turn)]
        original = kind.file.read_bytes()
        content = hostile(kind, original, chance)
        problems = []
        for command in kind.commands:
            kind.file.write_bytes(content)
            before = listing(place)
            done = run(command, place.store, place.temporary)
            if not done.clean:
                problems.append(f"{command[0]} exits with {done.code}: {done.output[-500:]}")
            if done.code == 2 and done.busy > SECONDS:
                problems.append(f"{command[0]} takes {done.busy:.1f} s")
            if done.megabytes > idle.megabytes + MEGABYTES:
                problems.append(f"{command[0]} takes {done.megabytes - idle.megabytes:.0f} MB")
            problems += [f"{command[0]} writes {path}" for path in listing(place) - before]
            if command[0] in ("report", "evaluate"):
                shutil.rmtree(place.out)
                shutil.copytree(begin / "expert", place.out)
            shutil.rmtree(place.out.parent / "made", ignore_errors=True)
        kind.file.write_bytes(original)
        name = f"{kind.name}-{hashlib.sha256(content).hexdigest()[:12]}"
        if problems and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / name).write_bytes(content.replace(str(place.folder).encode(), PLACE))
        yield name, problems


def listing(place: Workplace) -> set[str]:
    """Everything beside the store, temporary files and outputs."""
    mine = (place.store, place.temporary, place.out, place.out.parent / "made")
    return {str(path) for path in place.folder.rglob("*") if not any(path.is_relative_to(each) for each in mine)}
