"""What a byte buys: a base and an expert of it, as they are and with weights of 8 and 4 bits.

    OMP_NUM_THREADS=1 python -m bench.bytes --data DATA --save

SmolLM2, and an expert without a quarter of its FFN neurons, as in the table of peers that repair
too: PubMedQA and WikiText-2 calibrate, seed 0, and both run in bfloat16. The weights of all linear
layers of the decoder go to fewer bits (`bench/rounding.py`); embeddings, output and norms stay in
bfloat16, as llm-compressor leaves them by default. GPTQ calibrates on the same text as the expert.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import expertprune

from .cells import Bench, Cell, built
from .measure import Sums, excess, losses
from .records import PACKAGES, Table, made, save_table
from .rounding import Scheme, bytes_of, quantized

SCHEMES = {
    "bfloat16": None,
    "int8 to nearest": Scheme(8, grouped=False),
    "4 bits to nearest": Scheme(4, grouped=True),
    "4 bits by GPTQ": Scheme(4, grouped=True, gptq=True),
}
SHAPE = Cell("base", piqa=0, dtype="bfloat16")
CELLS = {"base": SHAPE, "without 25% of the FFN": Cell("ours", piqa=0, dtype="bfloat16")}


def table(bench: Bench) -> Table:
    """Base and expert by scheme: bytes, and what is lost against the base in bfloat16."""
    columns = [text for name in SHAPE.sets for text in (name, "excess ln (95%)")]
    found = Table(["model", "weights", "MB", "of the base's", *columns])
    base: dict[str, Sums] = {}
    whole = 0
    for name, cell in CELLS.items():
        prepared = expertprune.validate(bench.spec(cell))
        model, _ = built(cell, prepared, {})
        for weights, scheme in SCHEMES.items():
            small, size = (
                (model, bytes_of(model)) if scheme is None else quantized(model, scheme, prepared.repair_batches())
            )
            sums = {each: losses(small, bench.blocks(prepared, each, cell.blocks)) for each in cell.sets}
            base, whole = base or sums, whole or size
            texts = []
            for each in cell.sets:
                lost = excess(base[each], sums[each])
                texts += [f"{sums[each].perplexity:.2f}", f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})"]
            found.add(name, weights, f"{size / 1e6:.1f}", f"{size / whole:.1%}", *texts)
            print(" | ".join(found.rows[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results/")
    arguments = parser.parse_args()
    found = table(Bench(arguments.data.resolve()))
    if arguments.save:
        save_table("bytes", found, made(PACKAGES))


if __name__ == "__main__":
    main()
