"""What a byte buys: a base and an expert of it, as they are and with weights of 8 and 4 bits.

    OMP_NUM_THREADS=1 python -m bench.bytes --data DATA [--weights int8 ...]

SmolLM2, and an expert without a quarter of its FFN neurons, as in the table of peers that repair
too: PubMedQA and WikiText-2 calibrate, seed 0. Both are stored in bfloat16 and run in float32. The
weights of all linear layers of the decoder go to fewer bits (`bench/rounding.py`); embeddings, output
and norms stay in bfloat16, as llm-compressor leaves them by default. GPTQ calibrates on the same
text as the expert. What was measured is kept in `bench/results/`, row by row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import expertprune

from .cells import Bench, Cell, built
from .measure import Sums, excess, losses
from .records import RESULTS, Table, described, made, read, write
from .rounding import Scheme, bytes_of, quantized

SCHEMES = {
    "bfloat16": None,
    "int8": Scheme(8, grouped=False),
    "4 bits": Scheme(4, grouped=True),
    "4 bits, GPTQ": Scheme(4, grouped=True, gptq=True),
}
SHAPE = Cell("base", piqa=0, dtype="float32")
CELLS = {"base": SHAPE, "expert": Cell("ours", piqa=0, dtype="float32")}


def path_of(model: str, weights: str) -> Path:
    """Where a row is kept."""
    return RESULTS / f"bytes-{model}-{weights.replace(', ', '-').replace(' ', '-').lower()}.json"


def measure(bench: Bench, name: str, weights: list[str]) -> None:
    """Measure a model's rows, and keep each. Of the model as it is, the cell of the other tables counts."""
    cell = CELLS[name]
    prepared = expertprune.validate(bench.spec(cell))
    model, _ = built(cell, prepared, {})
    for bits in weights:
        scheme = SCHEMES[bits]
        if scheme is None:
            size, sums = bytes_of(model), bench.run(cell).sums
        else:
            small, size = quantized(model, scheme, prepared.repair_batches())
            sums = {each: losses(small, bench.blocks(prepared, each, cell.blocks)) for each in cell.sets}
        kept = {each: {"nats": s.nats.tolist(), "tokens": s.tokens.tolist()} for each, s in sums.items()}
        write(path_of(name, bits), {"model": name, "weights": bits, "bytes": size, "sums": kept, "made": made()})
        print(f"\n{text()}", flush=True)


def _sums(row: dict[str, Any]) -> dict[str, Sums]:
    return {name: Sums(np.array(each["nats"]), np.array(each["tokens"])) for name, each in row["sums"].items()}


def text() -> str:
    """The table of all rows that were measured: bytes, and what is lost against the base as it is."""
    paths = [path_of(model, weights) for model in CELLS for weights in SCHEMES]
    rows = [read(path) for path in paths if path.is_file()]
    base = read(path_of("base", "bfloat16"))
    columns = [part for name in SHAPE.sets for part in (name, "excess ln (95%)")]
    found = Table(["model", "weights", "MB", "of the base's", *columns])
    for row in rows:
        cells = [row["model"], row["weights"], f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / base['bytes']:.1%}"]
        for sums, before in zip(_sums(row).values(), _sums(base).values(), strict=True):
            lost = excess(before, sums)
            cells += [f"{sums.perplexity:.2f}", f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})"]
        found.add(*cells)
    return f"{found}\n\n{described(row['made'] for row in rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--weights", nargs="*", choices=list(SCHEMES), default=list(SCHEMES), help="default: all")
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve())
    for name in CELLS:
        measure(bench, name, arguments.weights)


if __name__ == "__main__":
    main()
