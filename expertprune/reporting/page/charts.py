"""The pictures of a report, as `<svg>` elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expertprune.reporting.page.inline import ACCENT, INK, MUTED, RULE, SERIES, figure_of, svg
from expertprune.reporting.pictures import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH = 760  # CSS pixels; a phone scrolls


_MARKERS = "osD^vP"  # series are told apart without colour too


_SOURCES = ("language", "domain", "task", "general")


_GROUPS = {"expert": (SERIES[0], "o"), "general": (SERIES[1], "s"), "other": (SERIES[2], "D")}


_STRONGEST = 0.62  # opacity of a heat map's strongest cell: the page's text stays readable on it


_SMALL, _TEXT = 11.5, 12.5


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in pixels, without a frame."""
    across, up = (72 * size for size in figure.get_size_inches())
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up), facecolor="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=MUTED, pad=5)
    return axes


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


# --- retention ------------------------------------------------------------------------------------------------------


def retention_picture(name: str, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Retention of each metric that has one, with its interval; a dashed line is the base."""
    drawn = [row for row in metrics if row["retention"] is not None]
    if not drawn:
        return None
    least = min(drawn, key=lambda row: row["retention"])
    alternative = (
        f"Retention of {len(drawn)} metrics with their 95% intervals; the lowest is {least['label']} on {least['name']}, "
        f"{least['retention']:.4f}. The numbers are in the table below."
    )
    left, step = 272, 25
    figure = figure_of(WIDTH, step * len(drawn) + 54)
    axes = _axes(figure, left, 46, WIDTH - left - 16, step * len(drawn))
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    known = [value for row in drawn for value in (row["retention"], row["low"], row["high"], 1.0) if value is not None]
    span = (max(known) - min(known)) or 0.1
    axes.set_xlim(min(known) - 0.04 * span, max(known) + 0.04 * span)
    axes.locator_params(axis="x", nbins=8)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.axvline(1, color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_xlabel("retention (1: as the base)", color=MUTED, fontsize=_SMALL, labelpad=7)
    for place, row in enumerate(drawn):
        colour, marker = _GROUPS[row["group"]]
        if row["low"] is not None and row["high"] is not None:
            axes.plot([row["low"], row["high"]], [place] * 2, color=colour, linewidth=2.4, solid_capstyle="round")
        axes.plot([row["retention"]], [place], color=colour, marker=marker, markersize=7.5, linestyle="")
    axes.set_yticks(
        range(len(drawn)), [_short(f"{row['name']} · {row['label']}", 40) for row in drawn], parse_math=False
    )
    axes.tick_params(axis="y", labelcolor=INK, labelsize=_TEXT)
    return svg(figure, name, alternative)


# --- layers ---------------------------------------------------------------------------------------------------------


def kept_picture(name: str, structure: Mapping[str, Any]) -> str:
    """Kept units of each layer by who protected them, if anybody had to, and the cut ones above."""
    of, kept, protected = structure["of"], structure["kept_by_layer"], structure["protected"]
    alternative = (
        f"Kept {structure['label']} in each of {len(of)} layers, {min(kept):,} to {max(kept):,} of {max(of):,}, by the "
        "dimension that protected them. The numbers are in the table below."
    )
    left, places = 46, range(len(of))
    entries = [(entry["source"], source_colour(entry["source"]), "s") for entry in protected] + [("cut", MUTED, "s")]
    figure = figure_of(WIDTH, 242 + _legend_height(entries, left))
    axes = _axes(figure, left, 44, WIDTH - left - 6, 188)
    below = [0] * len(of)
    for entry in protected:
        axes.bar(places, entry["layers"], bottom=below, color=source_colour(entry["source"]), width=0.82, linewidth=0)
        below = [a + b for a, b in zip(below, entry["layers"], strict=True)]
    cut = [units - stays for units, stays in zip(of, kept, strict=True)]
    axes.bar(places, cut, bottom=below, color=MUTED, alpha=0.22, width=0.82, linewidth=0)
    axes.set_xlim(-0.6, len(cut) - 0.4)
    axes.set_ylim(0, max(of))
    axes.locator_params(axis="x", integer=True, nbins=15)
    axes.locator_params(axis="y", integer=True, nbins=4)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=6)
    _legend(figure, entries, left)
    return svg(figure, name, alternative)


def _columns(entries: Sequence[tuple[str, str, str]], left: float) -> int:
    """How many entries of a legend stand beside each other."""
    return max(1, int((WIDTH - left) / (6.8 * min(28, max(len(text) for text, _, _ in entries)) + 38)))


def _legend_height(entries: Sequence[tuple[str, str, str]], left: float) -> int:
    return 19 * math.ceil(len(entries) / _columns(entries, left))


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]], left: float) -> None:
    """Name, colour and marker of each series, above the axes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8) for _, colour, marker in entries]
    legend = figure.legend(
        handles, [_short(text, 28) for text, _, _ in entries], loc="upper left", bbox_to_anchor=((left - 6) / WIDTH, 1),
        ncols=_columns(entries, left), frameon=False, fontsize=_SMALL, labelcolor=INK, handletextpad=0.2,
        columnspacing=1.2, borderpad=0, borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def source_colour(source: str) -> str:
    return SERIES[_SOURCES.index(source) if source in _SOURCES else 4]


def relevance_picture(name: str, label: str, corpora: Sequence[Mapping[str, Any]]) -> str | None:
    """Heat map: the share of each corpus' relevance that a layer holds, on a logarithmic scale."""
    drawn = [corpus for corpus in corpora if corpus["by_layer"]]
    if not drawn:
        return None
    first, layers = drawn[0], len(drawn[0]["by_layer"])
    largest = max(max(corpus["by_layer"]) for corpus in drawn)
    least = max(min(value for corpus in drawn for value in corpus["by_layer"] if value > 0), largest / 1e5)
    alternative = (
        f"Relevance of the {label} by layer and corpus: on {first['name']}, layer "
        f"{max(range(layers), key=first['by_layer'].__getitem__)} holds the most. The numbers are in the table below."
    )

    def strength(value: float) -> float:
        if value <= least or largest <= least:
            return 0.04 if value < largest else 1.0
        return 0.04 + 0.96 * math.log(value / least) / math.log(largest / least)

    cell, left = 30.0, 150
    figure = figure_of(WIDTH, cell * len(drawn) + 84)
    axes = _axes(figure, left, 74, WIDTH - left - 6, cell * len(drawn))
    _cells(axes, [[strength(value) for value in corpus["by_layer"]] for corpus in drawn])
    axes.set_yticks(range(len(drawn)), [_short(corpus["name"], 22) for corpus in drawn], parse_math=False)
    axes.set_xticks(range(0, layers, max(1, round(layers / 12))))
    axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=3)
    axes.tick_params(axis="y", labelcolor=INK)
    _scale(figure, left, WIDTH - left - 6, least, largest)
    return svg(figure, name, alternative)


def _cells(axes: Axes, strengths: Sequence[Sequence[float]]) -> None:
    """A heat map, `[rows][columns]` of strengths in [0, 1]: the opacity of the page's accent."""
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


def alignment_picture(name: str, alignment: Sequence[Mapping[str, Any]]) -> str | None:
    """Linear CKA of base and expert by layer, one line per corpus."""
    drawn = [entry for entry in alignment if any(value is not None for value in entry["layers"])]
    if not drawn:
        return None
    lowest = min(value for entry in drawn for value in entry["layers"] if value is not None)
    alternative = (
        f"Linear CKA of base and expert after each layer, on {len(drawn)} corpora; the lowest is {lowest:.4f}. The numbers "
        "are in the table below."
    )
    left = 46
    looks = [look(number, SERIES, _MARKERS) for number in range(len(drawn))]
    entries = [(entry["name"], colour, marker) for entry, (colour, marker) in zip(drawn, looks, strict=True)]
    figure = figure_of(WIDTH, 234 + _legend_height(entries, left))
    axes = _axes(figure, left, 44, WIDTH - left - 12, 180)
    for entry, (_, colour, marker) in zip(drawn, entries, strict=True):
        values = [math.nan if value is None else value for value in entry["layers"]]
        step = max(1, len(values) // 10)
        axes.plot(range(len(values)), values, color=colour, linewidth=2, marker=marker, markersize=5, markevery=step)
    axes.axhline(1, color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.6, max(len(entry["layers"]) for entry in drawn) - 0.4)
    axes.locator_params(axis="x", integer=True, nbins=15)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_xlabel("layer", color=MUTED, fontsize=_SMALL, labelpad=6)
    _legend(figure, entries, left)
    return svg(figure, name, alternative)
