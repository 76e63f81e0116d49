"""What builds of large bases take, beside what was forecast: time and memory, stage by stage.

    OMP_NUM_THREADS=2 python -m bench.scale llama-8b [--layers 32] [--part 1] [--folder FOLDER] [--save]

`llama-8b` is a checkpoint with exactly the shapes of Llama 3.1 8B, `qwen3-30b-a3b` a mixture with the layers of Qwen3
30B A3B, both with random weights and made shard by shard; a folder or a bundled model is taken as it is. `--part 8`
divides all widths. Memory is `RssAnon`, anonymous resident memory, of all processes of the build together: pages of
mapped files do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from expertprune.models.checkpoint import INDEX
from expertprune.models.tensorfile import in_order, written_file

from .records import Table, made, save_table

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "num_hidden_layers": 32, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_hidden_layers": 48, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES = {"llama-8b": ("llama", LLAMA, {"ffn": 0.25}), "qwen3-30b-a3b": ("qwen3_moe", QWEN, {"experts": 0.25})}
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")


def make_checkpoint(folder: Path, model_type: str, config: dict[str, Any], device: str = "cpu") -> None:
    """A checkpoint with random weights in bfloat16, one file for each layer; nothing is done if it is there.

    Args:
        device: where the weights are drawn.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if (folder / INDEX).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = CONFIG_MAPPING[model_type](**config, dtype="bfloat16", bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    settings.architectures = [type(model).__name__]
    settings.save_pretrained(folder)
    save_tokenizer(folder)
    shapes = dict(stored_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        label = f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else "skeleton"
        files.setdefault(f"model-{label}.safetensors", {})[name] = shape
    generator = torch.Generator(device).manual_seed(0)
    for file, tensors in files.items():
        expected = {name: (torch.bfloat16, shape) for name, shape in tensors.items()}
        with written_file(folder / file, expected, {"format": "pt"}) as out:
            for name in in_order(dict.fromkeys(tensors, torch.bfloat16)):
                weight = torch.ones(tensors[name], device=device)
                weight = weight if "norm" in name else weight.normal_(0, 0.02, generator=generator)
                out.add(name, weight.bfloat16().cpu())
    places = {name: file for file, tensors in sorted(files.items()) for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def stored_shapes(running: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as checkpoints store them: routed experts one by one."""
    for name, shape in running.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, part in ((expert, part) for expert in range(shape[0]) for part in ("gate_proj", "up_proj")):
                yield name.replace("gate_up_proj", f"{expert}.{part}.weight"), (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            yield from ((name.replace("down_proj", f"{i}.down_proj.weight"), shape[1:]) for i in range(shape[0]))
        else:
            yield name, shape


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(["<s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    ).save_pretrained(folder)


def write_text(path: Path, documents: int, words: int, seed: int) -> None:
    """Documents of random words of five letters, no two of them alike."""
    chosen = random.Random(seed)
    texts = [["".join(chosen.choices(string.ascii_lowercase, k=5)) for _ in range(words)] for _ in range(documents)]
    lines = [json.dumps({"text": " ".join(each)}) for each in texts]
    path.write_text("\n".join(lines) + "\n")


@dataclass
class Watched:
    """A build that is over.

    Attributes:
        forecast: as `validate --json` has it.
        samples: time and `RssAnon` of the whole process tree, in bytes.
        stages: name, first and last time of each stage, and its seconds.
    """

    forecast: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, int]] = field(default_factory=list)
    stages: list[tuple[str, float, float, float]] = field(default_factory=list)

    def peak(self, first: float, last: float) -> int:
        return max((size for when, size in self.samples if first <= when <= last), default=0)


def watch_build(spec: Path, out: Path, store: Path, processor: bool = False) -> Watched:
    """Forecast and build in a process of its own, and sample its memory.

    Args:
        processor: count seconds of the processor in place of those that pass.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(spec, out, store, processor, there))
    process.start()
    there.close()
    watched, over = Watched(), threading.Event()

    def sample() -> None:
        while not over.is_set():
            watched.samples.append((time.time(), anonymous_memory(process.pid or 0)))
            time.sleep(0.05)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        while True:
            kind, content = here.recv()
            if kind == "forecast":
                watched.forecast = content
            else:
                watched.stages.append(content)
    except EOFError:
        process.join()
    finally:
        over.set()
        sampler.join()
    if process.exitcode:
        raise SystemExit(f"the build ended with {process.exitcode}")
    return watched


def _build(spec: Path, out: Path, store: Path, processor: bool, told: Connection) -> None:
    import expertprune
    from expertprune.stages.forecast import forecast

    @contextlib.contextmanager
    def track(stage: str, steps: int) -> Iterator[Callable[[], None]]:
        start, counted = time.time(), time.perf_counter()
        yield lambda: None
        told.send(("stage", (stage, start, time.time(), time.perf_counter() - counted)))

    if processor:
        time.perf_counter = time.process_time  # the forecast's rates are measured by it, too
    told.send(("forecast", forecast(spec, store).document()))
    expertprune.build(spec, out, store=store, track=track)
    told.close()


def anonymous_memory(pid: int) -> int:
    """`RssAnon` of a process and all below it, in bytes."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    return total


def table_of(watched: Watched) -> Table:
    """Each stage: what was forecast and what was measured."""
    table = Table(["stage", "forecast (s)", "measured (s)", "forecast (GiB)", "measured (GiB)"])
    forecast = {stage["name"]: stage for stage in watched.forecast["stages"]}
    together = {"prune and repair": ("repair", "write")}
    for name, first, last, taken in watched.stages:
        parts = [forecast[each] for each in together.get(name, (name,)) if each in forecast]
        seconds = sum(part["seconds"] for part in parts)
        memory = max((part["host"] for part in parts), default=0)
        table.add(
            name, f"{seconds:.0f}", f"{taken:.0f}", f"{memory / 2**30:.2f}",
            f"{watched.peak(first, last) / 2**30:.2f}",
        )  # fmt: skip
    taken = sum(each[3] for each in watched.stages)
    table.add(
        "all", f"{watched.forecast['seconds']:.0f}", f"{taken:.0f}",
        f"{watched.forecast['memory']['host'] / 2**30:.2f}", f"{watched.peak(0, time.time()) / 2**30:.2f}",
    )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help=f"{', '.join(SHAPES)}, a folder, or a bundled model")
    parser.add_argument("--layers", type=int, help="of the made checkpoint; default: as many as the original has")
    parser.add_argument("--part", type=int, default=1, help="divide the widths of the made checkpoint by it")
    parser.add_argument("--folder", type=Path, help="where the checkpoint, the store and the expert go")
    parser.add_argument("--source", default="streamed", choices=["auto", "resident", "streamed"])
    parser.add_argument("--dtype", default="bfloat16", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--criterion", default="fisher")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--words", type=int, default=60, help="of a document")
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--save", action="store_true", help="save the table in bench/results")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model, budget = chosen.base, {"ffn": 0.25}
        if chosen.base in SHAPES:
            family, config, budget = SHAPES[chosen.base]
            config = config | {key: value // chosen.part for key, value in config.items() if key in WIDTHS}
            config |= {"num_hidden_layers": chosen.layers} if chosen.layers else {}
            model = str(folder / f"{chosen.base}-{config['num_hidden_layers']}-{chosen.part}")
            make_checkpoint(Path(model), family, config)
        write_text(folder / "text.jsonl", chosen.documents, chosen.words, 0)
        write_text(folder / "held-out.jsonl", chosen.documents, chosen.words, 1)
        spec = {
            "name": "scale",
            "base": {"model": model, "layers": chosen.source, "dtype": chosen.dtype},
            "dimensions": {"domain": ["text"]},
            "general": [],
            "corpora": {"sources": {"text": {"path": "text.jsonl", "evaluation": "held-out.jsonl"}}},
            "budget": budget,
            "relevance": chosen.criterion,
            "calibration": {"documents": chosen.documents, "tokens_per_batch": chosen.tokens_per_batch},
            "evaluate": {"documents": chosen.documents},
        }
        (folder / "scale.yaml").write_text(yaml.safe_dump(spec))
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            watched = watch_build(folder / "scale.yaml", Path(fresh) / "expert", Path(fresh) / "store")
    table = table_of(watched)
    settings = f"{chosen.base}, {chosen.source}, {chosen.dtype}, {chosen.criterion}, {chosen.documents} documents"
    note = f"{settings} of {chosen.words} words; {torch.get_num_threads()} threads."
    if chosen.save:
        name = f"scale_{Path(chosen.base).name}_{chosen.source}_{chosen.criterion}".replace("-", "_").replace(".", "_")
        save_table(name, table, made(), note)
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    main()
