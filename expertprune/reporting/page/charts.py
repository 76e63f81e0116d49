"""The pictures of a report, each drawn twice: for a wide page and for a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertprune.corpora.documents import CorpusName
from expertprune.reporting.page.inline import ACCENT, INK, MUTED, RULE, SERIES, figure_of, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDE, NARROW = 888, 350  # CSS pixels


_MARKERS = "osD^vP"


_SOURCES = ("language", "domain", "task", "general")


_STRONGEST = 0.62  # opacity of a heat map's strongest cell: the page's text stays readable on it


_SMALL, _TEXT = 11.5, 12.5


@dataclass(frozen=True)
class Picture:
    """One drawing in two widths, as `<svg>` elements."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in one of the series."""

    value: float
    low: float | None
    high: float | None
    series: int


@dataclass(frozen=True)
class Row:
    """One line of a picture of intervals; a row without marks is a heading."""

    label: str
    marks: tuple[Mark, ...] = ()
    limit: float | None = None


def _picture(name: str, alternative: str, draw: Callable[[float], Figure]) -> Picture:
    return Picture(svg(draw(WIDE), f"{name}-wide", alternative), svg(draw(NARROW), f"{name}-narrow", alternative))


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in pixels, without a frame."""
    across, up = (72 * size for size in figure.get_size_inches())
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up), facecolor="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=MUTED, pad=5)
    return axes


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


# --- intervals ------------------------------------------------------------------------------------------------------


def intervals(name: str, alternative: str, rows: Sequence[Row], axis: str, legend: Sequence[str] = ()) -> Picture:
    """Values with their intervals, one row each, and a line where nothing changed."""
    return _picture(name, alternative, lambda width: _intervals(width, rows, axis, legend))


def _intervals(width: float, rows: Sequence[Row], axis: str, legend: Sequence[str]) -> Figure:
    narrow = width == NARROW
    left, step = (12, 42) if narrow else (272, 25)
    most = max((len(row.marks) for row in rows), default=1)
    step += 7 * max(0, most - 1)
    heights = [step if row.marks else 30 for row in rows]
    top = 8 + 19 * _legend_lines(width, left, legend)[1]
    height = sum(heights) + top + 50
    figure = figure_of(width, height)
    axes = _axes(figure, left, 46, width - left - 16, sum(heights))
    axes.set_ylim(sum(heights), 0)
    values = [value for row in rows for mark in row.marks for value in (mark.value, mark.low, mark.high, row.limit)]
    known = [value for value in values if value is not None] + [1.0]
    span = (max(known) - min(known)) or 0.1
    axes.set_xlim(min(known) - 0.04 * span, max(known) + 0.04 * span)
    axes.locator_params(axis="x", nbins=5 if narrow else 9)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.set_yticks([])
    axes.axvline(1, color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_xlabel(axis, color=MUTED, fontsize=_SMALL, labelpad=7)
    place = 0.0
    for row, size in zip(rows, heights, strict=True):
        middle = place + (size * 0.68 if narrow and row.marks else size / 2)
        where = (place + 13 if narrow and row.marks else middle) / sum(heights)
        weight = "normal" if row.marks else "bold"
        indent = 8 * bool(row.marks) - (0 if narrow else left)
        axes.text(indent / (width - left - 16), 1 - where, _short(row.label, 48 if narrow else 40), color=INK,
                  fontsize=_TEXT, weight=weight, va="center", parse_math=False, transform=axes.transAxes)  # fmt: skip
        for number, mark in enumerate(row.marks):
            y = middle + 8 * (number - (len(row.marks) - 1) / 2)
            _mark(axes, y, mark)
        if row.limit is not None:
            axes.plot([row.limit] * 2, [middle - 9, middle + 9], color=INK, linewidth=2)
        place += size
    _legend(figure, [(text, SERIES[number % 6], _MARKERS[number % 6]) for number, text in enumerate(legend)], left)
    return figure


def _mark(axes: Axes, y: float, mark: Mark) -> None:
    colour = SERIES[mark.series % 6]
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.low, mark.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="round")
    axes.plot([mark.value], [y], color=colour, marker=_MARKERS[mark.series % 6], markersize=7.5, linestyle="")


def _legend_lines(width: float, left: float, texts: Sequence[str]) -> tuple[int, int]:
    """Columns and lines of a legend that fits above the axes."""
    if not texts:
        return 1, 0
    columns = max(1, int((width - left) / (6.8 * min(28, max(map(len, texts))) + 38)))
    return columns, math.ceil(len(texts) / columns)


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]], left: float) -> None:
    """Colour, mark and name of each series, above the axes."""
    from matplotlib.lines import Line2D

    if not entries:
        return
    across = 72 * figure.get_size_inches()[0]
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8) for _, colour, marker in entries]
    columns, _ = _legend_lines(across, left, [text for text, _, _ in entries])
    legend = figure.legend(
        handles, [_short(text, 28) for text, _, _ in entries], loc="upper left", bbox_to_anchor=((left - 6) / across, 1),
        ncols=columns, frameon=False, fontsize=_SMALL, labelcolor=INK, handletextpad=0.2, columnspacing=1.2, borderpad=0,
        borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def retention_picture(name: str, metrics: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Retention of each metric that has one, with its interval."""
    rows: list[Row] = []
    titles = {"expert": "What it is for", "general": "General"}
    for group, series in (("expert", 0), ("general", 1)):
        here = [row for row in metrics if row["group"] == group and row["retention"] is not None]
        rows += [Row(titles[group])] if here else []
        rows += [Row(f"{row['name']} · {row['label']}", (_of(row, series),)) for row in here]
    if not rows:
        return None
    marks = [row for row in metrics if row["retention"] is not None]
    least = min(marks, key=lambda row: row["retention"])
    alternative = (
        f"Retention of {len(marks)} metrics with their 95% intervals; the lowest is {least['label']} on {least['name']}, "
        f"{least['retention']:.4f}. The numbers are in the table below."
    )
    return intervals(name, alternative, rows, "retention (1: as the base)")


def _of(row: Mapping[str, Any], series: int) -> Mark:
    return Mark(row["retention"], row["low"], row["high"], series)


def lineup_picture(name: str, rows: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Picture | None:
    """Retention of several experts on each metric that one of them was measured on."""
    lines = []
    for row in rows:
        found = [(number, cell) for number, cell in enumerate(row["cells"]) if cell and cell["retention"] is not None]
        if found:
            lines.append(Row(f"{row['name']} · {row['label']}", tuple(_of(cell, number) for number, cell in found)))
    if not lines:
        return None
    alternative = f"Retention of {len(experts)} experts on {len(lines)} metrics. The numbers are in the table below."
    return intervals(name, alternative, lines, "retention (1: as the base)", experts)


def throughput_picture(
    name: str, rows: Sequence[Mapping[str, Any]], limit: float | None, labels: Mapping[str, str]
) -> Picture | None:
    """The expert's speed over the base's, metric by metric; a bar stands at the limit."""
    drawn = [row for row in rows if row["ratio"] is not None]
    if not drawn:
        return None
    lines = [
        Row(labels.get(row["metric"], row["metric"]), (Mark(row["ratio"], row["low"], row["high"], 0),),
            limit if row["metric"] == "output_tokens_per_second" else None)
        for row in drawn
    ]  # fmt: skip
    alternative = f"Ratio of expert to base in {len(drawn)} measures of speed. The numbers are in the table below."
    return intervals(name, alternative, lines, "expert over base (1: as the base)")


# --- layers ---------------------------------------------------------------------------------------------------------


def kept_picture(name: str, structure: Mapping[str, Any]) -> Picture:
    """Kept units of each layer by who protected them, and the cut ones above."""
    label, layers = structure["label"], structure["layers"]
    alternative = (
        f"Kept {label} in each of {len(layers['of'])} layers, {min(layers['kept']):,} to {max(layers['kept']):,} of "
        f"{max(layers['of']):,}, by the dimension that protected them. The numbers are in the table below."
    )

    def draw(width: float) -> Figure:
        left, sources = 46, [entry["source"] for entry in structure["protected"]]
        figure = figure_of(width, 242 + 19 * _legend_lines(width, left, [*sources, "cut"])[1])
        axes = _axes(figure, left, 44, width - left - 6, 188)
        places = range(len(layers["of"]))
        below = [0] * len(layers["of"])
        entries = []
        for entry in structure["protected"]:
            colour = source_colour(entry["source"])
            axes.bar(places, entry["layers"], bottom=below, color=colour, width=0.82, linewidth=0)
            below = [a + b for a, b in zip(below, entry["layers"], strict=True)]
            entries.append((entry["source"], colour, "s"))
        cut = [of - kept for of, kept in zip(layers["of"], layers["kept"], strict=True)]
        axes.bar(places, cut, bottom=below, color=MUTED, alpha=0.22, width=0.82, linewidth=0)
        axes.set_xlim(-0.6, len(cut) - 0.4)
        axes.set_ylim(0, max(layers["of"]))
        axes.locator_params(axis="x", integer=True, nbins=6 if width == NARROW else 15)
        axes.locator_params(axis="y", integer=True, nbins=4)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=6)
        _legend(figure, [*entries, ("cut", MUTED, "s")], left)
        return figure

    return _picture(name, alternative, draw)


def source_colour(source: str) -> str:
    return SERIES[_SOURCES.index(source) if source in _SOURCES else 4]


def relevance_picture(name: str, label: str, corpora: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Heat map: the part of each corpus' relevance that a layer holds, on a logarithmic scale."""
    drawn = [corpus for corpus in corpora if corpus["by_layer"]]
    if not drawn:
        return None
    layers = len(drawn[0]["by_layer"])
    largest = max(max(corpus["by_layer"]) for corpus in drawn)
    positive = [value for corpus in drawn for value in corpus["by_layer"] if value > 0]
    least = max(min(positive), largest / 1e5)
    first = drawn[0]
    alternative = (
        f"Relevance of the {label} by layer and corpus: on {first['name']}, layer "
        f"{max(range(layers), key=first['by_layer'].__getitem__)} holds the most. The numbers are in the table below."
    )

    def strength(value: float) -> float:
        if value <= least or largest <= least:
            return 0.04 if value < largest else 1.0
        return 0.04 + 0.96 * math.log(value / least) / math.log(largest / least)

    def draw(width: float) -> Figure:
        tall = width == NARROW
        cell = 13.0 if tall else 30.0
        left, head = (34, 30) if tall else (150, 6)
        extent = layers if tall else len(drawn)
        figure = figure_of(width, head + cell * extent + 78)
        axes = _axes(figure, left, 74, width - left - 6, cell * extent)
        room = int((width - left - 6) / len(drawn) / 7.2)
        names = [_short(corpus["name"], 22) for corpus in drawn]
        if tall:
            names = [_short(CorpusName.parse(corpus["name"]).value, max(3, room)) for corpus in drawn]
        table = [[strength(value) for value in corpus["by_layer"]] for corpus in drawn]
        _cells(axes, [list(column) for column in zip(*table, strict=True)] if tall else table)
        ticks = range(0, layers, max(1, round(layers / 12)))
        if tall:
            axes.set_xticks(range(len(drawn)), names, parse_math=False)
            axes.xaxis.tick_top()
            axes.set_yticks(ticks)
            axes.set_ylabel("layer", color=MUTED, fontsize=_SMALL)
        else:
            axes.set_yticks(range(len(drawn)), names, parse_math=False)
            axes.set_xticks(ticks)
            axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=3)
        axes.tick_params(axis="x" if tall else "y", labelcolor=INK)
        _scale(figure, left, width - left - 6, least, largest)
        return figure

    return _picture(name, alternative, draw)


def _cells(axes: Axes, strengths: Sequence[Sequence[float]]) -> None:
    """A heat map, `[rows][columns]` of strengths in [0, 1]: the page's accent, more or less opaque."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    squares, colours = [], []
    for row, values in enumerate(strengths):
        for column, value in enumerate(values):
            squares.append(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92))
            colours.append((*to_rgba(ACCENT)[:3], _STRONGEST * value))
    axes.add_collection(PatchCollection(squares, facecolors=colours, edgecolors="none", linewidths=0))
    axes.set_xlim(-0.5, len(strengths[0]) - 0.5)
    axes.set_ylim(len(strengths) - 0.5, -0.5)


def _scale(figure: Figure, left: float, width: float, least: float, largest: float) -> None:
    """What the strengths of a heat map stand for."""
    axes = _axes(figure, left, 22, min(260, width), 10)
    steps = 24
    _cells(axes, [[0.04 + 0.96 * step / (steps - 1) for step in range(steps)]])
    axes.set_yticks([])
    marks = (0, (steps - 1) / 2, steps - 1)
    axes.set_xticks(marks, [f"{100 * least * (largest / least) ** (mark / (steps - 1)):.2g}%" for mark in marks])


def overlap_picture(name: str, label: str, overlap: Mapping[str, Any]) -> Picture:
    """Jaccard index of each pair of irrelevant sets; what chance gives is blank."""
    names, matrix, chance = overlap["corpora"], overlap["matrix"], overlap["chance"]
    pairs = [matrix[a][b] for a in range(len(names)) for b in range(a)]
    alternative = (
        f"Overlap of the corpora's irrelevant {label}: Jaccard index {min(pairs):.2f} to {max(pairs):.2f}, where "
        f"independent sets would share {chance:.2f}. The numbers are in the table below."
    )

    def draw(width: float) -> Figure:
        tall = width == NARROW
        left = 78 if tall else 150
        values = [CorpusName.parse(each).value for each in names]
        cell = min(66.0, (width - left - 8) / len(names))
        figure = figure_of(min(width, left + cell * len(names) + 8), cell * 0.62 * len(names) + 34)
        axes = _axes(figure, left, 30, cell * len(names), cell * 0.62 * len(names))
        span = 1 - chance or 1
        _cells(axes, [[0.0 if a == b else max(0.04, (value - chance) / span) for b, value in enumerate(row)]
                      for a, row in enumerate(matrix)])  # fmt: skip
        for a, row in enumerate(matrix):
            for b, value in enumerate(row):
                if a != b and cell > 26:
                    axes.text(b, a, f"{value:.2f}", ha="center", va="center", color=INK, fontsize=_TEXT)
        beside = [_short(each, 11) for each in values] if tall else [_short(each, 22) for each in names]
        axes.set_yticks(range(len(names)), beside, parse_math=False)
        axes.set_xticks(range(len(names)), [_short(each, max(3, int(cell / 7))) for each in values], parse_math=False)
        axes.tick_params(labelcolor=INK)
        return figure

    return _picture(name, alternative, draw)


def alignment_picture(name: str, alignment: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Linear CKA of base and expert by layer, one line per dimension value."""
    drawn = [entry for entry in alignment if any(value is not None for value in entry["layers"])]
    if not drawn:
        return None
    least = min(drawn, key=lambda entry: entry["layers"][-1] or 0)
    alternative = (
        f"Alignment of the hidden states of base and expert by layer; after the last one, {least['name']} is furthest from "
        f"the base, {least['layers'][-1] or math.nan:.3f}. The numbers are in the table below."
    )

    def draw(width: float) -> Figure:
        figure = figure_of(width, 234 + 19 * _legend_lines(width, 46, [entry["name"] for entry in drawn])[1])
        axes = _axes(figure, 46, 44, width - 58, 180)
        for number, entry in enumerate(drawn):
            values = [math.nan if value is None else value for value in entry["layers"]]
            axes.plot(range(len(values)), values, color=SERIES[number % 6], linewidth=2, marker=_MARKERS[number % 6],
                      markersize=5, markevery=max(1, len(values) // 10))  # fmt: skip
        axes.axhline(1, color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_xlim(-0.6, max(len(entry["layers"]) for entry in drawn) - 0.4)
        axes.locator_params(axis="x", integer=True, nbins=6 if width == NARROW else 15)
        axes.locator_params(axis="y", nbins=5)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=6)
        marks = [(entry["name"], SERIES[number % 6], _MARKERS[number % 6]) for number, entry in enumerate(drawn)]
        _legend(figure, marks, 46)
        return figure

    return _picture(name, alternative, draw)
