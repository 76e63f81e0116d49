"""What is checked before an engine starts, and what it is told."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expertprune
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.errors import CheckpointError, UsageError
from expertprune.files.ownership import own_folder
from expertprune.serving import engine
from expertprune.serving.engine import GIB
from expertprune.units import KeptRows
from tests.experts import described
from tests.oracle import change_config
from tests.serving.conftest import CPU
from tests.tiny import save_tiny

GPU = engine.Platform(cpu=False, memory=80 * GIB)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of a checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny"))


def servable(weight_bytes: int = GIB) -> engine.Servable:
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


def narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))


def test_what_its_family_does_not_let_vllm_serve_is_refused(tmp_path: Path, folder: Path) -> None:
    def config(model_type: str, single: bool = True) -> dict[str, Any]:
        own = {"architectures": ["ExpertModel"], "per_layer_config": {"0": {"intermediate_size": 16}}}
        return {"model_type": model_type, **(own if single else {"architectures": ["Model"]})}

    plain = described(tmp_path)
    trimmed = VocabularyPlan(KeptRows(64, tuple(range(48)), ()), "tokenizer")
    rows = described(tmp_path, plan=replace(plain.plan, vocabulary=trimmed))
    again = replace(plain, ancestor=rows.description)
    for found, expert, reason in (
        (config("llama"), rows, None),
        (config("olmo2"), plain, "no layers of different widths of family 'olmo2'"),
        (config("unlisted"), plain, "no layers of different widths of family 'unlisted'"),
        (config("olmo2", single=False), rows, None),
        (config("gpt_oss", single=False), plain, None),
        (config("gpt_oss", single=False), rows, "no cut vocabulary of family 'gpt_oss': its chat"),
        (config("gpt_oss", single=False), again, "no cut vocabulary of family 'gpt_oss': its chat"),
        (config("gpt_oss", single=False), None, None),
    ):
        why = engine.why_not_served(found, expert)
        assert (why is None) if reason is None else (why is not None and reason in why), (found, why)
    change_config(
        folder, model_type="olmo2", **{key: value for key, value in config("").items() if key != "model_type"}
    )
    with pytest.raises(CheckpointError, match=r"'olmo2'; load it with transformers, or build .* serve_with: vllm"):
        engine.check_folder(folder)


def forget(pattern: str) -> Callable[[Path], Any]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (narrow, "disagrees with the weights"),
        (forget("tokenizer*"), "no tokenizer files"),
        (forget("config.json"), "is no expert .* and no checkpoint"),
        (lambda folder: (folder / "expertprune.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        engine.check_folder(folder)


def changed(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **settings: Any) -> None:
    """Change the matrices of a folder's layers, in files that an index names."""
    places: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            tensors |= change(name, tensor) if "_proj" in name else {name: tensor}
        save_file(tensors, path)
        places |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    change_config(folder, quantization_config=settings)


def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """W4A16 of llm-compressor: eight values a number, along the input."""
    rows, width = tensor.shape
    numbers = torch.zeros(rows, width // 8, dtype=torch.int32)
    return {
        f"{name}_packed": numbers,
        f"{name}_scale": torch.ones(rows, 1),
        f"{name}_shape": torch.tensor([rows, width]),
    }


def awq(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Eight values a number, along the output, which is the second axis."""
    rows, width = tensor.shape
    name = name.removesuffix("weight")
    return {
        f"{name}qweight": torch.zeros(width, -(-rows // 8), dtype=torch.int32),
        f"{name}scales": torch.ones(1, rows),
    }


def int8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor.to(torch.int8), f"{name}_scale": torch.ones(len(tensor), 1)}


@pytest.mark.parametrize("change", [packed, awq, int8])
def test_quantized_folders_are_served_whatever_their_tensors(folder: Path, change: Any) -> None:
    changed(folder, change, quant_method="any")
    weights = sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    assert engine.check_folder(folder).weight_bytes == weights


@pytest.mark.parametrize(
    ("free", "engines", "variable", "cache"),
    [
        (100, 1, "", 4),  # of 90 GiB that may be taken, 1 GiB of weights and 2 GiB of processes leave 87: at most 4
        (5, 1, "", 1.5),  # 4.5 - 1 - 2
        (10, 2, "", 1.5),  # the same for each of two
        (10, 1, "5", None),  # vLLM reads the variable itself
        # 1 GiB of weights, 2 of processes and a quarter of cache need 3.25 GiB; 0.9 of 3.5 GiB is 3.15
        (3.5, 1, "", r"need 3\.2 GiB of memory, 3\.1 GiB are free;"),
        (10.5, 3, "", r"need 3\.2 GiB of memory, 3\.1 GiB are free for each of 3 engines"),
        (10, 1, "7", r"need 10\.0 GiB"),
        (10, 1, "much", "VLLM_CPU_KVCACHE_SPACE=much"),
    ],
)
def test_the_cache_on_a_cpu_is_what_is_free_but_not_all(
    monkeypatch: pytest.MonkeyPatch, free: float, engines: int, variable: str, cache: float | str | None
) -> None:
    monkeypatch.setattr(engine, "free_memory", lambda: int(free * GIB))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", variable)
    if isinstance(cache, str):
        with pytest.raises(UsageError, match=cache):
            engine.engine_settings(servable(), CPU, engines)
    else:
        own = {} if cache is None else {"kv_cache_memory_bytes": pytest.approx(cache * GIB, abs=2)}
        expected = {"max_model_len": -1, "enforce_eager": True, **own}
        assert engine.engine_settings(servable(), CPU, engines) == expected


def test_a_gpu_is_shared_and_gets_no_setting_of_a_cpu() -> None:
    assert engine.engine_settings(servable(), GPU) == {"max_model_len": -1, "gpu_memory_utilization": 0.9}
    assert engine.engine_settings(servable(), GPU, 2)["gpu_memory_utilization"] == 0.45
    with pytest.raises(UsageError, match=r"need 40\.2 GiB of memory, 36\.0 GiB are free for each of 2 engines"):
        engine.engine_settings(servable(40 * GIB), GPU, 2)
    engine.engine_settings(servable(400 * GIB), GPU, 1, given=["tensor_parallel_size"])


def test_what_the_user_gives_wins(fake_vllm: None, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine.check_folder(tiny_llama)
    given = ["--max-model-len", "64", "--no-enforce-eager", "--kv_cache_memory_bytes=1G", "--config-format", "hf"]
    where = [f"--model={tiny_llama.resolve()}", "--served-model-name=llama", "--host=127.0.0.1", "--port=8000"]
    assert engine.server_arguments(found, "127.0.0.1", 8000, given) == [*where, *given]
    own = ["--max-model-len=-1", "--enforce-eager", f"--kv-cache-memory-bytes={4 * GIB}"]
    assert engine.server_arguments(found, "127.0.0.1", 8000) == [*where, *own]
    one = ["--tensor-parallel-size", "1"]
    assert engine.server_arguments(found, "127.0.0.1", 8000, one) == [*where, *own, *one]
    assert engine.option_names(["-tp", "4", "-pp=2"]) == ["tensor_parallel_size", "pipeline_parallel_size"]
    assert engine.option_names(["--device-memory-utilization=0.3"]) == ["gpu_memory_utilization"]  # vLLM's other name
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: settings))
    assert expertprune.load_engine(tiny_llama, max_model_len=64, seed=7) == {
        "model": str(tiny_llama.resolve()),
        "enforce_eager": True,
        "kv_cache_memory_bytes": 4 * GIB,
        "max_model_len": 64,
        "seed": 7,
    }
    with pytest.raises(UsageError, match="among 2 GPUs"):
        engine.load_engine(tiny_llama, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-num-seqs", "3", "--port"], "--port cannot be given after --"),
        (["--host=0.0.0.0"], "--host cannot be given after --"),
        (["--served_model_name=x"], "--served_model_name cannot be given after --"),
        (["--model"], "--model cannot be given after --"),
        (["--ssl-certfile", "cert.pem"], "--ssl-certfile cannot be .*; let a proxy in front of the endpoint speak TLS"),
        (["--ssl_keyfile=key.pem"], "--ssl_keyfile cannot be given"),
        (["--config=vllm.yaml"], "--config cannot be .*: .*give the arguments that it holds after --"),
        (["--hos=0.0.0.0"], "--hos cannot be given after --: write --host in full"),
        (["--por", "9"], "--por cannot .*: write --port in full"),
        (["--served_model", "zz"], "--served_model cannot .*: write --served-model-name in full"),
        (["--conf", "x"], "--conf cannot .*: write --config in full"),
        (["--ssl-keyf=k"], "--ssl-keyf cannot be given"),
        (["--model.name=x"], "--model cannot be given after --: expertprune says it itself"),
        (["--api-k", "secret"], "--api-k cannot .*: write --api-key in full"),
        (["--dtyp", "float32"], "--dtyp cannot .*: write --dtype in full"),
        (["--no-enforce-e"], "--no-enforce-e cannot .*: write --enforce-eager in full"),
        (
            ["--seed", "1", "--tensor-parallel", "2"],
            "--tensor-parallel cannot .*: write --tensor-parallel-size in full",
        ),
        (["-t", "2"], "-t cannot .*: write -tp in full"),
        (["-tp", "4"], "6 query heads and 3 KV heads, which cannot be shared among 4 GPUs"),
        (["--seed", "1", "--tensor-parallel-size=3"], "32 FFN neurons, which cannot be shared among 3 GPUs"),
        (["--tensor_parallel_size", "2"], r"3 KV heads, .* among 2 GPUs: .* budget\.tensor_parallel: 2"),
    ],
)
def test_arguments_that_no_engine_can_have_are_refused(
    fake_vllm: None, tiny_llama: Path, given: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine.server_arguments(engine.check_folder(tiny_llama), "127.0.0.1", 8000, given)


@pytest.mark.vllm
def test_no_option_of_vllm_is_taken_for_the_beginning_of_another() -> None:
    """Of those that must be given in full, each is one of vLLM's."""
    asked = subprocess.run([*engine.COMMAND, "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", asked.stdout))
    second = {
        f"--{name.replace('_', '-')}" for name in engine._SYNONYMS
    }  # --help shows the first name of an option only
    assert {each for each in engine._IN_FULL if each.startswith("--")} - second <= options
    begun = []
    for option in options:
        try:
            engine.option_names([option])
        except UsageError as error:
            begun += [option] if "in full" in str(error) else []
    assert not begun


def test_a_vllm_that_is_missing_is_told_from_one_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine.platform.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"expertprune\[serve\].*expertprune\[serve-cpu\]"):
        engine.platform()
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('operator torchvision::nms does not exist')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be imported: .*torchvision::nms"):
        engine.platform()


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ([], 1),
        (["--dtype=float32"], 2),
        (["--dtype", "float32"], 2),
        (["--dtype", "float32", "--dtype", "bfloat16"], 1),
    ],
)
def test_float32_needs_room_for_wider_weights(
    fake_vllm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], factor: int
) -> None:
    """Of 3.6 GiB that may be taken, the processes take 2."""
    monkeypatch.setattr(engine, "free_memory", lambda: 4 * GIB)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: settings))
    found = engine.check_folder(save_tiny(tmp_path / "llama", dtype=torch.bfloat16))
    cache = int(4 * GIB * 0.9) - 2 * GIB - factor * found.weight_bytes
    assert f"--kv-cache-memory-bytes={cache}" in engine.server_arguments(found, "127.0.0.1", 8000, given)
    dtype = {"dtype": "float32"} if factor == 2 else {}
    assert engine.load_engine(found.folder, **dtype)["kv_cache_memory_bytes"] == cache


def test_several_engines_on_a_cpu_are_not_bound_to_the_same_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 logical cores of 16, two to a physical one, are six: three for each of two engines, less the scheduler's."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(engine, "usable_cores", lambda: 12)
    monkeypatch.setattr(engine.psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    alone = {"VLLM_NO_USAGE_STATS": "1"}
    assert engine.environment(CPU) == engine.environment(GPU, 2) == alone
    for engines, threads in ((2, "2"), (1000, "1")):
        several = {"OMP_NUM_THREADS": threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        assert engine.environment(CPU, engines) == {**alone, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **several}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert engine.environment(CPU, 2) == alone
