"""The whole way on real models: from a spec to an expert that transformers and vLLM run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.evaluation.harness import models, tasks
from expertprune.evaluation.suites import find_suite
from expertprune.files import to_json
from expertprune.models.loading import load_model, load_tokenizer
from tests.engines import Answer, by_transformers, by_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test builds the expert
SPEC = Path(__file__).parents[2] / "profiles" / "english-medical-qa.yaml"
CORPORA = Path(__file__).parents[2] / "corpora" / "task"
FEW = {"calibration.documents": 4, "calibration.max_tokens": 128, "evaluate.documents": 4, "evaluate.max_tokens": 128}
LAYERS = 30  # of SmolLM2
QUESTIONS = 24  # through the server
PROMPTS = [
    "The heart pumps blood",
    "Question: What does insulin do?\nAnswer:",
    "The judge ruled that",
    "To bake bread, you",
]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """An expert of the bundled SmolLM2 by the shipped spec, on less text and a fifth of its questions."""
    folder = tmp_path_factory.mktemp("experts")
    lines = (CORPORA / "qa.questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(lines[::5]), encoding="utf-8")
    texts = {"path": f"{CORPORA}/qa.calibration.jsonl", "evaluation": f"{CORPORA}/qa.evaluation.jsonl"}
    overrides = {**FEW, "corpora.sources": {"qa": {**texts, "questions": str(questions)}}}
    return expertprune.build(SPEC, folder / "english-medical-qa", overrides=overrides, store=real_store)


@pytest.fixture(scope="module")
def stock(expert: Path, tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """The same with one width for all layers, from the same profiles: a stock checkpoint."""
    overrides = {
        **FEW, "relevance.criterion": "impact", "compose.allocation": "uniform",
        "compensation": "none", "evaluate.enabled": False,
    }  # fmt: skip
    return expertprune.build(SPEC, tmp_path_factory.mktemp("stock") / "expert", overrides=overrides, store=real_store)


def test_the_expert_is_better_than_a_random_one(expert: Path, real_store: Path, tmp_path: Path) -> None:
    """Both repaired alike, so that only the choice of units differs."""
    about = expertprune.inspect(expert)
    assert about["parameters"] == {"before": 134_515_008, "after": 134_515_008 - LAYERS * 384 * 3 * 576}
    widths = about["plan"]["budget"]["ffn"]["kept"]
    assert sum(widths) == LAYERS * 1152
    assert len(set(widths)) > 3
    config = json.loads((expert / "config.json").read_text())
    single = {int(layer): own["intermediate_size"] for layer, own in config["per_layer_config"].items()}
    assert [single.get(layer, config["intermediate_size"]) for layer in range(LAYERS)] == widths
    found = {name: each["metrics"]["bits_per_byte"] for name, each in about["evaluation"]["corpora"].items()}
    assert set(found) == {"language/en", "domain/medical", "task/qa", "general/general"}
    for numbers in found.values():
        assert 0.8 < numbers["retention"] <= 1.02
        assert numbers["low"] <= numbers["retention"] <= numbers["high"]
    answered = about["evaluation"]["corpora"]["task/qa"]["metrics"]["questions"]
    assert answered["examples"] == 24
    assert answered["base"] > 0.25 + 2 * math.sqrt(0.25 * 0.75 / 24)  # two deviations above what guessing gets
    overrides: dict[str, Any] = {**FEW, "relevance.criterion": "random", "evaluate.metrics": ["bits_per_byte"]}
    overrides["evaluate.corpora"] = ["medical", "general"]
    other = expertprune.inspect(expertprune.build(SPEC, tmp_path / "random", overrides, store=real_store))
    for name, result in other["evaluation"]["corpora"].items():
        random = result["metrics"]["bits_per_byte"]["expert"]
        print(f"{name}, bits per byte: {found[name]['expert']:.4f}, of random units {random:.4f}")
        assert found[name]["expert"] < random


def test_a_local_suite_on_both_models(expert: Path, real_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = Path(shutil.copytree(expert, tmp_path / "expert"))
    found = expertprune.evaluate_suites(folder, ["medical"], limit=12, store=real_store).document()
    assert expertprune.inspect(folder)["evaluation"] == json.loads(to_json(found))
    assert found["tasks"]["medical_questions"]["examples"] == 12
    assert found["tasks"]["medical_continuation"]["base"] > 0.5  # twice what guessing gets
    summary = {measure: average["metrics"] for measure, average in found["summary"]["expert"].items()}
    accuracy = ["medical_continuation", "medical_questions"]
    assert summary == {"bits": ["domain/medical bits_per_byte"], "accuracy": accuracy}
    layers = found["alignment"]["domain medical"]["layers"]
    assert len(layers) == LAYERS
    assert all(0.3 < value < 1 + 1e-6 for value in layers)  # 1 before the first layer that lost anything
    assert layers[-1] < 1


@pytest.mark.vllm
def test_questions_through_the_server_are_answered_as_transformers_does(
    expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("lm_eval", "tenacity", "vllm"):
        pytest.importorskip(package)
    from expertprune.serving.server import Server

    entry = find_suite("qa").tasks[1]
    assert entry.label == "shipped_questions"
    task = tasks.load_task(entry, generates=False, limit=QUESTIONS)
    tokenizer = load_tokenizer(expert)
    running = models.running_model(load_model(expert, torch.float32), tokenizer)
    expected = tasks.run_task(task, running, limit=QUESTIONS)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process that imports vLLM
    arguments = ["--dtype=float32", "--max-model-len=1024", "--kv-cache-memory-bytes=268435456"]
    with Server(expert, model_name="expert", arguments=arguments) as server:
        found = tasks.run_task(task, models.served_model(expert, server.url, "expert", tokenizer), limit=QUESTIONS)
    assert found.examples == expected.examples
    assert len(found.values) == QUESTIONS
    assert (found.values != expected.values).sum() <= 1  # two choices within rounding of each other
    assert 0.3 < found.values.mean() < 0.9


@pytest.fixture(scope="module")
def answers(stock: Path, expert: Path) -> list[tuple[Answer, Answer]]:
    """By vLLM and by transformers, of the stock checkpoint in float32 and of the expert in bfloat16."""
    pytest.importorskip("vllm")
    checkpoints = (stock, "float32"), (expert, "bfloat16")
    return list(zip(by_vllm(*checkpoints, PROMPTS), by_transformers(checkpoints, PROMPTS), strict=True))


@pytest.mark.vllm
def test_a_stock_checkpoint_needs_nothing_of_ours_in_float32(answers: list[tuple[Answer, Answer]]) -> None:
    found, expected = answers[0]
    assert found.tokens == expected.tokens


@pytest.mark.vllm
def test_transformers_and_vllm_begin_the_same_in_bfloat16(answers: list[tuple[Answer, Answer]]) -> None:
    """Widths of single layers: by the folder's own code in transformers, by the plugin in vLLM.

    Wherever two continuations part, bfloat16 cannot tell two tokens apart: logits between 16 and 32 lie 1/8 apart, and of
    `L` layers with two sums each, rounded by up to half a step, a logit deviates by `sqrt(2 L / 12)` steps. A difference of
    at most two deviations is none. At least half of the prompts begin with the same four tokens.
    """
    found, expected = answers[1]
    assert sum(a[:4] == b[:4] for a, b in zip(found.tokens, expected.tokens, strict=True)) >= len(PROMPTS) / 2
    for mine, theirs, steps in zip(found.tokens, expected.tokens, expected.logits, strict=True):
        parting = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if parting is not None:
            first, second = steps[parting]
            spacing = 2.0 ** (math.floor(math.log2(abs(first))) - 7)
            assert first - second <= 2 * math.sqrt(2 * LAYERS / 12) * spacing
