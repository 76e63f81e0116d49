"""What is kept at a given size: expertprune against its peers, its own parts, its dimensions, its fusion.

    python -m bench.quality --data DATA [--table peers ...] [--seeds 3]

DATA is a folder of JSON lines: `domain/pubmedqa_*`, `general/wikitext2_*`, `general/piqa_report`, `task/gsm8k_*`,
`language/xquad_{de,en,th}_*`, each with `_calibration.jsonl` and `_report.jsonl`. Calibration rows are profiled, report rows
are measured and choose nothing. A finished cell is kept in `bench/results/` by the digest of all that it depends on, so a
run that was interrupted goes on, and the tables can be printed again without a model.

Every method of one table is given the same calibration text. Perplexity is of blocks of 512 tokens; the excess is
`ln(expert / base)`, with its 95% interval over documents (paired bootstrap).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cells import GEMMA, RESULTS, Bench, Cell, Result, threads
from .measure import Excess, Sums, excess

# Cus-Prun alone: three dimensions, exact output change, their intersection; no general corpus, no repair.
CUS_PRUN = Cell(
    "ours",
    dimensions={"language": "encyclopedia", "domain": "abstracts", "task": "qa"},
    general=(),
    overrides={
        "relevance.criterion": "impact", "compose.rule": "intersection", "compose.allocation": "uniform",
        "compensation": "none",
    },
)  # fmt: skip
UNREPAIRED = {"compensation": "none"}
CRITERIA = ("magnitude", "activation", "impact", "fluctuation", "taylor", "fisher", "regional")


class Table:
    """Rows of a table in Markdown, printed as they come."""

    def __init__(self, bench: Bench, title: str, *columns: str) -> None:
        self.bench = bench
        print(f"\n### {title}\n")
        print("| " + " | ".join(columns) + " |")
        print("|" + "---|" * len(columns), flush=True)

    def add(self, *cells: str) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)

    def measured(self, cells: Sequence[Cell], base: Result) -> list[str]:
        """Per set: perplexity and excess; then PIQA; over all seeds together."""
        results = [self.bench.run(cell) for cell in cells]
        columns = []
        for name in cells[0].sets:
            columns += _losses([result.sums[name] for result in results], base.sums[name])
        if cells[0].piqa:
            columns.append(f"{np.mean([result.piqa for result in results]):.3f}")
        return columns

    def differences(self, cell: Cell, other: Result) -> list[str]:
        """Per set: excess over another expert, paired by document; below zero where the cell's is the better one."""
        result = self.bench.run(cell)
        return [_signed(excess(other.sums[name], result.sums[name])) for name in cell.sets]


def _signed(found: Excess) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _losses(sums: Sequence[Sums], base: Sums) -> list[str]:
    """Perplexity, and excess with its interval over documents and, where there are several seeds, their range."""
    mean = Sums(np.mean([each.nats for each in sums], axis=0), sums[0].tokens)
    found = excess(base, mean)
    text = f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    if len(sums) > 1:
        values = [excess(base, each).value for each in sums]
        text += f"; seeds {min(values):.3f} to {max(values):.3f}"
    return [f"{mean.perplexity:.2f}", text]


def _columns(cell: Cell) -> list[str]:
    columns = [text for name in cell.sets for text in (name, "excess ln (95%)")]
    return columns + (["PIQA"] if cell.piqa else [])


# The best that stays a stock checkpoint: all layers keep the same widths.
STOCK = {"compose.allocation": "uniform", "relevance.criterion": "impact"}
SHARED_EXCLUSIVE = {"compose.fusion": {"method": "shared_exclusive", "lambda": 0.5}}
OURS: dict[str, dict[str, Any]] = {
    "ours": {}, "ours, shared/exclusive fusion": SHARED_EXCLUSIVE, "ours, stock checkpoint": STOCK,
    "ours, no repair": UNREPAIRED,
}  # fmt: skip
# Magnitude sees no data; SliceGPT takes too long, and is too far off, for more.
ONE_SEED = {"magnitude", "slicegpt"}


def peers(bench: Bench, seeds: Sequence[int]) -> None:
    """A quarter of the FFN neurons (or as many parameters), every method, by seed of the calibration text."""
    shape = Cell("base")
    table = Table(bench, "Against peers: 25% of the FFN neurons of SmolLM2", "method", "removed", *_columns(shape))
    base = bench.run(shape)
    table.add("base", "", *table.measured([shape], base))
    for method in (
        *OURS,
        "flap",
        "wanda_sp",
        "Cus-Prun alone",
        "llm_pruner_taylor",
        "slicegpt",
        "shortgpt",
        "random",
        "magnitude",
    ):
        cell = replace(shape, method=method)
        if method == "Cus-Prun alone":
            cell = replace(CUS_PRUN, documents=40)
        elif method in OURS:
            cell = replace(shape, method="ours", overrides=OURS[method])
        cells = [replace(cell, seed=seed) for seed in (seeds[:1] if method in ONE_SEED else seeds)]
        removed = bench.run(cells[0]).removed
        table.add(method, f"{removed / 1e6:.2f}M", *table.measured(cells, base))


def sizes(bench: Bench, seeds: Sequence[int]) -> None:
    """The best methods at other sizes, heads included."""
    shape = Cell("base")
    table = Table(bench, "At other sizes of SmolLM2", "budget", "method", "removed", *_columns(shape))
    base = bench.run(shape)
    for fraction in (0.1, 0.2, 0.3, 0.4):
        for method in ("flap", "ours"):
            cell = replace(shape, method=method, budget={"ffn": fraction})
            removed = bench.run(cell).removed
            table.add(f"{fraction:.0%} of FFN", method, f"{removed / 1e6:.2f}M", *table.measured([cell], base))
    # All block parameters: 106,168,320 less norms of the 134,515,008; a quarter of them, FFN and heads together.
    share = 0.25 * 106_168_320 / 134_515_008
    for method in ("flap_heads", "ours"):
        # The peer's fraction is of the FFN's 79,626,240 parameters, wherever it takes them.
        budget = {"ffn": 0.25 * 106_168_320 / 79_626_240} if method == "flap_heads" else {"parameters": share}
        cell = replace(shape, method=method, budget=budget)
        removed = bench.run(cell).removed
        what = "25% of the blocks' parameters"
        table.add(what, method, f"{removed / 1e6:.2f}M", *table.measured([cell], base))


def gemma(bench: Bench, seeds: Sequence[int]) -> None:
    """The most telling methods on another family: a norm behind every block, one KV head."""
    shape = Cell("base", model=GEMMA, sets=("PubMedQA", "WikiText-2", "XQuAD-de"), blocks=8, piqa=0, documents=40)
    table = Table(bench, "Against peers on Gemma 3 270M", "budget", "method", "removed", *_columns(shape))
    base = bench.run(shape)
    table.add("base", "", "", *table.measured([shape], base))
    for fraction, methods in (
        (0.15, ("ours", "ours, no repair", "flap", "wanda_sp", "llm_pruner_taylor")),
        (0.25, ("ours", "flap")),
    ):
        for method in methods:
            cell = replace(shape, method=method, budget={"ffn": fraction})
            if method in OURS:
                cell = replace(cell, method="ours", overrides=OURS[method])
            removed = bench.run(cell).removed
            table.add(f"{fraction:.0%} of FFN", method, f"{removed / 1e6:.2f}M", *table.measured([cell], base))


PARTS: dict[str, dict[str, Any]] = {
    "ours (all parts as by default)": {},
    "intersection → mean": {"compose.rule": "mean"},
    "intersection → union": {"compose.rule": "union"},
    "fusion → shared/exclusive": SHARED_EXCLUSIVE,
    "fusion → the expert's score alone": {"compose.fusion": {"lambda": 0}},
    "global → uniform allocation": {"compose.allocation": "uniform"},
    "no repair": {"compensation": "none"},
}


def parts(bench: Bench, seeds: Sequence[int]) -> None:
    """Leave one out, or put one in; beside each set the difference to the default, paired by document."""
    dimensions = {"language": "encyclopedia", "domain": "abstracts", "task": "qa"}
    shape = Cell("base", dimensions=dimensions, general=("encyclopedia", "math"), documents=40, piqa=0)
    columns = [text for name in shape.sets for text in (f"{name}: excess ln", "more than the default's (95%)")]
    table = Table(bench, "Does every part pay? 25% of FFN, SmolLM2", "part", *columns)
    base, ours = bench.run(shape), bench.run(replace(shape, method="ours"))
    for name, overrides in PARTS.items():
        cell = replace(shape, method="ours", overrides=overrides)
        found = [f"{excess(base.sums[each], bench.run(cell).sums[each]).value:.3f}" for each in cell.sets]
        against = table.differences(cell, ours) if overrides else [""] * len(found)
        table.add(name, *(text for pair in zip(found, against, strict=True) for text in pair))


def dimensions(bench: Bench, seeds: Sequence[int]) -> None:
    """Gemma: calibrated for one value, measured on all."""
    sets = ("XQuAD-de", "XQuAD-en", "XQuAD-th", "PubMedQA")
    shape = Cell("base", model=GEMMA, sets=sets, blocks=6, piqa=0, general=(), documents=40)
    table = Table(bench, "Dimensions on Gemma 3 270M: FFN cut for one value", "for", "FFN", "repair", *_columns(shape))
    base = bench.run(shape)
    table.add("base", "", "", *table.measured([shape], base))
    values = {"de": "language", "en": "language", "th": "language", "medical": "domain"}
    for fraction, repair in ((0.15, "least_squares"), (0.25, "least_squares"), (0.15, "none")):
        for value, dimension in values.items():
            cell = replace(
                shape, method="ours", budget={"ffn": fraction}, dimensions={dimension: value},
                overrides={"compensation.method": repair},
            )  # fmt: skip
            table.add(value, f"{fraction:.0%}", repair.replace("_", " "), *table.measured([cell], base))
    composed = {"language": "de", "domain": "abstracts", "task": "qa"}
    for name, chosen in (("de + medical + qa", composed), *((v, {d: v}) for d, v in composed.items())):
        cell = replace(shape, method="ours", budget={"ffn": 0.15}, dimensions=chosen)
        table.add(f"composed: {name}", "15%", "least squares", *table.measured([cell], base))


FUSED = "both, fused"


def task(bench: Bench, seeds: Sequence[int]) -> None:
    """Fused against general-only and task-only calibration, by criterion, unrepaired and repaired."""
    shape = Cell("base", documents=40)
    table = Table(
        bench,
        "Task-aware gain: 25% of each layer's FFN, SmolLM2, unrepaired",
        "criterion",
        "scored on",
        *_columns(shape),
    )
    base = bench.run(shape)
    ways = {
        "expert only": {"general": ()},
        "general only": {"dimensions": {"domain": "encyclopedia"}, "general": ()},
        FUSED: {},
    }
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for criterion in CRITERIA:
        for name, changes in ways.items():
            if criterion == "magnitude" and name != FUSED:
                continue  # it sees no data
            overrides = {"relevance.criterion": criterion, "compose.allocation": "uniform", **UNREPAIRED}
            cell = replace(shape, method="ours", overrides=overrides, **changes)
            table.add(criterion, name, *table.measured([cell], base))
            if criterion != "magnitude":
                found[name].append(bench.run(cell))
    columns = [text for name in shape.sets for text in (f"{name}: mean excess", "fused less")]
    means = Table(bench, "The same, mean over the criteria that see data", "scored on", *columns, "PIQA", "fused more")
    for name, results in found.items():
        cells = []
        for each in shape.sets:
            here, fused = (_mean_excess(base, many, each) for many in (results, found[FUSED]))
            cells += [f"{here:.3f}", "" if name == FUSED else f"{here - fused:+.3f}"]
        right, best = (float(np.mean([result.piqa for result in many])) for many in (results, found[FUSED]))
        means.add(name, *cells, f"{right:.3f}", "" if name == FUSED else f"{best - right:+.3f}")


def _mean_excess(base: Result, results: Sequence[Result], name: str) -> float:
    return float(np.mean([excess(base.sums[name], result.sums[name]).value for result in results]))


def tokens(bench: Bench, seeds: Sequence[int]) -> None:
    """Excess against calibration text, for ours and for FLAP; draws a picture."""
    shape = Cell("base")  # 60 documents: the cells of the table of peers
    table = Table(bench, "How much calibration text pays (25% of FFN, SmolLM2)", "method", "tokens", *_columns(shape))
    base = bench.run(shape)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for documents in (15, 30, 60, 120, 240):
        for method in ("flap", "ours"):
            cell = replace(shape, method=method, documents=documents)
            result = bench.run(cell)
            count = int(result.about["tokens"])
            values = [excess(base.sums[name], result.sums[name]).value for name in ("PubMedQA", "WikiText-2")]
            curves.setdefault(method, []).append((count, values[0], values[1]))
            table.add(method, f"{count:,}", *table.measured([cell], base))
    _draw(curves, RESULTS.parent / "pictures/tokens.png")


def _draw(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, column, title in zip(axes, (1, 2), ("PubMedQA (expert)", "WikiText-2 (general)"), strict=True):
        for (name, points), colour in zip(curves.items(), ("#b35806", "#1f4e9c"), strict=False):
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", color=colour, label=name)
            axis.annotate(
                name, (points[-1][0], points[-1][column]), xytext=(0, 8), textcoords="offset points", ha="right"
            )
        axis.set(xscale="log", title=title, xlabel="calibration tokens")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="excess log-perplexity, ln(expert/base)", ylim=(0, None))
    figure.savefig(path, dpi=150)


def cost(bench: Bench, seeds: Sequence[int]) -> None:
    """Wall time of each method over a plain forward pass of the same text; see bench/cost.py, which runs each alone."""
    from .cost import table

    table(bench)


_TABLES = (peers, sizes, gemma, parts, dimensions, task, tokens, cost)
TABLES: dict[str, Callable[[Bench, Sequence[int]], None]] = {table.__name__: table for table in _TABLES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--table", action="append", choices=list(TABLES), help="Which; default: all.")
    parser.add_argument("--seeds", type=int, default=3, help="Calibration seeds of the table of peers.")
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve())
    for name in arguments.table or TABLES:
        TABLES[name](bench, range(arguments.seeds))
    packages = ("expertprune", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print("\n" + json.dumps({**versions, "threads": threads(), "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
