"""Write the report: one HTML file that stands alone, the model card, and the headline."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich.table import Table
from rich.text import Text

from expertprune import formats
from expertprune.artifacts.timing import METRICS
from expertprune.errors import CheckpointError
from expertprune.files import (
    COMPARISON_PAGE,
    GENERATOR,
    PAGE,
    PAGE_SUFFIXES,
    REPORT_PAGE,
    check_output,
    staged_output,
    to_json,
    write_file,
)
from expertprune.models.origin import CARD_FILE
from expertprune.reporting.card import card_text
from expertprune.reporting.page import charts
from expertprune.reporting.page.evidence import read_artifacts
from expertprune.reporting.page.findings import findings
from expertprune.reporting.page.lineup import lineup
from expertprune.reporting.page.reasons import NOT_CUT

log = logging.getLogger(__name__)


REPORT_SCHEMA = 2


UNKNOWN = "unknown"


# By metric of `expertprune bench`, its name for people and whether more is better.
SPEEDS = {metric: (words.removesuffix(", bytes"), more) for metric, (words, more) in METRICS.items()}


@dataclass(frozen=True)
class PlacedNumber:
    """A number of the report's data, and where it stands there: a JSON pointer (RFC 6901)."""

    value: float
    pointer: str

    def __bool__(self) -> bool:
        return bool(self.value)

    def __html__(self) -> str:
        raise TypeError(f"{self.pointer}: a number goes onto the page through a filter that says how it is written")

    __str__ = __html__


def report(
    expert: str | Path,
    compare: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    store: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the report of an expert, or of several side by side, and refresh their model cards.

    A card that cannot be written, in a folder that is for reading only, stays as it was, and a warning says so.

    Args:
        compare: the folder of another expert, or of several.
        out: the page; default: `report.html`, or `comparison.html` where there are several, in the
            expert's folder.
        overwrite: replace the page that is there; the default page is always made anew.

    Returns:
        The report's data: `kind`, `schema`, `page`, `experts` (each a `ReportData`), and a
        `Lineup`, `None` for a single one.

    Raises:
        CheckpointError: a folder is no expert or is half-written, or the page cannot be written.
        PlanError: an expert's plan is damaged.
    """
    others = [compare] if isinstance(compare, str | Path) else compare
    folders = [Path(folder) for folder in (expert, *others)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CheckpointError(f"{' '.join(map(str, folders))}: the same expert twice; compare it with another one")
    page = Path(out) if out is not None else folders[0] / (COMPARISON_PAGE if others else REPORT_PAGE)
    overwrite = overwrite or out is None
    _check_page(page, overwrite)
    read = [read_artifacts(folder, store) for folder in folders]
    experts = [findings(artifacts) for artifacts in read]
    data: dict[str, Any] = json.loads(
        to_json(
            {
                "kind": "report",
                "schema": REPORT_SCHEMA,
                "page": str(page),
                "experts": [each.document() for each in experts],
                "lineup": asdict(lineup(experts)) if compare else None,
            }
        )
    )
    html = render(data)
    cards = {
        artifacts.expert.folder / CARD_FILE: card_text(artifacts.expert, headline_rows(document))
        for artifacts, document in zip(read, data["experts"], strict=True)
    }
    with staged_output(page, PAGE, overwrite) as temporary:
        temporary.write_bytes(html.encode())
    for card, text in cards.items():
        try:
            write_file(card, text.encode())
        except CheckpointError as error:  # the page is what was asked for, and is there
            log.warning("%s; the page is whole, and this model card stays as it was", error)
    return data


def _check_page(page: Path, overwrite: bool) -> None:
    if page.suffix.lower() not in PAGE_SUFFIXES:
        raise CheckpointError(f"{page}: the report is an .html file; choose another --out")
    check_output(page, overwrite, PAGE)


def render(data: Mapping[str, Any]) -> str:
    """The page of a report's data. Every number on it is one of the data."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expertprune.reporting.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for style in formats.STYLES:
        environment.filters[style] = _filter(style)
    environment.filters |= {"groups": _groups, "plain": _plain, "link": _link}
    environment.filters["speed"] = lambda value, metric: _written(
        value, "megabytes" if "bytes" in metric else "quantity"
    )
    pictures = None if data["lineup"] else expert_pictures(data["experts"][0])
    return environment.get_template("report.html").render(
        **_numbered(data, ""),
        pictures=pictures,
        speeds=SPEEDS,
        names=_names(data["experts"]),
        generator=GENERATOR,
        not_cut=NOT_CUT,
    )


def _names(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each expert's name, folder's name or folder: the first that tells all of them apart."""
    for names in ([str(e["name"]) for e in experts], [Path(e["folder"]).resolve().name for e in experts]):
        if len(set(names)) == len(names):
            return names
    return [str(expert["folder"]) for expert in experts]


def _numbered(data: Any, pointer: str) -> Any:
    """Plain data with every number as a `PlacedNumber`."""
    if isinstance(data, Mapping):
        return {key: _numbered(value, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
                for key, value in data.items()}  # fmt: skip
    if isinstance(data, list):
        return [_numbered(value, f"{pointer}/{index}") for index, value in enumerate(data)]
    return PlacedNumber(data, pointer) if isinstance(data, int | float) and not isinstance(data, bool) else data


def _filter(style: str) -> Any:
    return lambda value: _written(value, style)


def _written(value: PlacedNumber | None, style: str) -> Markup:
    """A number rounded for people, with its exact value for machines."""
    if value is None:
        return Markup(f'<span class="quiet">{formats.UNDEFINED}</span>')
    text = formats.STYLES[style](value.value)
    exact = json.dumps(value.value)
    return Markup(f'<data value="{exact}" data-pointer="{escape(value.pointer)}">{text}</data>')


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """Rows of a table by group and name, in their order."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["group"], row["name"]), []).append(row)
    return list(found.items())


def _plain(value: Any) -> str | Markup:
    """A setting or a machine, as a program recorded it."""
    if isinstance(value, PlacedNumber):
        return _written(value, "quantity")
    if isinstance(value, Mapping):
        return Markup(", ").join(
            Markup("{} {}").format(key.replace("_", " "), _plain(each)) for key, each in value.items()
        )
    if isinstance(value, list):
        return Markup(", ").join(_plain(each) for each in value)
    return UNKNOWN if value is None else str(value)


def _link(address: str) -> str:
    """The address of a link, unless it is a script."""
    return address if address.startswith(("https://", "http://")) else "#"


def expert_pictures(expert: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of one expert by section; `None` where there is nothing to draw."""
    return {
        "retention": charts.retention_picture("retention", expert["metrics"]),
        "kept": {
            each["structure"]: charts.kept_picture(f"kept-{each['structure']}", each)
            for each in expert["structures"]
            if each["decided"]
        },
        "relevance": [
            charts.relevance_picture(f"relevance-{each['structure']}", each["label"], each["corpora"])
            for each in expert["relevance"] or []
        ],
        "alignment": charts.alignment_picture("alignment", expert["alignment"]),
    }


# --- the headline ---------------------------------------------------------------------------------------------------


def headline_rows(expert: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An expert at a glance, as pairs of label and text."""
    size, retention, speed = expert["size"], expert["retention"], expert["speed"]
    parameters, weights = size["parameters"], size["weights"]
    of_base = f"{formats.count(parameters['expert'])} of {formats.count(parameters['base'])}"
    rows = [("parameters", f"{of_base} ({formats.percent(parameters['fraction'])})")]
    of_base = f"{formats.megabytes(weights['expert'])} of {formats.megabytes(weights['base'])}"
    rows.append(("weights", f"{of_base} ({formats.percent(weights['fraction'])})"))
    for group in ("expert", "general"):
        numbers = retention[group]
        kept = f"{_with_interval(numbers, 'retention')}, bits per byte" if numbers else "not evaluated"
        rows.append((f"{group} retention", kept))
    rows.append(
        ("speed, of the base's", f"{_with_interval(speed, 'ratio')}, output tokens/s" if speed else "not measured")
    )
    return rows


def _with_interval(numbers: Mapping[str, Any], key: str) -> str:
    if key == "ratio" and numbers["low"] is None:
        return f"{formats.ratio(numbers[key])} (one round)"
    value = formats.UNDEFINED if numbers[key] is None else formats.ratio(numbers[key])
    return f"{value} ({formats.interval(numbers['low'], numbers['high'])})"


def headline_table(data: Mapping[str, Any]) -> Table:
    """The headline of every expert of a report, for the terminal."""
    experts = data["experts"]
    table = Table("", title="At a glance")
    for name in _names(experts):
        table.add_column(Text(name), justify="right", overflow="fold")
    columns = [headline_rows(expert) for expert in experts]
    labels = list(dict.fromkeys(label for rows in columns for label, _ in rows))
    for label in labels:
        table.add_row(label, *(dict(rows).get(label, "") for rows in columns))
    return table
