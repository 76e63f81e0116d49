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
    from matplotlib.ticker import PercentFormatter

    points = sorted(points, key=lambda point: point["fraction"])
    figure = Figure(figsize=(6.4, 4.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    labels = []
    for key, colour, marker, line in _CURVES:
        here = [(point["fraction"], point[key]) for point in points if point[key] is not None]
        if not here:
            continue
        kept = [fraction for fraction, _ in here] + [1.0]
        low, retention, high = ([numbers[name] for _, numbers in here] + [1.0] for name in ("low", "retention", "high"))
        axes.fill_between(kept, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(kept, retention, color=colour, linestyle=line, linewidth=1.8)
        axes.plot(kept[:-1], retention[:-1], color=colour, linestyle="", marker=marker, markersize=6)
        labels.append((retention[0], key, colour, kept[0]))
    axes.plot([1.0], [1.0], color="black", marker="D", markersize=5, linestyle="")
    axes.annotate("base", (1.0, 1.0), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=10)
    _label_curves(axes, labels)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("parameters kept, of the base")
    axes.set_ylabel("retention in bits per byte, base over expert")
    axes.set_title("What is kept as the expert gets smaller", loc="left", fontsize=12, fontweight="bold")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.12)
    save_picture(figure, path)


def _label_curves(axes: Any, labels: list[tuple[float, str, str, float]]) -> None:
    """Each curve's name at its smallest expert, where curves lie furthest apart; never one over the other."""
    for number, (height, name, colour, kept) in enumerate(sorted(labels)):
        above = number == len(labels) - 1 and number > 0
        axes.annotate(
            name, (kept, height), xytext=(-10, 7 if above else -7), textcoords="offset points", ha="right",
            va="bottom" if above else "top", color=colour, fontsize=11, fontweight="bold",
        )  # fmt: skip
