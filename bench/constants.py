"""Which fusion keeps most, and with which constants, on calibration rows that calibrated nothing.

    python -m bench.constants --data DATA [--seeds 2]

The cell of `bench.quality`'s table of peers (25% of SmolLM2's FFN neurons), without repair and
masked in place of cut, once for each choice of `compose.fusion` and each seed of the calibration
text. A row is the mean over seeds. Measured on pieces of the calibration files that the cell does
not profile; none of them is a report row. The excess is `ln(expert / base)` of the perplexity of
512-token blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np

import expertprune
from expertprune.composition.defaults import resolved
from expertprune.composition.plan import compose
from expertprune.models.masking import masked
from expertprune.progress import silent
from expertprune.stages.profile import profiles_of
from expertprune.stages.validate import Prepared

from .cells import Bench, Cell
from .measure import Blocks, blocks, excess, losses
from .quality import UNREPAIRED
from .records import Table, made, save_table

PIECES = 400
# Corpora of calibration rows, and how many blocks of each are measured.
HELD_OUT = {"medical": 12, "encyclopedia": 12, "math": 6}
WEIGHTED, EXCLUSIVE = "weighted", "shared_exclusive"
CHOICES: list[dict[str, Any]] = [
    *({"method": WEIGHTED, "lambda": weight} for weight in (0.1, 0.25, 0.5)),
    *(
        {"method": EXCLUSIVE, "tau": tau, "lambda": weight, "beta": beta}
        for tau, weight, beta in (
            (0.1, 0.5, 0.5), (0.1, 0.25, 0.5), (0.3, 0.5, 0.5), (0.3, 0.25, 0.5), (0.1, 0.5, 0.75), (0, 0.5, 1)
        )
    ),
]  # fmt: skip


def held_out(bench: Bench, prepared: Prepared) -> dict[str, Blocks]:
    """Blocks of pieces that none of the cell's corpora profiles, from the last of each file."""
    taken = {document.text for name in prepared.corpora for document in prepared.calibration[name].documents}
    found = {}
    for name, count in HELD_OUT.items():
        with jsonlines.open(bench.pieces(name)) as rows:
            free = [row for row in rows if row["text"] not in taken]
        with tempfile.TemporaryDirectory() as folder:
            with jsonlines.open(path := Path(folder) / "held-out.jsonl", "w") as file:
                file.write_all(free[-PIECES:])
            found[name] = blocks(path, prepared.base.tokenizer, count)
    return found


def losses_of(bench: Bench, seed: int) -> Iterator[list[float]]:
    """The excess on each held-out set, choice by choice, with one seed."""
    cell = Cell("ours", overrides=UNREPAIRED, seed=seed)
    prepared = expertprune.validate(bench.spec(cell))
    sets = held_out(bench, prepared)
    model, profiles = prepared.running.model, profiles_of(prepared, silent)
    dense = {name: losses(model, found) for name, found in sets.items()}
    for choice in CHOICES:
        spec = bench.spec(replace(cell, overrides={**UNREPAIRED, "compose.fusion": choice}))
        plan = compose(resolved(spec, prepared.base), prepared.base, profiles)
        with masked(model, prepared.base.family, prepared.base.layers, plan.kept):
            yield [excess(dense[name], losses(model, found)).value for name, found in sets.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the calibration text; default: 2")
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve())
    table = Table(["fusion", "λ", "τ", "β", *HELD_OUT, "mean"])
    found = [losses_of(bench, seed) for seed in range(arguments.seeds)]
    for choice in CHOICES:
        values = np.mean([next(row) for row in found], axis=0)
        constants = [f"{choice[key]:g}" if key in choice else "" for key in ("lambda", "tau", "beta")]
        table.add(choice["method"], *constants, *(f"{value:.3f}" for value in (*values, values.mean())))
    save_table("constants", table, made())
    print(table)


if __name__ == "__main__":
    main()
