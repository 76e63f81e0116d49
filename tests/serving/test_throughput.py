"""Throughput: what is read for a token, what is compared with what, and the file that says so; no vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.artifacts.timing import METRICS, Load, Ratio, Role, Run, Timing
from expertprune.errors import CheckpointError, ServingError, UsageError
from expertprune.models.checkpoint import Checkpoint
from expertprune.reporting.pictures import throughput_picture
from expertprune.serving import engine, throughput
from expertprune.serving.throughput import bytes_per_token
from tests.calling import call
from tests.patching import read_only
from tests.tiny import WORDS, save_tiny

# In place of vLLM's benchmark: notes how it was called, and writes a result of which the model's name decides the speed.
CLIENT = """
import json, os, sys
from pathlib import Path
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if "=" in argument)
out = Path(options["result-dir"])
speed = {"base": 100.0, "expert": 150.0}[options["model"]]
prompts = [json.loads(line)["prompt"] for line in Path(options["dataset-path"]).read_text().splitlines()]
with Path(NOTES).open("a") as notes:
    notes.write(json.dumps({"options": options, "flags": [a for a in sys.argv if "=" not in a], "prompts": prompts,
                            "key": os.environ.get("OPENAI_API_KEY")}) + "\\n")
count = int(options["num-prompts"])
if FAILS: print("connection refused"); sys.exit(1)
(out / options["result-filename"]).write_text(json.dumps({
    "completed": COMPLETED if COMPLETED is not None else count, "output_throughput": speed, "median_ttft_ms": 2000 / speed,
    "median_tpot_ms": 1000 / speed, "total_input_tokens": 7, "total_output_tokens": 8, "duration": 9.0}))
"""


def test_every_weight_is_read_once_but_the_looked_up_embedding(tmp_path: Path) -> None:
    """A tiny model: hidden 24, FFN 32, 6 query and 3 KV heads of 4, 3 layers, vocabulary 64, float32, its own head."""
    attention = (6 * 4 + 3 * 4 + 3 * 4 + 6 * 4) * 24
    layer = attention + 3 * 32 * 24 + 2 * 24
    parameters = 3 * layer + 24 + 64 * 24  # the last norm, the head; not the embedding
    assert bytes_per_token(Checkpoint(save_tiny(tmp_path / "untied"))) == 4 * parameters
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert bytes_per_token(Checkpoint(tied)) == 4 * parameters  # the embedding is the head


def run(model: Role, speed: float, cache: int | None, read: int) -> Run:
    return Run(
        model=model,
        round=1,
        output_tokens_per_second=speed,
        time_to_first_token_ms=1000 / speed,
        time_per_output_token_ms=100 / speed,
        kv_cache_tokens=cache,
        memory_bytes=8 * read,
        load_seconds=10.0,
        bytes_per_token=read,
        input_tokens=7,
        output_tokens=8,
        seconds=9.0,
    )


def timing(runs: list[Run]) -> Timing:
    names: dict[Role, str] = {"base": "llama", "expert": "qa"}
    load = Load(rounds=len(runs) // 2)
    return Timing.of(runs, load=load, arguments=[], names=names, machine="a machine", versions={})


def test_ratios_are_taken_pair_by_pair() -> None:
    """The machine slows down from round to round; 1.5, 1.2 and 1.8 are the ratios of neighbours."""
    speeds = [(100, 150), (50, 60), (10, 18)]
    runs = [row for base, expert in speeds for row in (run("base", base, 64, 600), run("expert", expert, 96, 400))]
    result = timing(runs)
    assert vars(result.ratios["output_tokens_per_second"]) == pytest.approx({"median": 1.5, "low": 1.2, "high": 1.8})
    assert result.ratios["kv_cache_tokens"] == Ratio(median=1.5, low=1.5, high=1.5)
    assert result.limit == 1.5


def test_a_metric_that_was_not_to_be_had_has_no_ratio(tmp_path: Path) -> None:
    result = timing([run("base", 1, None, 2), run("expert", 1, 5, 1)])
    assert result.models["base"].kv_cache_tokens is None
    assert set(result.ratios) == set(METRICS) - {"kv_cache_tokens"}
    throughput_picture(result, tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert all((label in drawn) is (metric in result.ratios) for metric, (label, _) in METRICS.items())
    assert "limit 2.00" in drawn


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_vllm: None) -> Callable[..., Any]:
    """Puts the client above in place; returns how it was called.

    The shipped text is in words of the tiny tokenizer, of which no two stretches of 12 are the same.
    """
    notes = tmp_path / "notes"
    words = [WORDS[(number * number // 7 + number) % len(WORDS)] for number in range(400)]
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "general.evaluation.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    monkeypatch.setattr(throughput, "shipped", lambda folder: tmp_path)
    monkeypatch.setattr(throughput, "_cache_tokens", lambda server: 1000)

    def put(completed: int | None = None, fails: bool = False) -> Callable[[], Any]:
        head = f"NOTES, COMPLETED, FAILS = {str(notes)!r}, {completed}, {fails}\n"
        monkeypatch.setattr(throughput, "_CLIENT", head + CLIENT)
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()]

    return put


@pytest.mark.slow
def test_both_are_measured_in_turn_on_the_same_prompts(
    tmp_path: Path, client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command. The cache is what the larger weights leave: of 4 GiB, 3.6 may be taken; the processes take 2."""
    calls = client()
    base = save_tiny(tmp_path / "llama", dtype=torch.bfloat16)
    narrow, picture = save_tiny(tmp_path / "narrow", dtype=torch.bfloat16, intermediate_size=16), tmp_path / "speed.svg"
    monkeypatch.setattr(throughput, "machine", lambda: "a machine")
    monkeypatch.setattr(engine, "free_memory", lambda: 4 * 2**30)
    load = Load(prompts=5, input_tokens=12, output_tokens=3, concurrency=2, rounds=2)
    options = [f"--{name.replace('_', '-')}={getattr(load, name)}" for name in load.model_fields_set]
    given = ["--dtype=float32", "--api-key", "secret", "8", "--max-num-seqs=8", "--api_key=another"]
    table = call("bench", narrow, "--against", base, *options, "--picture", picture, "--", *given).stdout
    assert all(text in table for text in ("output tokens per second", "1.500", "of the limit"))
    assert "limit" in picture.read_text()
    written = narrow / "throughput-llama.json"
    result = Timing.read(written)
    assert not (narrow / "throughput.json").exists()  # that one compares with the base
    assert str(tmp_path) not in written.read_text(), "nothing of this machine's folders"
    assert "another" not in written.read_text()
    assert [f"{row.model} {row.round}" for row in result.runs] == ["base 1", "expert 1", "base 2", "expert 2"]
    assert result.ratios["output_tokens_per_second"].median == 1.5
    assert result.names == {"base": "llama", "expert": "narrow"}
    assert result.limit == bytes_per_token(Checkpoint(base)) / bytes_per_token(Checkpoint(narrow))
    assert all(row.memory_bytes is not None and row.memory_bytes > 2**20 for row in result.runs)
    cache = int(4 * 2**30 * 0.9) - 2 * 2**30 - 2 * engine.check_folder(base).weight_bytes
    own = ["--no-enable-prefix-caching", f"--kv-cache-memory-bytes={cache}"]
    shown = ["--dtype=float32", "--api-key", "***", "***", "--max-num-seqs=8", "--api_key=***"]
    assert result.arguments == [*own, *shown]
    assert result.load == load

    called = calls()
    assert [call["options"]["model"] for call in called] == ["base", "expert", "base", "expert"]
    prompts = called[0]["prompts"]
    assert len(set(prompts)) == 5
    assert [len(prompt.split()) for prompt in prompts] == [12] * 5
    expected = {"custom-output-len": "3", "max-concurrency": "2", "temperature": "0"}
    for each in called:
        assert each["prompts"] == prompts
        assert each["key"] == "secret"
        assert {"--ignore-eos", "--disable-shuffle", "--skip-chat-template"} <= set(each["flags"])
        assert each["options"].items() >= expected.items()


def test_a_run_that_is_not_whole_is_an_error_and_writes_nothing(
    tmp_path: Path, tiny_llama: Path, client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where logs are kept
    folder = save_tiny(tmp_path / "expert")
    before = sorted(folder.iterdir())
    failures = ({"completed": 4}, {"fails": True})
    load = Load(prompts=5, input_tokens=12, rounds=1)
    for failure, said in zip(failures, ("answered 4 of 5", "(?s)of base failed.*connection refused"), strict=True):
        client(**failure)
        with pytest.raises(ServingError, match=said):
            expertprune.bench(folder, against=tiny_llama, load=load)
        assert sorted(folder.iterdir()) == before
    with pytest.raises(ServingError, match="exit code 3") as died:
        expertprune.bench(folder, against=tiny_llama, load=load, arguments=["--behaviour=die"])
    log = Path(str(died.value).partition("its log, ")[2].partition(":")[0])
    assert "no room for the weights" in log.read_text(), "the log that is named is there to be read"


def test_what_cannot_be_measured_or_written_is_refused_before_anything_starts(
    tmp_path: Path, tiny_llama: Path, fake_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan names a model leads to no other folder."""
    check = engine.check_folder
    monkeypatch.setattr(engine, "check_folder", lambda folder: replace(check(folder), name="../../other/thesis"))
    monkeypatch.setattr(throughput, "Server", None)
    for wrong in ([], [tiny_llama, tiny_llama], [tiny_llama, "--base", "x", "--against", "y"]):
        call("bench", *wrong, code=2)
    with pytest.raises(CheckpointError, match="is no expert"):
        expertprune.bench(tiny_llama)
    with pytest.raises(UsageError, match="takes 128 tokens at a time, not 100 and 29"):
        expertprune.bench(tiny_llama, against=tiny_llama, load=Load(input_tokens=100, output_tokens=29))
    expert = save_tiny(tmp_path / "expert")
    there = expert / "throughput-..-..-other-thesis.json"
    there.write_text("precious")
    with pytest.raises(CheckpointError, match=f"{there}: is no timing"):
        expertprune.bench(expert, against=tiny_llama)
    assert there.read_text() == "precious"
    there.unlink()
    read_only(monkeypatch, expert)
    with pytest.raises(CheckpointError, match=f"{there}: cannot be written: Read-only file system"):
        expertprune.bench(expert, against=tiny_llama)
