"""What a model is asked to write, and how long."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertprune.errors import ServingError
from expertprune.serving import engine, generation
from expertprune.serving.generation import Job, Sample, generate, samples

JOB = Job("folder", prompts=[[1, 2], [3]], tokens=14, whole=False, length=10, temperature=0.7, seed=3)


class Model:
    """Takes the place of `vllm.LLM`; the second text of each round does not end."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons or ("stop", "length")
        self.rounds: list[Any] = []

    def generate(self, prompts: Any, settings: Any, use_tqdm: bool) -> list[Any]:
        self.rounds.append(settings)
        assert [each["prompt_token_ids"] for each in prompts] == JOB.prompts
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=f"text {i}", token_ids=range(4), finish_reason=reason)])
            for i, reason in enumerate(self.reasons)
        ]

    def asked(self, name: str) -> list[Any]:
        """One setting of every request."""
        return [getattr(each, name) for settings in self.rounds for each in settings]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))  # type: ignore[arg-type]


def test_rounds_follow_each_other_until_there_are_enough_tokens() -> None:
    model, again, other = Model(), Model(), Model()
    written = list(samples(model, JOB))
    # 8 tokens a round, 14 are wanted
    assert written == [Sample(0, "text 0", 4, True), Sample(1, "text 1", 4, False)] * 2
    assert model.asked("max_tokens") == [8, 9] * 2
    assert set(model.asked("temperature")) == {0.7}
    assert set(model.asked("skip_special_tokens")) == set(model.asked("spaces_between_special_tokens")) == {True}
    seeds = model.asked("seed")
    assert len(set(seeds)) == 4
    list(samples(again, JOB))
    assert again.asked("seed") == seeds
    list(samples(other, replace(JOB, seed=4)))
    assert not set(other.asked("seed")) & set(seeds)


def test_whole_answers_count_and_keep_special_tokens_and_greedy_ones_are_written_once() -> None:
    model = Model()
    assert len(list(samples(model, replace(JOB, whole=True)))) == 8  # 4 tokens a round
    # special tokens such as those around thoughts
    assert set(model.asked("skip_special_tokens")) == set(model.asked("spaces_between_special_tokens")) == {False}
    assert len(list(samples(Model(), replace(JOB, temperature=0.0)))) == 2
    # no second round where nothing comes to an end
    assert len(list(samples(Model("length", "length"), replace(JOB, whole=True)))) == 2


def test_a_process_that_fails_shows_the_end_of_its_log(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_vllm: None
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ServingError, match=r"generation ended \(exit code 1\); (?s:.*)\(the log is empty\)$"):
        generate(replace(JOB, folder=str(tiny_llama)), tmp_path / "log")


@pytest.mark.parametrize(
    ("gain", "accelerator", "dtype"), [(0.2, False, "float32"), (1.0, False, None), (0.2, True, None)]
)
def test_float32_where_a_cpu_multiplies_bfloat16_slowly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gain: float, accelerator: bool, dtype: str | None
) -> None:
    monkeypatch.setattr(generation, "bfloat16_gain", lambda: gain)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(engine, "load_engine", lambda folder, **settings: started.append(settings) or Model())
    asked, written = tmp_path / "job.json", tmp_path / "samples.jsonl"
    asked.write_text(json.dumps(asdict(JOB)))
    generation.main(str(asked), str(written))
    whole = {} if accelerator else {"enable_chunked_prefill": False}
    assert started == [{"max_model_len": JOB.length} | whole | ({"dtype": dtype} if dtype else {})]
    assert len(written.read_text().splitlines()) == 4
