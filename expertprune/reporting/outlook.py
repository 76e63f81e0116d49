"""What experts of several sizes will keep: a table for the terminal, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertprune.composition.outlook import BROKEN, Outlook
from expertprune.reporting.pictures import QUIET, look, save_picture

_COLOURS, _MARKERS, _LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "os^D", ("-", "--", "-.", ":")


def outlook_table(outlook: Outlook) -> RenderableType:
    """A row for each size, a column for each corpus; where each corpus breaks, and warnings, below."""
    title = f"{outlook.name}: what experts of {outlook.base} will keep, in bits per byte of the base over theirs"
    table = Table("removed", title=Text(title))
    corpora = list(outlook.breaks)
    for header in ("parameters", "of base", "faster\n(at most)", *(f"{name}\n(95% interval)" for name in corpora)):
        table.add_column(Text(header), justify="right")
    for size in outlook.sizes:
        kept = [size.corpora[name] for name in corpora]
        cells = [f"{each.retention:.3f}\n({each.low:.3f} to {each.high:.3f})" for each in kept]
        table.add_row(f"{size.removed:g}", f"{size.parameters:,}", f"{size.fraction:.1%}", f"{size.speed:.2f}", *cells)
    return Group(table, *(Text(line) for line in _lines(outlook)))


def _lines(outlook: Outlook) -> list[str]:
    lines = list(_allocation(outlook))
    if outlook.times_lost:
        each = ", ".join(f"{name} lost {times:.2f}" for name, times in outlook.times_lost.items())
        lines.append(f"corrected by the expert of --built: {each} times what is foreseen without it")
    for name, broken in outlook.breaks.items():
        where = "in none of these sizes" if broken is None else f"from {broken:g} removed"
        lines.append(f"{name}: breaks (keeps less than {BROKEN:g}) {where}")
    lines += [f"{size:g} removed: {why}" for size, why in outlook.unreachable.items()]
    return lines + [f"warning: {warning}" for warning in outlook.warnings]


def _allocation(outlook: Outlook) -> Iterator[str]:
    """What the other allocation would keep, at the size where that is foreseen."""
    widths = {"global": "a width of its own in each layer", "uniform": "one width in all layers, a stock config"}
    other = next(name for name in widths if name != outlook.allocation)
    yield f"allocation {outlook.allocation}: {widths[outlook.allocation]}"
    for size in (size for size in outlook.sizes if size.instead):
        kept = [f"{each.retention:.3f} of {name}" for name, each in size.instead.items()]
        yield f"  {other} ({widths[other]}) would keep {', '.join(kept)} at {size.removed:g} removed"


def outlook_picture(outlook: Outlook, path: Path, overwrite: bool = False) -> None:
    """Retention of each corpus against the parameters kept. Bands are the intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 4.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    kept = [1.0, *(size.fraction for size in outlook.sizes)]
    for number, name in enumerate(outlook.breaks):
        colour, marker, line = look(number, _COLOURS, _MARKERS, _LINES)
        each = [size.corpora[name] for size in outlook.sizes]
        low, high = [1.0, *(one.low for one in each)], [1.0, *(one.high for one in each)]
        axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        retention = [1.0, *(one.retention for one in each)]
        axes.plot(kept, retention, color=colour, marker=marker, linestyle=line, markersize=5, label=name)
    axes.axhline(BROKEN, color=QUIET, linewidth=0.8, linestyle=":", label=f"below {BROKEN:g} a base breaks")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("parameters kept")
    axes.set_ylabel("retention (bits per byte, base over expert)")
    axes.set_title("What experts of this base will keep", loc="left", fontsize=12, fontweight="bold")
    bands = "forecast; bands: 95% intervals"
    axes.set_title(bands, loc="right", fontsize=9, color=QUIET)
    legend = axes.legend(loc="lower right", framealpha=1, edgecolor="none", prop={"size": 9})
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path, overwrite)
