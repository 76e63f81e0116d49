"""Which constants of the fusion are best, on calibration rows that calibrated nothing: where the defaults come from.

    python -m bench.constants --data DATA

The cell of `bench.quality`'s table of peers (25% of SmolLM2's FFN neurons), without repair and masked in place of cut, once
for each choice of `compose.fusion`. Measured on pieces of the calibration files that the cell does not profile, so that no
report row chooses anything. The excess is `ln(expert / base)` of the perplexity of 512-token blocks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonlines

from expertprune import api
from expertprune.masking import masked

from .cells import Bench, Cell, threads
from .measure import Blocks, blocks, excess, losses
from .quality import UNREPAIRED

PIECES = 400
# Corpora of calibration rows, and how many blocks of each are measured.
HELD_OUT = {"medical": 12, "encyclopedia": 12, "math": 6}
DEFAULT = {"tau": 0.1, "lambda": 0.5, "beta": 0.5}
CHOICES: list[dict[str, float]] = [
    {},
    {"tau": 0.0}, {"tau": 0.03}, {"tau": 0.3}, {"tau": 1.0},
    {"lambda": 0.3}, {"lambda": 0.7},
    {"beta": 0.25}, {"beta": 0.75}, {"beta": 1.0},
    {"tau": 0.0, "beta": 1.0},
]  # fmt: skip


def held_out(bench: Bench, prepared: Any) -> dict[str, Blocks]:
    """Blocks of pieces that none of the cell's corpora profiles, from the last of each file."""
    taken = {document.text for name in prepared.corpora for document in prepared.calibration(name)[0]}
    found = {}
    for name, count in HELD_OUT.items():
        with jsonlines.open(bench.pieces(name)) as rows:
            free = [row for row in rows if row["text"] not in taken]
        with tempfile.TemporaryDirectory() as folder:
            with jsonlines.open(path := Path(folder) / "held-out.jsonl", "w") as file:
                file.write_all(free[-PIECES:])
            found[name] = blocks(path, prepared.tokenizer, count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data.resolve())
    cell = Cell("ours", overrides=UNREPAIRED)
    prepared = api.validate(bench.spec(cell))
    sets = held_out(bench, prepared)
    model = prepared.model
    dense = {name: losses(model, found) for name, found in sets.items()}
    print("| τ | λ | β | " + " | ".join(sets) + " | mean |\n" + "|---" * (len(sets) + 4) + "|", flush=True)
    for choice in CHOICES:
        constants = {**DEFAULT, **choice}
        overrides = {**UNREPAIRED, **{f"compose.fusion.{key}": value for key, value in constants.items()}}
        here = api.validate(bench.spec(replace(cell, overrides=overrides)))
        here.share(prepared)
        plan = api.plan_of(here, api.silent)
        with masked(model, here.base.family, here.base.layers, plan.kept):
            values = [excess(dense[name], losses(model, found)).value for name, found in sets.items()]
        columns = [*(f"{constants[key]:g}" for key in DEFAULT), *(f"{value:.3f}" for value in values)]
        print("| " + " | ".join([*columns, f"{sum(values) / len(values):.3f}"]) + " |", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("expertprune", "torch", "transformers")}
    print("\n" + json.dumps({**versions, "threads": threads(), "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
