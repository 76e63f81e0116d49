"""What is checked before an engine starts, and what it is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import expertprune
from expertprune.errors import CheckpointError, UsageError
from expertprune.files.ownership import own_folder
from expertprune.serving import engine
from tests.experts import described
from tests.serving.conftest import CPU
from tests.tiny import save_tiny

GPU = engine.Platform(cpu=False, memory=80 * engine.GIB)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of a checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny"))


def narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))


def servable(weight_bytes: int) -> engine.Servable:
    return engine.Servable(Path("expert"), "expert", weight_bytes, checkpoint=None)  # type: ignore[arg-type]


def test_the_name_of_a_served_folder(folder: Path) -> None:
    found = engine.check_folder(folder)
    weights = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    assert (found.name, found.weight_bytes) == ("tiny", weights)
    assert engine.check_folder(folder, "mine").name == "mine"
    described(folder, "medical-qa").save()
    assert engine.check_folder(folder).name == "medical-qa"


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_what_an_unfinished_build_leaves_is_not_served(folder: Path, kind: str) -> None:
    with own_folder(folder.parent / "medical-qa", kind) as making:
        shutil.copytree(folder, making, dirs_exist_ok=True)
        shutil.copytree(folder, making / "medical-qa")
        for place in (making, making / "medical-qa"):
            with pytest.raises(CheckpointError, match="unfinished build"):
                engine.check_folder(place)


def forget(pattern: str) -> Any:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (write("model-00001-of-00004.safetensors", "short"), "truncated or corrupt"),
        (forget("model-00002*"), "no such file"),
        (narrow, "disagrees with the weights"),
        (forget("tokenizer*"), "no tokenizer files"),
        (forget("config.json"), "is no expert .* and no checkpoint"),
        (write("expertprune.json", "{"), "not valid JSON"),
        (write("expertprune.json", '{"kind": "expert", "schema": 2}'), "damaged"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        engine.check_folder(folder)


@pytest.mark.parametrize(
    ("free", "engines", "cache"),
    [
        (100, 1, 4),  # of 90 GiB that may be taken, 1 GiB of weights and 2 GiB of processes leave 87: at most 4
        (5, 1, 1.5),  # 4.5 - 1 - 2
        (10, 2, 1.5),  # the same for each of two
    ],
)
def test_the_cache_on_a_cpu_is_what_is_free_but_not_all(
    monkeypatch: pytest.MonkeyPatch, free: int, engines: int, cache: float
) -> None:
    monkeypatch.setattr(engine, "free_memory", lambda: free * engine.GIB)
    settings = engine.engine_settings(servable(engine.GIB), CPU, engines)
    assert settings == {
        "max_model_len": -1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": pytest.approx(cache * engine.GIB, abs=2),
    }


@pytest.mark.parametrize("engines", [1, 3])
def test_too_little_memory_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, engines: int) -> None:
    """1 GiB of weights, 2 of processes and a quarter of cache need 3.25 GiB; 0.9 of 3.5 GiB is 3.15."""
    monkeypatch.setattr(engine, "free_memory", lambda: int(3.5 * engines * engine.GIB))
    with pytest.raises(UsageError, match=r"need 3\.2 GiB of memory, 3\.1 GiB are free"):
        engine.engine_settings(servable(engine.GIB), CPU, engines)


def test_the_variable_of_vllm_decides_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "free_memory", lambda: 10 * engine.GIB)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "5")
    assert "kv_cache_memory_bytes" not in engine.engine_settings(servable(engine.GIB), CPU)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    with pytest.raises(UsageError, match=r"need 10\.0 GiB"):
        engine.engine_settings(servable(engine.GIB), CPU)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "much")
    with pytest.raises(UsageError, match="much"):
        engine.engine_settings(servable(engine.GIB), CPU)


def test_a_gpu_is_shared_and_gets_no_setting_of_a_cpu() -> None:
    assert engine.engine_settings(servable(engine.GIB), GPU) == {"max_model_len": -1, "gpu_memory_utilization": 0.9}
    assert engine.engine_settings(servable(engine.GIB), GPU, 2)["gpu_memory_utilization"] == 0.45
    with pytest.raises(UsageError, match=r"need 40\.2 GiB of memory, 36\.0 GiB are free for each of 2 engines"):
        engine.engine_settings(servable(40 * engine.GIB), GPU, 2)
    engine.engine_settings(servable(400 * engine.GIB), GPU, 1, given=["tensor_parallel_size"])


def test_what_the_user_gives_wins(fake_vllm: None, tiny_llama: Path) -> None:
    given = ["--max-model-len", "64", "--no-enforce-eager", "--kv_cache_memory_bytes=1G"]
    arguments = engine.server_arguments(engine.check_folder(tiny_llama), "127.0.0.1", 8000, given)
    own = [f"--model={tiny_llama.resolve()}", f"--served-model-name={tiny_llama.name}"]
    assert arguments == [*own, "--host=127.0.0.1", "--port=8000", *given]
    plain = engine.server_arguments(engine.check_folder(tiny_llama), "127.0.0.1", 8000)
    assert plain[4:] == ["--max-model-len=-1", "--enforce-eager", f"--kv-cache-memory-bytes={4 * engine.GIB}"]


@pytest.mark.parametrize("option", ["--port", "--host=0.0.0.0", "--served_model_name=x", "--model"])
def test_what_expertprune_says_itself_cannot_be_given(option: str) -> None:
    with pytest.raises(UsageError, match="cannot be given after --"):
        engine.option_names(["--max-num-seqs", "3", option])


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        (["--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem"], "let a proxy in front of the endpoint speak TLS"),
        (["--ssl_keyfile=key.pem"], "let a proxy in front of the endpoint speak TLS"),
        (["--config", "vllm.yaml"], "give the arguments that it holds after --"),
        (["--config=vllm.yaml"], "give the arguments that it holds after --"),
    ],
)
def test_what_would_hide_the_server_or_its_arguments_is_refused(
    fake_vllm: None, tiny_llama: Path, given: list[str], fix: str
) -> None:
    option = given[0].partition("=")[0]
    with pytest.raises(UsageError, match=f"{option} cannot be given after --: .*{fix}"):
        engine.server_arguments(engine.check_folder(tiny_llama), "127.0.0.1", 8000, given)
    assert engine.option_names(["--config-format", "hf"]) == ["config_format"]


def test_without_vllm_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.platform.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"expertprune\[serve\].*expertprune\[serve-cpu\]"):
        engine.platform()


def test_a_vllm_that_is_broken_is_told_from_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('operator torchvision::nms does not exist')")
    engine.platform.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be imported: .*torchvision::nms"):
        engine.platform()


def test_load_engine_configures_vllm(fake_vllm: None, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: settings))
    assert expertprune.load_engine(tiny_llama, max_model_len=64, seed=7) == {
        "model": str(tiny_llama.resolve()),
        "enforce_eager": True,
        "kv_cache_memory_bytes": 4 * engine.GIB,
        "max_model_len": 64,
        "seed": 7,
    }


def test_float32_needs_room_for_wider_weights(fake_vllm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama", dtype=torch.bfloat16)
    seen: list[int] = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: settings))
    monkeypatch.setattr(engine, "engine_settings", lambda servable, on, given: seen.append(servable.weight_bytes) or {})
    engine.load_engine(folder)
    engine.load_engine(folder, dtype="float32")
    servable = engine.check_folder(folder)
    assert seen == [servable.weight_bytes, 2 * servable.weight_bytes]
    monkeypatch.setattr(
        engine, "engine_settings", lambda servable, on, engines, given: seen.append(servable.weight_bytes) or {}
    )
    for given in (["--dtype=float32"], ["--dtype", "float32"], ["--dtype", "float32", "--dtype", "bfloat16"], []):
        engine.server_arguments(servable, "127.0.0.1", 8000, given)
    assert seen[2:] == [2 * servable.weight_bytes] * 2 + [servable.weight_bytes] * 2


def test_several_engines_on_a_cpu_are_not_bound_to_the_same_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 logical cores of 16, two to a physical one, are four: two for each of two engines, less the scheduler's."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(engine, "usable_cores", lambda: 8)
    monkeypatch.setattr(engine.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    alone = {"VLLM_NO_USAGE_STATS": "1"}
    assert engine.environment(CPU) == alone
    assert engine.environment(GPU, 2) == alone
    several = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    assert engine.environment(CPU, 2) == {**alone, **several}
    assert engine.environment(CPU, 1000)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert engine.environment(CPU, 2) == alone


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-tp", "4"], "6 query heads and 3 KV heads, which cannot be shared among 4 GPUs"),
        (["--seed", "1", "--tensor-parallel-size=3"], "32 FFN neurons, which cannot be shared among 3 GPUs"),
        (["--tensor_parallel_size", "2"], "3 KV heads, which cannot be shared among 2 GPUs"),
    ],
)
def test_widths_that_gpus_cannot_share_are_said_before_anything_starts(
    fake_vllm: None, tiny_llama: Path, arguments: list[str], problem: str
) -> None:
    found = engine.check_folder(tiny_llama)
    with pytest.raises(UsageError, match=problem):
        engine.server_arguments(found, "127.0.0.1", 8000, arguments)
    engine.server_arguments(found, "127.0.0.1", 8000, ["--tensor-parallel-size", "1"])
    with pytest.raises(UsageError, match=r"among 2 GPUs: .* budget\.tensor_parallel: 2"):
        engine.load_engine(tiny_llama, tensor_parallel_size=2)


def test_short_options_are_known_by_their_long_names() -> None:
    assert engine.option_names(["-tp", "4", "-pp=2"]) == ["tensor_parallel_size", "pipeline_parallel_size"]
