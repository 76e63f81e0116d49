"""Throughput: what is read for a token, what is compared with what, and the file that says so; no vLLM."""

from __future__ import annotations

import json
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
    assert result.models["base"].output_tokens_per_second == 50
    assert result.models["expert"].output_tokens_per_second == 60
    assert vars(result.ratios["output_tokens_per_second"]) == pytest.approx({"median": 1.5, "low": 1.2, "high": 1.8})
    first = {"median": 2 / 3, "low": 1 / 1.8, "high": 1 / 1.2}
    assert vars(result.ratios["time_to_first_token_ms"]) == pytest.approx(first)
    assert result.ratios["kv_cache_tokens"] == Ratio(median=1.5, low=1.5, high=1.5)
    assert result.limit == 1.5
    assert result.runs == runs
    assert result.models["expert"].model_fields_set == set(METRICS)


def test_a_metric_that_was_not_to_be_had_has_no_ratio(tmp_path: Path) -> None:
    result = timing([run("base", 1, None, 2), run("expert", 1, 5, 1)])
    assert result.models["base"].kv_cache_tokens is None
    assert set(result.ratios) == set(METRICS) - {"kv_cache_tokens"}
    throughput_picture(result, tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert all((label in drawn) is (metric in result.ratios) for metric, (label, _) in METRICS.items())
    assert "limit 2.00" in drawn


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped text in the words of the tiny tokenizer, of which no two stretches of 12 are the same."""
    words = [WORDS[(number * number // 7 + number) % len(WORDS)] for number in range(400)]
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "general.evaluation.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    monkeypatch.setattr(throughput, "shipped", lambda folder: tmp_path)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_vllm: None) -> Any:
    """Puts the client above in place; returns how it was called."""
    notes = tmp_path / "notes"

    def put(completed: int | None = None, fails: bool = False) -> Any:
        head = f"NOTES, COMPLETED, FAILS = {str(notes)!r}, {completed}, {fails}\n"
        monkeypatch.setattr(throughput, "_CLIENT", head + CLIENT)
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()]

    monkeypatch.setattr(throughput, "_cache_tokens", lambda server: 1000)
    return put


@pytest.mark.usefixtures("text")
def test_both_are_measured_in_turn_on_the_same_prompts(
    tmp_path: Path, tiny_llama: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = client()
    narrow = save_tiny(tmp_path / "narrow", intermediate_size=16)
    monkeypatch.setattr(throughput, "machine", lambda: "a machine")
    load = Load(prompts=5, input_tokens=12, output_tokens=3, concurrency=2, rounds=2)
    result = expertprune.bench(narrow, against=tiny_llama, load=load, arguments=["--max-num-seqs", "4"])
    assert Timing.read(narrow / "throughput-llama.json") == result
    assert not (narrow / "throughput.json").exists()  # that one compares with the base
    assert [f"{row.model} {row.round}" for row in result.runs] == ["base 1", "expert 1", "base 2", "expert 2"]
    assert result.ratios["output_tokens_per_second"].median == 1.5
    assert result.names == {"base": "llama", "expert": "narrow"}
    assert str(tmp_path) not in (narrow / "throughput-llama.json").read_text(), "nothing of this machine's folders"
    assert result.limit == bytes_per_token(Checkpoint(tiny_llama)) / bytes_per_token(Checkpoint(narrow))
    assert all(row.memory_bytes is not None and row.memory_bytes > 2**20 for row in result.runs)
    own = ["--no-enable-prefix-caching", f"--kv-cache-memory-bytes={4 * 2**30}"]
    assert result.arguments == [*own, "--max-num-seqs", "4"]
    assert result.load == load

    called = calls()
    assert [call["options"]["model"] for call in called] == ["base", "expert", "base", "expert"]
    prompts = called[0]["prompts"]
    assert all(call["prompts"] == prompts for call in called)
    assert len(set(prompts)) == 5
    assert [len(prompt.split()) for prompt in prompts] == [12] * 5
    for each in called:
        assert {"--ignore-eos", "--disable-shuffle", "--skip-chat-template"} <= set(each["flags"])
        assert each["options"]["custom-output-len"] == "3"
        assert each["options"]["max-concurrency"] == "2"
        assert each["options"]["temperature"] == "0"


@pytest.mark.usefixtures("text")
def test_the_client_has_the_key_that_the_server_asks_for_and_nobody_reads_it(
    tmp_path: Path, tiny_llama: Path, client: Any
) -> None:
    calls = client()
    load = Load(prompts=2, input_tokens=12, rounds=1)
    given = ["--api-key", "secret", "8", "--max-num-seqs=8", "--api_key=another"]
    result = expertprune.bench(save_tiny(tmp_path / "e"), against=tiny_llama, load=load, arguments=given)
    assert [call["key"] for call in calls()] == ["secret", "secret"]
    assert result.arguments[-5:] == ["--api-key", "***", "***", "--max-num-seqs=8", "--api_key=***"]
    assert "another" not in (tmp_path / "e" / "throughput-llama.json").read_text()


@pytest.mark.parametrize("given", [["--dtype", "float32"], ["--dtype=float32"], []])
def test_the_cache_is_what_weights_leave_in_the_served_dtype(
    tmp_path: Path, fake_vllm: None, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    """Of 4 GiB, 3.6 may be taken; the processes take 2, and weights of bfloat16 take twice their size in float32."""
    monkeypatch.setattr(engine, "free_memory", lambda: 4 * 2**30)
    small, large = (
        engine.check_folder(save_tiny(tmp_path / name, dtype=torch.bfloat16, **size))
        for name, size in (("small", {"intermediate_size": 16}), ("large", {}))
    )
    assert small.weight_bytes < large.weight_bytes
    weights = large.weight_bytes * (2 if given else 1)
    cache = int(4 * 2**30 * 0.9) - 2 * 2**30 - weights
    assert throughput._common_arguments([small, large], given)[1] == f"--kv-cache-memory-bytes={cache}"


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(
    ("failure", "message"),
    [({"completed": 4}, "answered 4 of 5 prompts"), ({"fails": True}, "benchmark of base failed.*connection refused")],
)
def test_a_run_that_is_not_whole_is_an_error_and_writes_nothing(
    tmp_path: Path, tiny_llama: Path, client: Any, failure: dict[str, Any], message: str
) -> None:
    client(**failure)
    folder = save_tiny(tmp_path / "expert")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ServingError, match=f"(?s){message}"):
        expertprune.bench(folder, against=tiny_llama, load=Load(prompts=5, input_tokens=12, rounds=1))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_cannot_be_measured_is_refused_before_anything_starts(tiny_llama: Path, fake_vllm: None) -> None:
    with pytest.raises(CheckpointError, match="is no expert"):
        expertprune.bench(tiny_llama)
    with pytest.raises(UsageError, match="takes 128 tokens at a time, not 100 and 29"):
        expertprune.bench(tiny_llama, against=tiny_llama, load=Load(input_tokens=100, output_tokens=29))


def test_a_timing_is_written_into_its_folder_and_over_nothing_else(
    tmp_path: Path, tiny_llama: Path, fake_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan names a model leads to no other folder; what cannot be written is refused before anything starts."""
    check = engine.check_folder
    monkeypatch.setattr(engine, "check_folder", lambda folder: replace(check(folder), name="../../other/thesis"))
    monkeypatch.setattr(throughput, "Server", None)
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


@pytest.mark.usefixtures("text")
def test_the_command_prints_a_table_and_draws(tmp_path: Path, tiny_llama: Path, client: Any) -> None:
    client()
    expert, picture = save_tiny(tmp_path / "expert", intermediate_size=16), tmp_path / "speed.svg"
    options = ["--against", tiny_llama, "--prompts", 5, "--rounds", 2, "--input-tokens", 12, "--picture", picture]
    table = call("bench", expert, *options).stdout
    assert all(text in table for text in ("output tokens per second", "1.500", "of the limit"))
    assert "limit" in picture.read_text()
    for wrong in ([], [expert, expert], [expert, "--base", "x", "--against", "y"]):
        call("bench", *wrong, code=2)
