"""The whole way on a real model: from a spec to an expert that transformers and vLLM run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Question
from expertprune.evaluation.harness import models, tasks
from expertprune.evaluation.questions import answer_questions
from expertprune.evaluation.suites import find_suite
from expertprune.files import shipped, to_json
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.reporting.tables import retention_table
from tests.engines import ALONE, TRANSFORMERS, VLLM, run_script
from tests.tiny import as_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test builds the expert
SPEC = Path(__file__).parents[2] / "profiles" / "english-medical-qa.yaml"
FEW = {"calibration.documents": 10}
LAYERS = 30  # of SmolLM2
PROMPTS = [
    "The heart pumps blood",
    "Question: What does insulin do?\nAnswer:",
    "The judge ruled that",
    "To bake bread, you",
]


@pytest.fixture(scope="session")
def expert(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """An expert of the bundled SmolLM2 by the shipped spec, on less text."""
    folder = tmp_path_factory.mktemp("experts") / "english-medical-qa"
    return expertprune.build(SPEC, folder, overrides=FEW, store=real_store)


@pytest.fixture(scope="session")
def stock(expert: Path, tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """The same with one width for all layers, from the same profiles: a stock checkpoint."""
    overrides = {
        **FEW, "relevance.criterion": "impact", "compose.allocation": "uniform",
        "compensation": "none", "evaluate.enabled": False,
    }  # fmt: skip
    return expertprune.build(SPEC, tmp_path_factory.mktemp("stock") / "expert", overrides=overrides, store=real_store)


def bits(folder: Path) -> dict[str, float]:
    corpora = expertprune.inspect(folder)["evaluation"]["corpora"]
    return {name: result["metrics"]["bits_per_byte"]["expert"] for name, result in corpora.items()}


def test_the_default_beats_random_and_magnitude(
    expert: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three repaired alike, so that only the choice of units differs."""
    found = {"default": bits(expert)}
    for criterion in ("random", "magnitude"):
        overrides: dict[str, Any] = {
            **FEW,
            "relevance.criterion": criterion,
            "evaluate.corpora": ["medical", "general"],
            "evaluate.metrics": ["bits_per_byte"],
        }
        found[criterion] = bits(expertprune.build(SPEC, tmp_path / criterion, overrides=overrides, store=real_store))
    for corpus in ("domain/medical", "general/general"):
        values = {criterion: round(by_corpus[corpus], 4) for criterion, by_corpus in found.items()}
        with capsys.disabled():  # the figures belong in the log of a run that passes, too
            print(f"\n{corpus}, bits per byte: {values}")
        assert values["default"] < values["random"]
        assert values["default"] < values["magnitude"]


def test_the_expert_is_smaller_and_evaluated(expert: Path) -> None:
    about = expertprune.inspect(expert)
    assert about["parameters"] == {"before": 134_515_008, "after": 134_515_008 - 30 * 384 * 3 * 576}
    widths = about["plan"]["budget"]["ffn"]["kept"]
    assert sum(widths) == 30 * 1152
    assert len(set(widths)) > 3
    config = json.loads((expert / "config.json").read_text())
    single = {int(layer): own["intermediate_size"] for layer, own in config["per_layer_config"].items()}
    assert [single.get(layer, config["intermediate_size"]) for layer in range(30)] == widths
    assert set(about["evaluation"]["corpora"]) == {"language/en", "domain/medical", "task/qa", "general/general"}
    for result in about["evaluation"]["corpora"].values():
        numbers = result["metrics"]["bits_per_byte"]
        assert 0.8 < numbers["retention"] <= 1.02
        assert numbers["low"] <= numbers["retention"] <= numbers["high"]
    assert retention_table(Evaluation.from_document(about["evaluation"])).row_count > 4


def test_a_local_suite_on_both_models(expert: Path, real_store: Path, tmp_path: Path) -> None:
    """Of its questions, ours are asked by `answer_questions` too: by the byte, and the texts are ASCII."""
    pytest.importorskip("lm_eval")
    folder = Path(shutil.copytree(expert, tmp_path / "expert"))
    found = expertprune.evaluate_suites(folder, ["medical"], limit=12, store=real_store).document()
    assert expertprune.inspect(folder)["evaluation"] == json.loads(to_json(found))
    rows = (shipped("profiles") / "suites" / "data" / "medical.questions.jsonl").read_text().splitlines()[:12]
    questions = [Question(row["question"], tuple(row["choices"]), row["answer"]) for row in map(json.loads, rows)]
    base = Expert.load(folder).find_base(real_store).folder
    mine, theirs = (
        answer_questions(as_run(load_model(each, torch.float32)), load_tokenizer(each), questions)
        for each in (base, folder)
    )
    entry = found["tasks"]["medical_questions"]
    assert (entry["base"], entry["expert"]) == pytest.approx((mine.mean(), theirs.mean()), abs=1 / 12)
    assert entry["examples"] == 12
    assert found["tasks"]["medical_continuation"]["base"] > 0.5  # twice what guessing gets
    summary = {measure: average["metrics"] for measure, average in found["summary"]["expert"].items()}
    assert summary == {
        "bits": ["domain/medical bits_per_byte"], "accuracy": ["medical_continuation", "medical_questions"]
    }  # fmt: skip
    layers = found["alignment"]["domain medical"]["layers"]
    assert len(layers) == LAYERS
    assert all(0.3 < value < 1 + 1e-6 for value in layers)  # 1 before the first layer that lost anything
    assert layers[-1] < 1


@pytest.mark.vllm
def test_fifty_questions_through_the_server_are_answered_as_transformers_does(expert: Path) -> None:
    for package in ("lm_eval", "tenacity", "vllm"):
        pytest.importorskip(package)
    from expertprune.serving.server import Server

    entry = find_suite("qa").tasks[1]
    assert entry.label == "shipped_questions"
    task = tasks.load_task(entry, generates=False, limit=50)
    tokenizer = load_tokenizer(expert)
    running = models.running_model(load_model(expert, torch.float32), tokenizer)
    expected = tasks.run_task(task, running, limit=50)
    with Server(expert, model_name="expert", arguments=["--dtype=float32", "--max-model-len=1024"]) as server:
        found = tasks.run_task(task, models.served_model(expert, server.url, "expert", tokenizer), limit=50)
    assert found.examples == expected.examples
    assert len(found.values) == 50
    assert (found.values != expected.values).sum() <= 1  # two choices within rounding of each other
    assert 0.3 < found.values.mean() < 0.9


@pytest.mark.vllm
def test_a_stock_checkpoint_needs_nothing_of_ours_and_generates_the_same_in_float32(
    stock: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    expected = run_script(ALONE + TRANSFORMERS, stock, "float32", tmp_path, PROMPTS)
    assert run_script(ALONE + VLLM, stock, "float32", tmp_path, PROMPTS) == expected


@pytest.mark.vllm
def test_transformers_and_vllm_begin_the_same_in_bfloat16(expert: Path, tmp_path: Path) -> None:
    """Widths of single layers: by the folder's own code in transformers, by the plugin in vLLM.

    Wherever two continuations part, bfloat16 cannot tell two tokens apart. At least half of the prompts begin with the
    same four tokens: how many do depends on the expert, whose likeliest tokens may be one step of bfloat16 apart.

    bfloat16 has 8 significant bits, so logits between 16 and 32 lie 1/8 apart. Two blocks a layer add to the stream, and
    each sum is rounded by up to half a step: a variance of 1/12. So a logit of `L` layers has a deviation of
    `sqrt(2 L / 12)` steps, and a difference of at most two deviations is no difference.
    """
    pytest.importorskip("vllm")
    expected = run_script(ALONE + TRANSFORMERS, expert, "bfloat16", tmp_path, PROMPTS)
    logits = run_script(ALONE + TRANSFORMERS, expert, "bfloat16", tmp_path, PROMPTS, what="LOGITS")
    found = run_script(VLLM, expert, "bfloat16", tmp_path, PROMPTS)
    assert sum(a[:4] == b[:4] for a, b in zip(found, expected, strict=True)) >= len(PROMPTS) / 2
    for mine, theirs, steps in zip(found, expected, logits, strict=True):
        parting = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if parting is not None:
            first, second = steps[parting]
            spacing = 2.0 ** (math.floor(math.log2(abs(first))) - 7)
            assert first - second <= 2 * math.sqrt(2 * LAYERS / 12) * spacing
