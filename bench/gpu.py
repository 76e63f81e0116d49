"""What a build takes on a GPU: time over a plain forward pass, and time and memory beside the forecast.

    python -m bench.gpu [--documents 256] [--only NAME ...] [--folder FOLDER] [--save]

The bases have random weights, made on the GPU: exactly the shapes of Llama 3.1 8B, with its layers resident and
streamed, and some layers of Qwen3 30B A3B. Each build runs in a process of its own, behind a plain forward pass over
the same batches. It is not evaluated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import expertprune
from expertprune.engine.memory import peak
from expertprune.models.loading import load_model
from expertprune.progress import silent
from expertprune.stages.compose import plan_of
from expertprune.stages.forecast import forecast
from expertprune.stages.profile import profiles_of
from expertprune.stages.prune import write_folder

from .cost import plain_seconds
from .records import Table, made, save_table
from .scale import SHAPES, make_checkpoint, write_text

WORDS = 170  # of a document; with its spaces, each is six tokens
BUILDS: dict[str, tuple[str, int, str]] = {
    "Llama 3.1 8B": ("llama-8b", 32, "resident"),
    "Llama 3.1 8B, streamed": ("llama-8b", 32, "streamed"),
    "12 layers of Qwen3 30B A3B": ("qwen3-30b-a3b", 12, "resident"),
}
STAGES = ("load", "profile", "repair", "write")
GIB = 2**30


@dataclass
class Taken:
    """Seconds of each stage, and the largest memory of the GPU's tensors in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        start = clock()
        yield
        self.seconds[name] = clock() - start
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())


def clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def spec_of(name: str, documents: int, folder: Path) -> Path:
    """The spec of a build in a folder, where its base and text are made if they are not there."""
    shapes, layers, source = BUILDS[name]
    family, config, budget = SHAPES[shapes]
    model = folder / f"{shapes}-{layers}"
    make_checkpoint(model, family, config | {"num_hidden_layers": layers}, "cuda")
    write_text(folder / "text.jsonl", documents, WORDS, 0)
    spec = {
        "name": "gpu",
        "base": {"model": str(model), "layers": source},
        "dimensions": {"domain": ["text"]},
        "general": [],
        "corpora": {"sources": {"text": {"path": "text.jsonl"}}},
        "budget": budget,
        "relevance": "fisher",
        "calibration": {"documents": documents, "max_tokens": 1024},
        "evaluate": {"enabled": False},
    }
    path = folder / f"{source}-{shapes}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def measure(name: str, documents: int, folder: Path) -> dict[str, Any]:
    """A plain forward pass and a build, in this process."""
    spec, taken = spec_of(name, documents, folder), Taken()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out, store = Path(temporary) / "expert", Path(temporary) / "store"
        out.mkdir()
        prepared = expertprune.validate(spec, store=store)
        batches = prepared.repair_batches()
        foreseen = forecast(prepared)
        model = load_model(prepared.base.folder, prepared.base.dtype, prepared.base.device)
        plain = plain_seconds(model, batches, clock)
        del model
        torch.cuda.empty_cache()
        with taken.stage("load"):
            _ = prepared.running.model
        prepared.running.keep_states()  # as `build` does
        with taken.stage("profile"):
            profiles_of(prepared, silent)
        with taken.stage("repair"):
            write_folder(prepared, plan_of(prepared, silent), out, _timing(taken))
    taken.seconds["repair"] -= taken.seconds["write"]
    expected = {stage.name.split()[0]: stage.seconds for stage in foreseen.stages}
    return {
        "plain": plain,
        "seconds": taken.seconds,
        "forecast": expected,
        "peak": taken.peak,
        "expected": peak(stage.memory for stage in foreseen.stages).device,
        "tokens": sum(batch.tokens for batch in batches),
        "gpu": torch.cuda.get_device_name(),
    }


def _timing(taken: Taken) -> Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]:
    """A track that takes the seconds behind the last layer's repair for those of writing."""

    @contextlib.contextmanager
    def track(stage: str, steps: int) -> Iterator[Callable[[], None]]:
        last = [time.perf_counter()]

        def step() -> None:
            last[0] = time.perf_counter()

        yield step
        taken.seconds["write"] = time.perf_counter() - last[0]

    return track


def add_build(table: Table, name: str, found: dict[str, Any]) -> None:
    seconds, plain = found["seconds"], found["plain"]
    expected, measured = sum(found["forecast"].values()), sum(seconds.values())
    table.add(
        name,
        f"{plain:.1f}",
        *(f"{seconds[each]:.1f}" for each in STAGES),
        f"{(seconds['profile'] + seconds['repair']) / plain:.2f}",
        f"{expected:.0f} / {measured:.0f}",
        f"{found['expected'] / GIB:.1f} / {found['peak'] / GIB:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=256, help="of about a thousand tokens; default: 256")
    parser.add_argument("--only", nargs="+", choices=BUILDS, default=list(BUILDS))
    parser.add_argument("--folder", type=Path, help="where bases and experts go; default: a temporary folder")
    parser.add_argument("--one", choices=BUILDS, help="measure one build here, and print it as JSON")
    parser.add_argument("--save", action="store_true", help="save the table in bench/results")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    table = Table(
        [
            "base",
            "plain forward pass (s)",
            *(f"{stage} (s)" for stage in STAGES),
            "profile and repair over pass",
            "forecast / measured (s)",
            "forecast / measured (GiB)",
        ]
    )
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if chosen.one:
            print(json.dumps(measure(chosen.one, chosen.documents, folder)))
            return
        for name in chosen.only:
            command = [sys.executable, "-m", "bench.gpu", "--one", name, f"--documents={chosen.documents}"]
            run = subprocess.run([*command, f"--folder={folder}"], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            add_build(table, name, found)
            print(table, flush=True)
    note = f"{found['gpu']}; {found['tokens']:,} tokens; random weights in bfloat16."
    print(note)
    if chosen.save:
        save_table("gpu", table, made(), note)


if __name__ == "__main__":
    main()
