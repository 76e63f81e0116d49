"""Five different builds: what was forecast of each stage, and what it took.

    OMP_NUM_THREADS=1 python -m bench.forecast [--documents 16] [--only NAME ...] [--processor] [--save]

Each build runs in a process of its own (see `bench.scale`). A machine that does other work makes all seconds longer,
and not by the same factor. `--processor` then counts those of the processor, which mean something with one thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from .records import Table, made, save_table
from .scale import SHAPES, WIDTHS, Watched, make_checkpoint, table_of, watch_build, write_text

SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
BUILDS: dict[str, dict[str, Any]] = {
    "default": {"base": SMOLLM, "budget": {"ffn": 0.25}},
    "vocabulary and heads": {"base": SMOLLM, "budget": {"ffn": 0.2, "kv_groups": 1, "vocabulary": {"keep": 24576}}},
    "vocabulary of Gemma": {"base": GEMMA, "budget": {"vocabulary": {"keep": 65536}}},
    "mixture": {"base": "mixture", "budget": {"experts": 0.25}},
    "streamed": {"base": {"model": SMOLLM, "layers": "streamed"}, "budget": {"ffn": 0.25}},
}
MIXTURE_LAYERS, MIXTURE_PART = 4, 4  # of Qwen3 30B A3B: layers that are made, and what widths are divided by


def spec_of(name: str, folder: Path, documents: int) -> Path:
    """The spec of a build; a base of random weights is made."""
    build, source = BUILDS[name], {}
    base = build["base"]
    if base == "mixture":
        family, config, _ = SHAPES["qwen3-30b-a3b"]
        config = config | {key: value // MIXTURE_PART for key, value in config.items() if key in WIDTHS}
        base = str(folder / "mixture")
        make_checkpoint(Path(base), family, config | {"num_hidden_layers": MIXTURE_LAYERS})
        for seed, part in enumerate(("path", "evaluation")):
            write_text(folder / f"{part}.jsonl", documents, 60, seed)
            source[part] = f"{part}.jsonl"
    corpora = {"corpora": {"sources": {"medical": source}}} if source else {}
    spec = {
        "name": name.replace(" ", "-"),
        "base": base,
        "dimensions": {"domain": "medical"},
        "general": [] if source else ["general"],
        **corpora,
        "budget": build["budget"],
        "calibration": {"documents": documents},
        "evaluate": {"documents": documents},
    }
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def measured(name: str, documents: int, processor: bool) -> Watched:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        return watch_build(spec_of(name, folder, documents), folder / "expert", folder / "store", processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16, help="of each corpus, to calibrate and to evaluate on")
    parser.add_argument("--only", nargs="+", choices=BUILDS, default=list(BUILDS))
    parser.add_argument("--processor", action="store_true", help="count seconds of the processor")
    parser.add_argument("--save", action="store_true", help="save the table in bench/results")
    chosen = parser.parse_args()
    rows = Table(["build", "stage", "forecast (s)", "measured (s)", "forecast (GiB)", "measured (GiB)"])
    load = os.getloadavg()[0]
    for name in chosen.only:
        for row in table_of(measured(name, chosen.documents, chosen.processor)).rows:
            rows.add(name, *row)
        print(rows, flush=True)
    seconds = "seconds of the processor" if chosen.processor else "seconds that passed"
    note = (
        f"{chosen.documents} documents a corpus; {torch.get_num_threads()} threads; {seconds}; load of the machine "
        f"before: {load:.1f}."
    )
    print(note)
    if chosen.save:
        save_table("forecast", rows, made(), note)


if __name__ == "__main__":
    main()
