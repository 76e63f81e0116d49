"""Pictures of results as PNG or SVG files. Matplotlib is imported only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertprune.artifacts.timing import METRICS, ROLES, Timing
from expertprune.errors import CheckpointError
from expertprune.files import PICTURE, check_output, staged_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from expertprune.artifacts.sweep import Sweep
    from expertprune.composition.overlap import Comparison, StructureComparison


FORMATS = (".png", ".svg")


STRUCTURES = {"ffn": "FFN neurons", "query_heads": "query heads", "kv_groups": "KV groups", "experts": "MoE experts"}


# One hue from light to dark and an orange frame, so that nobody has to tell red from green.
COLOURS, FRAME, QUIET = "Blues", "#D55E00", "#6b6b6b"


_CELL, _TREE, _GAP, _HEAD, _LETTER = 0.56, 0.9, 0.4, 0.95, 0.078  # inches


# Key of a point, and colour, marker and line of its curve: they differ without colour too.
_CURVES = (("expert", "#0072B2", "o", "-"), ("general", "#D55E00", "s", "--"))


def look(number: int, *kinds: Sequence[str]) -> tuple[str, ...]:
    """What tells one of many series from the others: a colour, a marker, a line, ...

    Each time the first of these kinds is used up, the others go on by one.
    """
    rounds = number // len(kinds[0])
    return (kinds[0][number % len(kinds[0])], *(each[(number + rounds) % len(each)] for each in kinds[1:]))


def check_picture(path: Path, made: Path | None = None, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raises `CheckpointError` if a picture cannot be written there.

    Args:
        made: a folder that will exist when the picture is written.
        overwrite: whether a picture that is there may be replaced.
        inputs: files that the command reads.
    """
    if path.suffix.lower() not in FORMATS:
        raise CheckpointError(f"{path}: a picture is a {' or '.join(FORMATS)} file")
    parent = path.absolute().parent
    if not parent.is_dir() and (made is None or parent != made.absolute()):
        raise CheckpointError(f"{path}: cannot be written: there is no folder {parent}")
    check_output(path, overwrite, PICTURE, inputs)


def save_picture(figure: Figure, path: Path, overwrite: bool = False) -> None:
    """Write a figure, whole or not at all; the same figure gives the same SVG."""
    import matplotlib

    check_picture(path, overwrite=overwrite)
    settings: Any = {"svg.hashsalt": "expertprune", "svg.fonttype": "none"}
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with matplotlib.rc_context(settings), staged_output(path, PICTURE, overwrite) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)


def draw_comparison(comparison: Comparison, path: Path, overwrite: bool = False) -> None:
    """A heat map of the overlap for each structure, with a dendrogram above it."""
    from matplotlib.figure import Figure

    structures = comparison.structures
    names = [corpus.name for corpus in comparison.corpora]
    side, label = _CELL * len(names), _LETTER * max(map(len, names)) + 0.2
    side_with_label = max(side, 2.6) + label
    width = side_with_label * len(structures) + _GAP * (len(structures) - 1) + 1.2
    foot = 0.72 * label + 0.1  # slanted
    height = _HEAD + _TREE + side + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(
        0.1 / width, 1 - 0.12 / height, f"Overlap of the least relevant {comparison.fraction:.0%} of units",
        fontsize=12, weight="bold", va="top",
    )  # fmt: skip
    about = f"{comparison.base['model']}, criterion {comparison.criterion}"
    figure.text(0.1 / width, 1 - 0.36 / height, about, fontsize=9, color=QUIET, va="top", parse_math=False)

    def axes(left: float, bottom: float, width_: float, height_: float) -> Axes:
        """Axes at a place given in inches."""
        return figure.add_axes((left / width, bottom / height, width_ / width, height_ / height))

    lowest = min(result.chance for result in structures.values())
    for number, (structure, result) in enumerate(structures.items()):
        left = label + number * (side_with_label + _GAP)
        tree = axes(left, foot + side, side, _TREE)
        title = f"{STRUCTURES[structure]} (by chance {result.chance:.2f})"
        tree.set_title(title, fontsize=10, loc="left", pad=8)
        _dendrogram(tree, result, names)
        image = _heat_map(axes(left, foot, side, side), result, names, lowest)
    bar = figure.colorbar(image, cax=axes(left + side + 0.2, foot, 0.14, side))
    bar.set_label("Jaccard index", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set(edgecolor=QUIET, linewidth=0.5)
    save_picture(figure, path, overwrite)


def _dendrogram(axes: Axes, result: StructureComparison, names: list[str]) -> None:
    """The merges over the heat map's columns; those within a cluster are drawn in colour."""
    from matplotlib.collections import LineCollection
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(result.clustering.dendrogram, no_plot=True)
    cluster = [number for number, members in enumerate(result.clustering.clusters) for _ in members]
    lines, colours = [], []
    for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        x = [value / 10 - 0.5 for value in x]  # scipy puts the leaves at 5, 15, 25, ...
        lines.append(list(zip(x, y, strict=True)))
        inside = cluster[round(x[0])] == cluster[round(x[3])]
        colours.append(FRAME if inside else QUIET)
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.4, capstyle="projecting"))
    top = max(max(y) for y in drawn["dcoord"])
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(0, top * 1.08 or 1), xticks=[])
    axes.set_ylabel("1 − rank\ncorrelation", fontsize=8, color=QUIET)
    axes.tick_params(labelsize=7, colors=QUIET)
    axes.locator_params(axis="y", nbins=3)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(QUIET)


def _heat_map(axes: Axes, result: StructureComparison, names: list[str], lowest: float) -> Any:
    """The overlap, corpora in the dendrogram's order, clusters framed, without the diagonal."""
    import numpy as np
    from matplotlib.patches import Rectangle

    order = result.clustering.order
    overlap = result.overlap[np.ix_(order, order)]
    image = axes.imshow(np.where(np.eye(len(names)), np.nan, overlap), cmap=COLOURS, vmin=lowest, vmax=1)
    axes.set_facecolor("#d9d9d9")
    for row, column in zip(*np.nonzero(~np.eye(len(names), dtype=bool)), strict=True):
        red, green, blue, _ = image.to_rgba(overlap)[row, column]
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, f"{overlap[row, column]:.2f}", ha="center", va="center", fontsize=9, color=ink)
    start = 0
    for members in result.clustering.clusters:
        if len(members) > 1:
            corner = (start - 0.5, start - 0.5)
            axes.add_patch(Rectangle(corner, len(members), len(members), fill=False, ec=FRAME, lw=2, clip_on=False))
        start += len(members)
    axes.set_xticks(range(len(names)), [names[index] for index in order], fontsize=9, parse_math=False)
    axes.tick_params(axis="x", rotation=45, rotation_mode="xtick")
    axes.set_yticks(range(len(names)), [names[index] for index in order], fontsize=9, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def retention_curve(sweep: Sweep, path: Path, overwrite: bool = False) -> None:
    """Retention in bits per byte against the parameters kept, for expert and general text.

    Both curves begin at the base, which keeps everything. Bands are the intervals.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    points = sorted(sweep.points, key=lambda point: point.fraction)
    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color=QUIET, linewidth=0.8, linestyle=":")
    labels = []
    for key, colour, marker, line in _CURVES:
        here = [(point.fraction, kept) for point in points if (kept := getattr(point, key)) is not None]
        if not here:
            continue
        kept = [fraction for fraction, _ in here] + [1.0]
        low, retention, high = (
            [math.nan if (value := getattr(numbers, name)) is None else value for _, numbers in here] + [1.0]
            for name in ("low", "retention", "high")
        )
        axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        for edge in (low, high):  # bands that lie over each other mix their colours, edges do not
            axes.plot(kept, edge, color=colour, linestyle=line, linewidth=0.7, alpha=0.8)
        axes.plot(kept, retention, color=colour, linestyle=line, linewidth=1.8)
        axes.plot(kept[:-1], retention[:-1], color=colour, linestyle="", marker=marker, markersize=6)
        labels.append((retention[0], key, colour))
    axes.plot([1.0], [1.0], color="black", marker="D", markersize=5, linestyle="")
    axes.annotate("base", (1.0, 1.0), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10)
    span = 1.0 - points[0].fraction
    axes.set_xlim(points[0].fraction - 0.2 * span, 1.0 + 0.06 * span)
    axes.margins(y=0.1)
    _label_curves(axes, points[0].fraction - 0.025 * span, labels)
    budgets = axes.secondary_xaxis("top")
    joined: dict[float, list[str]] = {}  # several budgets may come to one width
    for point in points:
        joined.setdefault(point.fraction, []).append(f"{point.budget:g}")
    budgets.set_xticks(list(joined), [", ".join(each) for each in joined.values()])
    budgets.set_xlabel("budget (fraction removed)", color=QUIET, fontsize=9)
    budgets.tick_params(labelsize=9, colors=QUIET)
    budgets.spines["top"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    axes.set_xlabel("parameters kept")
    axes.set_ylabel("retention (bits per byte, base over expert)")
    axes.set_title("What is kept as the expert gets smaller", loc="left", fontsize=12, fontweight="bold")
    axes.text(0.985, 0.03, "bands: 95% intervals", transform=axes.transAxes, ha="right", fontsize=9, color=QUIET)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path, overwrite)


def _label_curves(axes: Any, left: float, labels: list[tuple[float, str, str]]) -> None:
    """Write each curve's name beside its smallest expert, and move names apart."""
    bottom, top = axes.get_ylim()
    heights = [height for height, _, _ in labels]
    lacking = 0.07 * (top - bottom) - (max(heights) - min(heights)) if len(labels) > 1 else 0.0
    for height, name, colour in labels:
        away = 1 if height == max(heights) and name == max(labels)[1] else -1
        place = height + away * max(0.0, lacking) / 2
        axes.text(left, place, name, ha="right", va="center", color=colour, fontsize=11, fontweight="bold")


def throughput_picture(timing: Timing, path: Path, overwrite: bool = False) -> None:
    """Expert over base by metric: every pair, their median, and the limit of the speed-up."""
    from matplotlib.figure import Figure

    drawn = [metric for metric in METRICS if metric in timing.ratios]
    base, expert = ([run for run in timing.runs if run.model == role] for role in ROLES)
    figure = Figure(figsize=(7.2, 0.46 * len(drawn) + 1.5), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(1.0, color=QUIET, linewidth=0.8, linestyle=":")
    for row, metric in enumerate(drawn):
        pairs = [getattr(mine, metric) / getattr(other, metric) for mine, other in zip(expert, base, strict=True)]
        median = timing.ratios[metric].median
        better = median == 1 or (median > 1) == METRICS[metric][1]
        _, colour, marker, _ = _CURVES[0 if better else 1]
        axes.plot([min(pairs), max(pairs)], [row, row], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(pairs, [row] * len(pairs), color=colour, linestyle="", marker="|", markersize=8, alpha=0.8)
        axes.plot([median], [row], color=colour, linestyle="", marker=marker, markersize=7)
        label = f"{median:.2f}"
        axes.annotate(label, (median, row), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    speed = drawn.index("output_tokens_per_second")
    axes.plot([timing.limit] * 2, [speed - 0.32, speed + 0.32], color="black", linewidth=1.6)
    below = (timing.limit, speed + 0.3)  # where no value stands
    axes.annotate(
        f"limit {timing.limit:.2f}", below, xytext=(4, 0), textcoords="offset points", fontsize=9, va="center"
    )
    axes.set_yticks(range(len(drawn)), [METRICS[metric][0] for metric in drawn], fontsize=9)
    axes.set_ylim(len(drawn) - 0.4, -0.75)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("expert over base in the same round (bars: each pair)")
    axes.set_title("Speed and memory beside the base's", loc="left", fontsize=12, fontweight="bold")
    axes.text(
        0.99, 0.02, "blue dots: better, orange squares: worse", transform=axes.transAxes, ha="right", fontsize=8, color=QUIET
    )  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    save_picture(figure, path, overwrite)
