"""What `expertprune forecast` foresees, beside experts that were built and measured.

    OMP_NUM_THREADS=1 python -m bench.outlook --data DATA --save

The experts are cells like those of `bench.quality`: a part of the FFN neurons of SmolLM2, Gemma 3
270M or Qwen2.5-Coder-1.5B goes, calibrated on PubMedQA (the dimension) and WikiText-2 (general
text), and report rows of both are measured. Those without a stored result are built first. The last
column of a set is the ratio where the base's expert of 25% corrects the others (`forecast --built`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import expertprune
from expertprune.composition.excess import Foreseen, times_lost
from expertprune.stages.outlook import Foreseeing, profiled

from .cells import GEMMA, SMOLLM, Bench, Cell, Result
from .instruct import QWEN
from .measure import excess
from .quality import Get
from .records import PACKAGES, Table, described, made, save_table

BUILT = 0.25  # the expert of each base that corrects the others
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


def foreseen(bench: Bench, cell: Cell) -> dict[str, Foreseen]:
    """What is foreseen of each corpus, by the name of its set."""
    prepared = expertprune.validate(bench.spec(replace(cell, dtype="bfloat16")))
    _, found = Foreseeing(profiled(prepared)).sized(prepared, {})
    return {name: found[corpus] for corpus, name in SETS.items()}


def table(bench: Bench, get: Get) -> tuple[Table, list[Result]]:
    """Foreseen, measured, and their ratio, by expert and set, without and with one expert that was built."""
    columns = ["foreseen", "measured (95%)", "ratio", "by --built"]
    found = Table(["base", "removed", *(f"{name}: {each}" for name in SETS.values() for each in columns)])
    used, times = [], {}
    for cell in cells():
        if cell.model not in times:
            built, alone = _kept(get, _built(cell)), foreseen(bench, _built(cell))
            times[cell.model] = {name: times_lost(built[name], alone[name].retention) for name in built}
        base, expert, kept = get(SHAPES[cell.model]), get(cell), _kept(get, cell)
        used += [base, expert]
        row = []
        for name, said in foreseen(bench, cell).items():
            lost = excess(base.sums[name], expert.sums[name])
            corrected = times[cell.model][name] / times_lost(kept[name], said.retention)
            row += [
                f"{said.excess:.3f}",
                f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})",
                f"{said.excess / lost.value:.2f}",
                "" if cell == _built(cell) else f"{corrected:.2f}",
            ]
        found.add(cell.model, f"{cell.budget['ffn']:.0%}", *row)
    return found, used


def _built(cell: Cell) -> Cell:
    """The expert that corrects the others of its base."""
    return replace(cell, budget={"ffn": BUILT})


def _kept(get: Get, cell: Cell) -> dict[str, float]:
    """The loss of the base over that of the expert, by set."""
    base, expert = get(SHAPES[cell.model]), get(cell)
    losses = {name: (base.sums[name], expert.sums[name]) for name in SETS.values()}
    return {name: float(before.nats.sum() / after.nats.sum()) for name, (before, after) in losses.items()}


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
