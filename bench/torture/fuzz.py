"""Inputs made hostile: mutated specs, plans, experts, tokenizers, configs, GGUF files, corpora and suites."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.torture.children import run
from bench.torture.workplace import Workplace

SECONDS, MEGABYTES = 5.0, 500.0  # that a refusal may take, the memory above that of a command which does nothing

PLACE = b"@PLACE@"  # stands for the workplace in inputs that are kept

# What stands in places where nobody expects it.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**23, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "a", "nan",
    "\x1b[2J", "\0", "~nosuchuser", "../../..", "/dev/zero", "n" * 300, "ä" * 200, "\ud800", "0-999999999999", "{a:>9}",
    "{", "<script>", [], {}, [[]], [None], {"": {}}, {"a": 1}, ["a", 1, None], "de", "2024-13-45", "=", "!!int abc",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of input: the file that is mutated, how it is read and written, and the commands that read it.

    Attributes:
        data: whether the file is mutated as data; else as bytes.
    """

    name: str
    file: Path
    commands: list[list[str]]
    data: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = json.dumps


def kinds(place: Workplace, begin: Path) -> list[Kind]:
    """All kinds, over a plan, an expert and a base in the workplace, which may be damaged, and an export in `begin`."""
    folder, out = place.folder, str(place.out.parent / "made")
    plan, suite, gguf = folder / "plan.json", folder / "suite.yaml", folder / "model.gguf"
    expert, corpus = place.out, folder / "medical.path.jsonl"
    questions = [{"question": "w1 w2", "choices": ["w3", "w4"], "answer": 0}] * 4
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {
        "task": "choose", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    suite.write_text(yaml.safe_dump({"name": "mine", "perplexity": {}, "tasks": [{"file": "task.yaml"}]}))
    shutil.copy(begin / "expert.gguf", gguf)
    spec_of_gguf = folder / "gguf.yaml"
    spec_of_gguf.write_text(yaml.safe_dump({**yaml.safe_load(place.spec.read_text()), "base": str(gguf)}))
    check, base = ["validate", str(place.spec)], folder / "base"
    evaluated = ["evaluate", str(expert)]
    return [
        Kind("spec", place.spec, [check], yaml.safe_load, yaml.safe_dump),
        Kind("spec-text", place.spec, [check]),
        Kind("plan", plan, [["prune", str(plan), "--out", out], ["inspect", str(plan)]], json.loads),
        Kind(
            "expert",
            expert / "expertprune.json",
            [["inspect", str(expert)], ["report", str(expert)], evaluated],
            json.loads,
        ),
        Kind("weights", sorted(expert.glob("*.safetensors"))[0], [evaluated]),
        Kind("config", base / "config.json", [check], json.loads),
        Kind("generation", base / "generation_config.json", [check], json.loads),
        Kind("tokenizer", base / "tokenizer.json", [check], json.loads),
        Kind("tokenizer-config", base / "tokenizer_config.json", [check], json.loads),
        Kind("index", base / "model.safetensors.index.json", [check], json.loads),
        Kind("shard", sorted(base.glob("*.safetensors"))[0], [check]),
        Kind("gguf", gguf, [["validate", str(spec_of_gguf)]]),
        Kind("corpus", corpus, [check], _rows, _lines),
        Kind("corpus-text", corpus, [check]),
        Kind("suite", suite, [[*evaluated, "--suite", str(suite)]], yaml.safe_load, yaml.safe_dump),
        Kind("task", folder / "task.yaml", [[*evaluated, "--suite", str(suite)]], yaml.safe_load, yaml.safe_dump),
    ]


def _rows(text: str) -> Any:
    return [json.loads(line) for line in text.splitlines()]


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


# --- mutations --------------------------------------------------------------------------------------------------------


def mutated(data: Any, chance: random.Random) -> Any:
    """Plain data with one to three places changed: another value, a key gone or new, a piece of another place."""
    data = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return chance.choice(VALUES)
        inside, key = chance.choice(places)
        way = chance.random()
        if way < 0.6:
            inside[key] = copy.deepcopy(chance.choice(VALUES))
        elif way < 0.75:
            del inside[key]
        elif way < 0.85:
            other, name = chance.choice(places)
            inside[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name : name + 1])
        elif isinstance(inside, dict):
            inside[chance.choice(["x", "", "0", "text", "<<", "\ud800"])] = copy.deepcopy(chance.choice(VALUES))
        else:
            inside += copy.deepcopy(inside)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    todo = [data]
    while todo:
        here = todo.pop()
        if isinstance(here, dict | list):
            for key, value in list(here.items() if isinstance(here, dict) else enumerate(here)):
                yield here, key
                todo.append(value)


def garbled(content: bytes, chance: random.Random) -> bytes:
    """Bytes with pieces changed, gone, doubled or cut off. The head, where formats say what follows, is hit most."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        end = max(1, len(changed))
        at = chance.randrange(min(end, 2048)) if chance.random() < 0.7 else chance.randrange(end)
        length = chance.choice((1, 1, 4, 8, 64))
        way = chance.randrange(6)
        if way == 0:
            changed[at : at + length] = chance.randbytes(length)
        elif way == 1:
            changed[at : at + length] = b"\xff" * length
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 100))
        elif way == 4:
            del changed[at:]
        else:
            changed[at:at] = chance.choice(
                (b"[" * 3000, b"{", b'"', b"\0", b"&a [*a]", b"!!python/name:os.system ", b"9" * 5000)
            )
    return bytes(changed)


def hostile(kind: Kind, original: bytes, chance: random.Random) -> bytes:
    """A mutated file of a kind."""
    if kind.data is None or chance.random() < 0.1:
        return garbled(original, chance)
    changed = mutated(kind.data(original.decode()), chance)
    try:
        return kind.write(changed).encode(errors="surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return garbled(original, chance)


# --- trials -----------------------------------------------------------------------------------------------------------


def fuzz(place: Workplace, begin: Path, number: int, seed: int, keep: Path | None) -> Iterator[tuple[str, list[str]]]:
    """One hostile input at a time, and the commands that read it."""
    chance = random.Random(seed)
    everything = kinds(place, begin)
    idle = run(["--help"], place.store, place.temporary)
    for count in range(number):
        kind = everything[count % len(everything)]
        original = kind.file.read_bytes()
        content = hostile(kind, original, chance)
        problems = []
        for command in kind.commands:
            kind.file.write_bytes(content)
            before = _listing(place)
            done = run(command, place.store, place.temporary)
            if not done.clean:
                problems.append(f"{command[0]} exits with {done.code}: {done.output[-500:]}")
            if done.code == 2 and done.seconds > SECONDS:
                problems.append(f"{command[0]} takes {done.seconds:.1f} s")
            if done.megabytes > idle.megabytes + MEGABYTES:
                problems.append(f"{command[0]} takes {done.megabytes - idle.megabytes:.0f} MB")
            problems += [f"{command[0]} writes {path}" for path in _listing(place) - before]
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


def _listing(place: Workplace) -> set[str]:
    """Everything beside the store, temporary files and outputs."""
    mine = (place.store, place.temporary, place.out, place.out.parent / "made")
    return {str(path) for path in place.folder.rglob("*") if not any(path.is_relative_to(each) for each in mine)}
