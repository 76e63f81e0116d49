"""What experts keep: against peers, at other sizes, part by part, by dimension and by criterion.

    python -m bench.quality --data DATA [--table peers ...]

Computes the cells of the tables that have no result yet, and prints the tables. `python -m
bench.tables` then writes them into README.md and LOG.md.

DATA is a folder of JSON lines: `domain/pubmedqa_*`, `general/wikitext2_*`, `general/piqa_report`,
`task/gsm8k_*`, `language/xquad_{de,en,th}_*`, each with `_calibration.jsonl` and `_report.jsonl`.
Calibration rows are profiled. Report rows are measured and choose nothing.

All methods of one table get the same calibration text. Perplexity is of blocks of 512 tokens. The
excess is `ln(expert / base)` with its 95% interval over documents (paired bootstrap).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cells import GEMMA, Bench, Cell, Result
from .measure import Excess, Sums, excess
from .records import RESULTS, Table, described

Get = Callable[[Cell], Result]

SEEDS = (0, 1, 2)  # of the calibration text, in the table of peers
UNREPAIRED = {"compensation": "none"}
# The best that stays a stock checkpoint: all layers keep the same widths.
STOCK = {"compose.allocation": "uniform", "relevance.criterion": "impact"}
SHARED_EXCLUSIVE = {"compose.fusion": {"method": "shared_exclusive", "lambda": 0.5}}
OURS: dict[str, dict[str, Any]] = {
    "ours": {}, "ours, shared/exclusive fusion": SHARED_EXCLUSIVE, "ours, stock checkpoint": STOCK,
    "ours, no repair": UNREPAIRED,
}  # fmt: skip
# Cus-Prun alone: the intersection of three dimensions; no general corpus, no repair.
CUS_PRUN = Cell(
    "ours",
    dimensions={"language": "encyclopedia", "domain": "abstracts", "task": "qa"},
    general=(),
    documents=40,
    overrides={**STOCK, **UNREPAIRED, "compose.rule": "intersection"},
)
# Magnitude sees no data. SliceGPT takes too long, and is too far off, for more.
ONE_SEED = {"magnitude", "slicegpt"}
PEERS = ("flap", "wanda_sp", "Cus-Prun alone", "llm_pruner_taylor", "slicegpt", "shortgpt", "random", "magnitude")


def peers(get: Get) -> Table:
    """A quarter of the FFN neurons, or as many parameters, by every method and seed."""
    shape = Cell("base")
    table = Table(["method", "removed", *_columns(shape)])
    base = get(shape)
    table.add("base", "", *_measured([base], base))
    for method in (*OURS, *PEERS):
        cell = CUS_PRUN if method == "Cus-Prun alone" else _of(method, shape)
        results = [get(replace(cell, seed=seed)) for seed in (SEEDS[:1] if method in ONE_SEED else SEEDS)]
        table.add(method, _millions(results[0]), *_measured(results, base))
    return table


# The paper's rule: a neuron is irrelevant where it is so in *every* document.
CUS_PRUN_MAX = replace(CUS_PRUN, overrides={**CUS_PRUN.overrides, "compose.aggregate": "max"})
RIVALS = ("modegpt", "flap_least_squares", "wanda_sp_least_squares", "slimgpt", "flap")
# Ours with one more general corpus.
NAMED = {"ours, math among general": ("encyclopedia", "math"), "ours, German among general": ("encyclopedia", "de")}
ANCHORS = ("ours", "ours, math among general", *RIVALS, "Cus-Prun alone, max")


def anchors(get: Get) -> Table:
    """A quarter of the FFN neurons by the strongest one-shot methods, over the seeds, all in bfloat16."""
    shape = Cell("base", piqa=0, dtype="bfloat16")
    table = Table(["method", "removed", *_columns(shape)])
    base = get(shape)
    table.add("base", "", *_measured([base], base))
    for method in ANCHORS:
        alone = replace(CUS_PRUN_MAX, piqa=0, dtype=shape.dtype)
        cell = alone if method == "Cus-Prun alone, max" else _of(method, shape)
        results = [get(replace(cell, seed=seed)) for seed in (SEEDS[:1] if cell == alone else SEEDS)]
        table.add(method, _millions(results[0]), *_measured(results, base))
    return table


def anchors_paired(get: Get) -> Table:
    """The excess of ours less that of each peer, over the same seeds, paired by document."""
    shape = Cell("base", piqa=0, dtype="bfloat16")
    names = list(get(shape).sums)

    def mean(method: str, name: str) -> Sums:
        return _mean([get(replace(_of(method, shape), seed=seed)).sums[name] for seed in SEEDS])

    table = Table(["ours less", *names])
    for method in RIVALS:
        table.add(method, *(_signed(excess(mean(method, name), mean("ours", name))) for name in names))
    return table


def sizes(get: Get) -> Table:
    """The best methods at other sizes, heads included, in bfloat16."""
    shape = Cell("base", piqa=0, dtype="bfloat16")
    table = Table(["budget", "method", "removed", *_columns(shape)])
    base = get(shape)
    # Parameters of the blocks without norms, of the FFN, and of all.
    blocks, ffn, model = 106_168_320, 79_626_240, 134_515_008
    budgets: list[tuple[str, str, dict[str, float]]] = [
        (f"{fraction:.0%} of FFN", method, {"ffn": fraction})
        for fraction in (0.1, 0.2, 0.3, 0.4)
        for method in ("flap", "ours")
    ]
    # The peer's fraction is of the FFN's parameters, wherever it takes them.
    budgets.append(("25% of the blocks' parameters", "flap_heads", {"ffn": 0.25 * blocks / ffn}))
    budgets.append(("25% of the blocks' parameters", "ours", {"parameters": 0.25 * blocks / model}))
    for name, method, budget in budgets:
        cell = replace(shape, method=method, budget=budget)
        results = [get(replace(cell, seed=seed)) for seed in (SEEDS[:1] if "ffn" in name.lower() else SEEDS)]
        table.add(name, method, _millions(results[0]), *_measured(results, base))
    return table


def gemma(get: Get) -> Table:
    """The most telling methods on another family: a norm behind every block, one KV head."""
    shape = Cell("base", model=GEMMA, sets=("PubMedQA", "WikiText-2", "XQuAD-de"), blocks=8, piqa=0, documents=40)
    table = Table(["budget", "method", "removed", *_columns(shape)])
    base = get(shape)
    table.add("base", "", "", *_measured([base], base))
    others = ("modegpt", "flap_least_squares", "flap", "wanda_sp", "llm_pruner_taylor")
    for fraction, methods in (
        (0.15, ("ours", "ours, German among general", "ours, no repair", *others)),
        (0.25, ("ours", "flap")),
    ):
        for method in methods:
            result = get(replace(_of(method, shape), budget={"ffn": fraction}))
            table.add(f"{fraction:.0%} of FFN", method, _millions(result), *_measured([result], base))
    return table


PARTS: dict[str, dict[str, Any]] = {
    "intersection → mean": {"compose.rule": "mean"},
    "intersection → union": {"compose.rule": "union"},
    "fusion → the plain weighting": {"compose.fusion.method": "weighted"},
    "fusion → the expert's score alone": {"compose.fusion": {"method": "weighted", "lambda": 0}},
    "global → uniform allocation": {"compose.allocation": "uniform"},
    "no repair": UNREPAIRED,
}
# Parts that left the package because they did not pay. Their results stay, for LOG.md.
RETIRED: dict[str, dict[str, Any]] = {
    "global → search": {"compose.allocation": "search"},
    "repair of all projections": {"compensation.scope": "all"},
    "repair by the OBS update": {"compensation": "obs"},
    "two rounds": {"compose.rounds": 2},
}


def parts(get: Get, chosen: Mapping[str, dict[str, Any]] = PARTS) -> Table:
    """One part replaced or left out, in bfloat16, and the difference to the default, paired by document."""
    dimensions = {"language": "encyclopedia", "domain": "abstracts", "task": "qa"}
    shape = Cell("base", dimensions=dimensions, general=("encyclopedia", "math"), documents=40, piqa=0)
    shape = replace(shape, dtype="auto" if chosen is RETIRED else "bfloat16")
    columns = [text for name in shape.sets for text in (f"{name}: excess ln", "more than the default's (95%)")]
    table = Table(["part", *columns])
    base, ours = get(shape), get(replace(shape, method="ours"))
    for name, overrides in {"ours (all parts as by default)": {}, **chosen}.items():
        result = get(replace(shape, method="ours", overrides=overrides))
        cells = []
        for each in shape.sets:
            against = _signed(excess(ours.sums[each], result.sums[each])) if overrides else ""
            cells += [f"{excess(base.sums[each], result.sums[each]).value:.3f}", against]
        table.add(name, *cells)
    return table


# What a lever does, as changes of a cell: each default replaced, one at a time.
LEVERS: dict[str, dict[str, Any]] = {
    "the ridge: a third": {"overrides": {"compensation.ridge": 5000}},
    "the repair: general text counts a quarter": {"overrides": {"compensation.general": 0.25}},
    "fusion: general text counts half": {"overrides": {"compose.fusion": {"lambda": 0.5}}},
    "fusion: the plain weighting": {"overrides": {"compose.fusion.method": "weighted"}},
    "general text: the shipped corpus too": {"general": ("encyclopedia", "general")},
    "general text: the shipped corpus alone": {"general": ("general",)},
}


def levers(get: Get) -> Table:
    """Each lever of calibration and repair alone, on two models, one dimension and two seeds, in bfloat16."""
    narrow = Cell("base", piqa=0, dtype="bfloat16")
    shapes = [narrow, replace(narrow, model=GEMMA, budget={"ffn": 0.15}, blocks=8, documents=40)]
    columns = [text for name in shapes[0].sets for text in (f"{name}: excess ln", "more than the default's (95%)")]
    table = Table(["model", "lever", *columns])

    def mean(cell: Cell, name: str) -> Sums:
        return _mean([get(replace(cell, seed=seed)).sums[name] for seed in SEEDS[:2]])

    for shape in shapes:
        ours = replace(shape, method="ours")
        for lever, changes in {"all as by default": {}, **LEVERS}.items():
            cells = []
            for name in shape.sets:
                found = mean(replace(ours, **changes), name)
                against = _signed(excess(mean(ours, name), found)) if changes else ""
                cells += [f"{excess(get(shape).sums[name], found).value:.3f}", against]
            table.add(shape.model, lever, *cells)
    return table


def dimensions(get: Get) -> Table:
    """Gemma calibrated for one value and measured on all."""
    sets = ("XQuAD-de", "XQuAD-en", "XQuAD-th", "PubMedQA")
    shape = Cell("base", model=GEMMA, sets=sets, blocks=6, piqa=0, general=(), documents=40)
    table = Table(["for", "FFN", "repair", *_columns(shape)])
    base = get(shape)
    table.add("base", "", "", *_measured([base], base))
    values = {"de": "language", "en": "language", "th": "language", "medical": "domain"}
    composed = {"language": "de", "domain": "abstracts", "task": "qa"}
    rows: list[tuple[str, float, str, dict[str, str]]] = [
        (value, fraction, repair, {dimension: value})
        for fraction, repair in ((0.15, "least_squares"), (0.25, "least_squares"), (0.15, "none"))
        for value, dimension in values.items()
    ]
    rows.append(("composed: de + medical + qa", 0.15, "least_squares", composed))
    rows += [(f"composed: {value}", 0.15, "least_squares", {name: value}) for name, value in composed.items()]
    for name, fraction, repair, chosen in rows:
        overrides = {"compensation.method": repair}
        cell = replace(shape, method="ours", budget={"ffn": fraction}, dimensions=chosen, overrides=overrides)
        table.add(name, f"{fraction:.0%}", repair.replace("_", " "), *_measured([get(cell)], base))
    return table


FUSED = "both, fused"
WAYS: dict[str, dict[str, Any]] = {
    "expert only": {"general": ()},
    "general only": {"dimensions": {"domain": "encyclopedia"}, "general": ()},
    FUSED: {},
}
# Those that see data.
CRITERIA = ("activation", "impact", "fluctuation", "taylor", "fisher", "regional")
TASK = Cell("base", documents=40)


def _scored(criterion: str, way: str) -> Cell:
    overrides = {"relevance.criterion": criterion, "compose.allocation": "uniform", **UNREPAIRED}
    return replace(TASK, method="ours", overrides=overrides, **WAYS[way])


def task(get: Get, criteria: Sequence[str] = CRITERIA) -> Table:
    """Fused against general-only and expert-only calibration, by criterion, unrepaired."""
    table = Table(["criterion", "scored on", *_columns(TASK)])
    base = get(TASK)
    rows = [(criterion, way) for criterion in criteria for way in WAYS]
    for criterion, way in [("magnitude", FUSED), *rows] if criteria == CRITERIA else rows:
        table.add(criterion, way, *_measured([get(_scored(criterion, way))], base))
    return table


def task_means(get: Get) -> Table:
    """Means of the table of `task` over the criteria, each way against both fused."""
    columns = [text for name in TASK.sets for text in (f"{name}: mean excess", "fused less")]
    table = Table(["scored on", *columns, "PIQA", "fused more"])
    base = get(TASK)
    found = {way: [get(_scored(criterion, way)) for criterion in CRITERIA] for way in WAYS}

    def mean_excess(way: str, name: str) -> float:
        return float(np.mean([excess(base.sums[name], result.sums[name]).value for result in found[way]]))

    right = {way: float(np.mean([result.piqa for result in results])) for way, results in found.items()}
    for way in WAYS:
        cells = []
        for name in TASK.sets:
            here, fused = mean_excess(way, name), mean_excess(FUSED, name)
            cells += [f"{here:.3f}", "" if way == FUSED else f"{here - fused:+.3f}"]
        table.add(way, *cells, f"{right[way]:.3f}", "" if way == FUSED else f"{right[FUSED] - right[way]:+.3f}")
    return table


TOKEN_DOCUMENTS = (15, 30, 60, 120, 480)
TOKENS = Cell("base", piqa=0, dtype="bfloat16")


def tokens(get: Get) -> Table:
    """Excess against calibration text, for ours and for FLAP, in bfloat16."""
    table = Table(["method", "tokens", *_columns(TOKENS)])
    base = get(TOKENS)
    for documents in TOKEN_DOCUMENTS:
        for method in ("flap", "ours"):
            result = get(replace(TOKENS, method=method, documents=documents))
            table.add(method, f"{result.tokens:,}", *_measured([result], base))
    return table


def draw_tokens(get: Get, path: Path = RESULTS.parent / "pictures/tokens.png") -> None:
    """Draw the table of `tokens`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = get(TOKENS)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    sets = {"PubMedQA": "PubMedQA (expert)", "WikiText-2": "WikiText-2 (general)"}
    for axis, (name, title) in zip(axes, sets.items(), strict=True):
        for method, colour in (("flap", "#b35806"), ("ours", "#1f4e9c")):
            results = [get(replace(TOKENS, method=method, documents=documents)) for documents in TOKEN_DOCUMENTS]
            points = [(result.tokens, excess(base.sums[name], result.sums[name]).value) for result in results]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
            axis.annotate(method, points[-1], xytext=(0, 8), textcoords="offset points", ha="right")
        axis.set(xscale="log", title=title, xlabel="calibration tokens")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="excess log-perplexity, ln(expert/base)", ylim=(0, None))
    figure.savefig(path, dpi=150)


def _of(method: str, shape: Cell) -> Cell:
    """The cell of a peer, or of one of `OURS` or `NAMED`."""
    if method in OURS:
        return replace(shape, method="ours", overrides=OURS[method])
    if method in NAMED:
        return replace(shape, method="ours", general=NAMED[method])
    return replace(shape, method=method)


def _columns(cell: Cell) -> list[str]:
    columns = [text for name in cell.sets for text in (name, "excess ln (95%)")]
    return columns + (["PIQA"] if cell.piqa else [])


def _measured(results: Sequence[Result], base: Result) -> list[str]:
    """Per set perplexity and excess, then PIQA; over all seeds together."""
    columns = []
    for name, sums in base.sums.items():
        columns += _losses([result.sums[name] for result in results], sums)
    if base.piqa:
        columns.append(f"{np.mean([result.piqa for result in results]):.3f}")
    return columns


def _mean(sums: Sequence[Sums]) -> Sums:
    """The losses of several seeds on the same blocks, as one."""
    return Sums(np.mean([each.nats for each in sums], axis=0), sums[0].tokens)


def _losses(sums: Sequence[Sums], base: Sums) -> list[str]:
    """Perplexity; excess with its interval over documents, and the range over several seeds."""
    mean = _mean(sums)
    found = excess(base, mean)
    text = f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    if len(sums) > 1:
        values = [excess(base, each).value for each in sums]
        text += f"; seeds {min(values):.3f} to {max(values):.3f}"
    return [f"{mean.perplexity:.2f}", text]


def _signed(found: Excess) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _millions(result: Result) -> str:
    return f"{result.removed / 1e6:.2f}M"


_TABLES = (peers, anchors, anchors_paired, sizes, tokens, gemma, parts, levers, task, task_means, dimensions)
TABLES: dict[str, Callable[[Get], Table]] = {table.__name__: table for table in _TABLES}


def text_of(table: Callable[[Get], Table], get: Get) -> str:
    """A table in Markdown, and a line on the commits, versions and dates of its cells."""
    used = []

    def noted(cell: Cell) -> Result:
        result = get(cell)
        used.append(result.made)
        return result

    return f"{table(noted)}\n\n{described(used)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument(
        "--table",
        action="append",
        choices=list(TABLES),
        help="one of the tables; default: all",
    )
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve())
    tables = {name: TABLES[name] for name in arguments.table} if arguments.table else TABLES
    for table in tables.values():
        print(f"\n{text_of(table, bench.run)}", flush=True)


if __name__ == "__main__":
    main()
