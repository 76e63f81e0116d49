"""Pictures of results, drawn by matplotlib into PNG or SVG files. It is imported by the function that draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertprune.errors import CheckpointError
from expertprune.files import staged_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
QUIET = "#6b6b6b"
# Key of a point, colour, marker and line of its curve: told apart without colour too.
_CURVES = (("expert", "#0072B2", "o", "-"), ("general", "#D55E00", "s", "--"))


def check_picture(path: Path, made: Path | None = None) -> None:
    """Raises `CheckpointError` if a picture cannot be written there: another format, or no such folder.

    Args:
        made: a folder that will be there by then.
    """
    if path.suffix.lower() not in FORMATS:
        raise CheckpointError(f"{path}: a picture is a {' or '.join(FORMATS)} file")
    parent = path.absolute().parent
    if not parent.is_dir() and (made is None or parent != made.absolute()):
        raise CheckpointError(f"{path}: cannot be written: there is no folder {parent}")
    if path.is_dir():
        raise CheckpointError(f"{path}: cannot be written: it is a folder")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the same figure gives the same SVG."""
    import matplotlib

    check_picture(path)
    settings: Any = {"svg.hashsalt": "expertprune", "svg.fonttype": "none"}
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with matplotlib.rc_context(settings), staged_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)


def retention_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Retention in bits per byte against the fraction of parameters kept, for expert and general text.

    Both curves begin at the base, which keeps everything. Bands are the intervals.

    Args:
        points: of a `Sweep`'s document; `expert` or `general` may be `None` where there was no text for it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    points = sorted(points, key=lambda point: point["fraction"])
    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color=QUIET, linewidth=0.8, linestyle=":")
    labels = []
    for key, colour, marker, line in _CURVES:
        here = [(point["fraction"], point[key]) for point in points if point[key] is not None]
        if not here:
            continue
        kept = [fraction for fraction, _ in here] + [1.0]
        low, retention, high = ([numbers[name] for _, numbers in here] + [1.0] for name in ("low", "retention", "high"))
        axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        for edge in (low, high):  # bands that lie over each other mix their colours, edges do not
            axes.plot(kept, edge, color=colour, linestyle=line, linewidth=0.7, alpha=0.8)
        axes.plot(kept, retention, color=colour, linestyle=line, linewidth=1.8)
        axes.plot(kept[:-1], retention[:-1], color=colour, linestyle="", marker=marker, markersize=6)
        labels.append((retention[0], key, colour))
    axes.plot([1.0], [1.0], color="black", marker="D", markersize=5, linestyle="")
    axes.annotate("base", (1.0, 1.0), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=10)
    span = 1.0 - points[0]["fraction"]
    axes.set_xlim(points[0]["fraction"] - 0.2 * span, 1.0 + 0.06 * span)
    axes.margins(y=0.1)
    _label_curves(axes, points[0]["fraction"] - 0.025 * span, labels)
    budgets = axes.secondary_xaxis("top")
    budgets.set_xticks([point["fraction"] for point in points], [f"{point['budget']:g}" for point in points])
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
    save_picture(figure, path)


def _label_curves(axes: Any, left: float, labels: list[tuple[float, str, str]]) -> None:
    """Each curve's name beside its smallest expert, where curves lie furthest apart; moved apart where they do not."""
    bottom, top = axes.get_ylim()
    heights = [height for height, _, _ in labels]
    lacking = 0.07 * (top - bottom) - (max(heights) - min(heights)) if len(labels) > 1 else 0.0
    for height, name, colour in labels:
        away = 1 if height == max(heights) and name == max(labels)[1] else -1
        place = height + away * max(0.0, lacking) / 2
        axes.text(left, place, name, ha="right", va="center", color=colour, fontsize=11, fontweight="bold")
