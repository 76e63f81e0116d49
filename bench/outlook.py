"""What `expertprune forecast` foresees, beside experts that were built and measured.

    OMP_NUM_THREADS=1 python -m bench.outlook --data DATA --save

The experts are cells like those of `bench.quality`: a part of the FFN neurons of SmolLM2, Gemma 3
270M or Qwen2.5-Coder-1.5B goes, calibrated on PubMedQA (the dimension) and WikiText-2 (general
text), and report rows of both are measured. Those without a stored result are built first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import expertprune
from expertprune.progress import silent
from expertprune.stages.compose import plan_of
from expertprune.stages.outlook import expected, profiled

from .cells import GEMMA, SMOLLM, Bench, Cell, Result
from .instruct import QWEN
from .measure import excess
from .quality import Get
from .records import PACKAGES, Table, described, made, save_table

SETS = {"domain/medical": "PubMedQA", "general/encyclopedia": "WikiText-2"}
SIZES = {SMOLLM: (0.1, 0.2, 0.25, 0.3, 0.4), GEMMA: (0.1, 0.15, 0.2, 0.25), QWEN: (0.1, 0.2, 0.25, 0.4)}
SHAPES = {
    SMOLLM: Cell("base", piqa=0, dtype="bfloat16"),
    GEMMA: Cell("base", model=GEMMA, sets=("PubMedQA", "WikiText-2", "XQuAD-de"), blocks=8, piqa=0, documents=40),
    QWEN: Cell("base", model=QWEN, sets=("PubMedQA", "WikiText-2"), blocks=8, piqa=0, dtype="bfloat16", documents=12),
}


def cells() -> Iterator[Cell]:
    """The experts, those of a base one after the other."""
    for model, sizes in SIZES.items():
        for size in sizes:
            yield replace(SHAPES[model], method="ours", budget={"ffn": size})


def foreseen(bench: Bench, cell: Cell) -> dict[str, float]:
    """The excess that is foreseen of each corpus, by the name of its set."""
    prepared = expertprune.validate(bench.spec(replace(cell, dtype="bfloat16")))
    profiles = profiled(prepared)
    found = expected(prepared, plan_of(prepared, silent), profiles)
    return {name: found[corpus].excess for corpus, name in SETS.items()}


def table(bench: Bench, get: Get) -> tuple[Table, list[Result]]:
    """Foreseen, measured, and their ratio, by expert and set."""
    columns = [text for name in SETS.values() for text in (f"{name}: foreseen", "measured (95%)", "ratio")]
    found, used = Table(["base", "removed", *columns]), []
    for cell in cells():
        base, expert = get(SHAPES[cell.model]), get(cell)
        used += [base, expert]
        row = []
        for name, value in foreseen(bench, cell).items():
            lost = excess(base.sums[name], expert.sums[name])
            row += [
                f"{value:.3f}",
                f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})",
                f"{value / lost.value:.2f}",
            ]
        found.add(cell.model, f"{cell.budget['ffn']:.0%}", *row)
    return found, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results/")
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve())
    found, used = table(bench, bench.run)
    print(found)
    if arguments.save:
        experts = described(each.made for each in used).replace("\n", " ")
        save_table("outlook", found, made(PACKAGES), f"Experts: {experts} Foreseen:")


if __name__ == "__main__":
    main()
