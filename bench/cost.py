"""What each method costs: time over a plain forward pass of the same text, and peak memory.

    OMP_NUM_THREADS=1 python -m bench.cost --data DATA [--documents 20] [--builds]
    OMP_NUM_THREADS=1 python -m bench.cost --mixture [--documents 12] [--save]

Each method runs in a process of its own, which runs the plain forward pass first. `--mixture` needs
no data: its base has random weights and layers like those of Qwen3 30B A3B, and its seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import expertprune
from expertprune.corpora.batches import Batch
from expertprune.models.loading import load_model
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.stages.compose import plan_of
from expertprune.stages.profile import profiles_of
from expertprune.stages.prune import write_folder

from .cells import Bench, Cell
from .peers import METHODS
from .quality import STOCK
from .records import Table, made, save_table
from .scale import SHAPES, WIDTHS, make_checkpoint, write_text

REPAIR, BUILD = "repair", "profile, compose and repair"
STREAMED = f"{BUILD}, layers streamed"
OURS: dict[str, dict[str, Any]] = {
    "profile (forward pass)": STOCK,
    "profile + gradient pass": {"relevance.criterion": "fisher"},
    "profile + regional pass": {"relevance.criterion": "regional"},
    REPAIR: STOCK,
    BUILD: {"relevance.criterion": "fisher"},
    STREAMED: {"relevance.criterion": "fisher", "base.layers": "streamed"},
}


def peak() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(bench: Bench, name: str, documents: int, dtype: str = "auto") -> dict[str, Any]:
    """Seconds of a plain forward pass and of the method; peak memory before and after, GiB."""
    overrides = {**OURS.get(name, {}), "base.dtype": dtype}
    cell = Cell("ours" if name in OURS else name, documents=documents, overrides=overrides)
    prepared = expertprune.validate(bench.spec(cell), store=None)
    batches = prepared.repair_batches()
    # A streamed model is none that can be called: a resident one takes the plain pass, and goes.
    model = load_model(prepared.base.folder, prepared.base.dtype) if name == STREAMED else prepared.running.model
    plain = plain_seconds(model, batches, time.perf_counter)
    del model
    _ = prepared.running.model  # in memory before the clock starts, streamed or not
    before = peak()
    with tempfile.TemporaryDirectory() as temporary:
        prepared = replace(prepared, store=Path(temporary))
        if name == REPAIR:
            plan = plan_of(prepared, silent)
            (Path(temporary) / "expert").mkdir()
            start = time.perf_counter()
            write_folder(prepared, plan, Path(temporary) / "expert")
        elif name in (BUILD, STREAMED):
            (Path(temporary) / "expert").mkdir()
            start = time.perf_counter()
            prepared.running.keep_states()  # as `build` does
            write_folder(prepared, plan_of(prepared, silent), Path(temporary) / "expert")
        elif name in OURS:
            start = time.perf_counter()
            profiles_of(prepared, silent)
        else:
            fresh = load_model(prepared.base.folder, prepared.base.dtype)
            start = time.perf_counter()
            METHODS[name](fresh, batches, 0.25, 0)
        seconds = time.perf_counter() - start
    tokens = sum(batch.tokens for batch in batches)
    return {"plain": plain, "seconds": seconds, "before": before, "peak": peak(), "tokens": tokens}


def builds(data: Path, documents: int) -> None:
    """Measure a default build without its evaluation, and save the table."""
    table = Table(
        ["base runs in", "layers", "plain forward pass (s)", "build (s)", "build over pass", "peak memory (GiB)"]
    )
    command = [sys.executable, "-m", "bench.cost", f"--data={data}", f"--documents={documents}"]
    for dtype, name in itertools.product(("float32", "bfloat16"), (BUILD, STREAMED)):
        run = subprocess.run([*command, "--one", name, "--dtype", dtype], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        add_build(table, dtype, "streamed, run again" if name == STREAMED else "resident", found)
    save_table("cost_build", table, made(), f"{found['tokens']:,} tokens; {torch.get_num_threads()} threads.")
    print(table)


# Two layers of 48, half as wide: 1.3 GB in float32. With so many tokens, the head keeps its share of the time.
MIXTURE_LAYERS, MIXTURE_PART, MIXTURE_VOCABULARY = 2, 2, 4096
MIXTURE_PASSES = {
    "forward statistics": {"criterion": "impact", "experts": "reap"},
    "forward statistics and gradients": {"criterion": "fisher"},
}


def mixture(documents: int, folder: Path) -> tuple[Table, int]:
    """Seconds of the processor of a profile's passes over a mixture, and the number of tokens."""
    family, config, _ = SHAPES["qwen3-30b-a3b"]
    config = config | {key: value // MIXTURE_PART for key, value in config.items() if key in WIDTHS}
    config = config | {"num_hidden_layers": MIXTURE_LAYERS, "vocab_size": MIXTURE_VOCABULARY}
    make_checkpoint(folder / "mixture", family, config)
    write_text(folder / "text.jsonl", documents, 60, 0)
    table, plain = Table(["pass", "seconds of the processor", "over the plain forward pass"]), 0.0
    for name, relevance in MIXTURE_PASSES.items():
        spec = {
            "name": "cost",
            "base": {"model": str(folder / "mixture"), "dtype": "float32", "layers": "resident"},
            "dimensions": {"domain": "text"},
            "general": [],
            "corpora": {"sources": {"text": {"path": "text.jsonl"}}},
            "calibration": {"documents": documents, "tokens_per_batch": 4096},
            "relevance": relevance,
            "budget": {"experts": 0.25, "ffn": 0.25},
            "evaluate": {"enabled": False},
        }
        prepared = expertprune.validate(parse_spec(spec, "cost", folder), store=folder / name)
        batches = prepared.repair_batches()
        model = prepared.running.model  # loaded before the clock starts
        if not plain:
            plain = plain_seconds(model, batches, time.process_time)
            table.add("plain forward pass", f"{plain:.1f}", "1")
        del model  # there is no room for two
        start = time.process_time()
        profiles_of(prepared, silent)
        seconds = time.process_time() - start
        table.add(name, f"{seconds:.1f}", f"{seconds / plain:.2f}")
    return table, sum(batch.tokens for batch in batches)


def plain_seconds(model: Any, batches: Sequence[Batch], clock: Callable[[], float]) -> float:
    """Time of a forward pass over all batches, after one that prepares kernels."""
    with torch.inference_mode():
        model(input_ids=batches[0].ids.to(model.device), use_cache=False)
        start = clock()
        for batch in batches:
            model(input_ids=batch.ids.to(model.device), use_cache=False)
        return clock() - start


def add_build(table: Table, dtype: str, layers: str, found: dict[str, Any]) -> None:
    ratio = found["seconds"] / found["plain"]
    table.add(dtype, layers, f"{found['plain']:.1f}", f"{found['seconds']:.1f}", f"{ratio:.2f}", f"{found['peak']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--documents", type=int, default=20, help="calibration documents of each corpus; default: 20")
    parser.add_argument("--dtype", default="auto", help="what the base runs in; default: auto")
    parser.add_argument("--builds", action="store_true", help="only whole builds: float32, bfloat16, layers streamed")
    parser.add_argument("--mixture", action="store_true", help="only a profile's passes over a mixture of experts")
    parser.add_argument("--save", action="store_true", help="save the table of --mixture in bench/results")
    parser.add_argument("--one", choices=[*METHODS, *OURS], help="measure one method here, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.mixture:
        with tempfile.TemporaryDirectory() as temporary:
            table, tokens = mixture(arguments.documents, Path(temporary))
        threads = torch.get_num_threads()
        note = (
            f"{MIXTURE_LAYERS} layers of Qwen3 30B A3B with widths divided by {MIXTURE_PART}, random weights, a "
            f"vocabulary of {MIXTURE_VOCABULARY:,}; {tokens:,} tokens in float32; {threads} thread{'s' * (threads > 1)}."
        )
        if arguments.save:
            save_table("cost_mixture", table, made(), note)
        print(f"{table}\n\n{note}")
        return
    if arguments.data is None:
        parser.error("--data: give the folder of data, or --mixture")
    if arguments.one:
        print(json.dumps(measure(Bench(arguments.data.resolve()), arguments.one, arguments.documents, arguments.dtype)))
        return
    if arguments.builds:
        builds(arguments.data, arguments.documents)
        return
    table = Table(["method", "time over a plain forward pass", "peak memory (GiB)", "beyond the running model"])
    command = [sys.executable, "-m", "bench.cost", f"--data={arguments.data}", f"--documents={arguments.documents}"]
    for name in (*METHODS, *OURS):
        run = subprocess.run([*command, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        more = found["peak"] - found["before"]
        table.add(name, f"{found['seconds'] / found['plain']:.2f}", f"{found['peak']:.2f}", f"{more:.2f}")
    note = f"{found['tokens']:,} tokens; plain forward pass {found['plain']:.1f} s; {torch.get_num_threads()} threads."
    save_table("cost", table, made(), note)
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    main()
