"""Pictures of the report: values stand where they belong, and a figure is an element that any page can hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from expertprune.composition.excess import Foreseen
from expertprune.composition.outlook import ForeseenSize, Outlook
from expertprune.reporting import outlook
from expertprune.reporting.page import charts
from expertprune.reporting.page.charts import alignment_picture, kept_picture, relevance_picture, retention_picture
from expertprune.reporting.page.inline import ACCENT, INK, figure_of, svg

HOSTILE = "<script>alert(1)</script> $x_1$ & \"q\" 'q' 日本"


def style_of(element: ElementTree.Element, key: str) -> str:
    found = re.search(rf"(?:^|;\s*){key}:\s*([^;]+)", element.get("style", ""))
    return found.group(1) if found else ""


def test_an_element_has_the_pages_colours_text_that_stays_text_and_ids_of_its_own() -> None:
    ids = []
    for name in ("one", "two"):
        figure = figure_of(200, 100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot([0, 1], [0, 1], color=ACCENT, marker="o")
        axes.text(0.5, 0.5, HOSTILE, color=INK, fontsize=12, parse_math=False)
        drawn = svg(figure, name, HOSTILE)
        assert "<script" not in drawn
        root = ElementTree.fromstring(drawn)
        assert (root.get("viewBox"), root.get("role"), root.get("aria-label")) == ("0 0 200 100", "img", HOSTILE)
        assert not {"style", "metadata"} & {element.tag for element in root.iter()}
        (text,) = [element for element in root.iter("text") if element.text == HOSTILE]
        assert style_of(text, "fill") == "var(--ink)"
        assert style_of(text, "font-size") == "12px"
        assert "font-family" not in text.get("style", "")
        assert any(style_of(path, "stroke") == "var(--accent)" for path in root.iter("path"))
        own = {element.get("id") for element in root.iter() if element.get("id")}
        used = {use.get("href", "")[1:] for use in root.iter("use")}
        used |= set(re.findall(r"url\(#([^)]+)\)", drawn))
        assert used == own != set()
        ids.append(own)
    assert not ids[0] & ids[1]


def test_marks_stand_at_their_values_and_what_is_undefined_has_none() -> None:
    kept = {"a" * 99: (0.8, 0.8, 0.8), "undefined": (None, None, None), "b": (0.9, None, None), "c": (1.1, 1.1, 1.1)}
    rows: list[dict[str, Any]] = [
        {"group": "expert", "name": name, "label": "accuracy", "retention": retention, "low": low, "high": high}
        for name, (retention, low, high) in kept.items()
    ]
    picture = retention_picture("r", rows)
    assert picture is not None
    root = ElementTree.fromstring(picture)
    marks = [(float(use.get("y", "")), float(use.get("x", ""))) for use in root.iter("use")]
    first, second, third = (x for _, x in sorted(marks))  # in the order of the rows, downwards
    assert (second - first) / (third - first) == pytest.approx(0.1 / 0.3, rel=1e-3)
    assert "3 metrics" in root.get("aria-label", "")
    assert any((element.text or "").endswith("a…") for element in root.iter("text"))  # a long name is cut
    assert retention_picture("r", rows[1:2]) is None


def test_bars_are_as_high_as_their_counts() -> None:
    protected = [{"source": "language", "layers": [10, 20]}, {"source": "general", "layers": [20, 0]}]
    structure = {"label": "FFN neurons", "of": [40, 40], "kept_by_layer": [30, 20], "protected": protected}
    heights: dict[str, list[float]] = {}
    for path in ElementTree.fromstring(kept_picture("k", structure)).iter("path"):
        points = re.findall(r"[ML] [\d.]+ ([\d.]+)", path.get("d", ""))
        if len(points) == 4 and style_of(path, "fill").startswith("var(--"):
            height = float(max(points, key=float)) - float(min(points, key=float))
            heights.setdefault(style_of(path, "fill"), []).append(height)
    language, general, cut = (heights[f"var(--{name})"] for name in ("series-0", "series-3", "muted"))
    unit = language[0] / 10
    assert [language[1], general[0], *cut[:2]] == pytest.approx([20 * unit, 20 * unit, 10 * unit, 20 * unit], rel=1e-3)


def test_a_heat_map_is_logarithmic() -> None:
    shares = {"language/en": [0.001, 0.01, 0.989], "task/qa": [0.1, 0.1, 0.8], "none": None}
    corpora = [{"name": name, "by_layer": found} for name, found in shares.items()]
    picture = relevance_picture("h", "FFN neurons", corpora)
    assert picture is not None
    cells = [each for each in ElementTree.fromstring(picture).iter("path") if style_of(each, "fill") == "var(--accent)"]
    wide = [float(style_of(cell, "fill-opacity") or 1) for cell in cells[:6]]  # in the order of rows and columns
    assert (wide[0], wide[2], wide[3]) == (min(wide), max(wide), wide[4])
    # 0.001, 0.01 and 0.1 are equally far from each other
    assert wide[1] - wide[0] == pytest.approx(wide[3] - wide[1], abs=2e-3)
    assert relevance_picture("h", "FFN neurons", corpora[2:]) is None


def test_many_series_differ_in_colour_marker_or_line(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(charts, "svg", lambda figure, *_: figures.append(figure))
    monkeypatch.setattr(outlook, "save_picture", lambda figure, *_: figures.append(figure))
    names = [f"corpus {number}" for number in range(8)]
    charts.alignment_picture("a", [{"name": name, "layers": [1.0, 0.9]} for name in names])
    kept = dict.fromkeys(names, Foreseen(excess=0.1, retention=0.9, low=0.8, high=0.95))
    size = ForeseenSize(removed=0.5, parameters=1, fraction=0.5, speed=2.0, corpora=kept, instead={})
    outlook.outlook_picture(Outlook("n", "b", 2, "global", [size], {}, {}, dict.fromkeys(names), []), Path("n.png"))
    for figure in figures:
        lines = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
        assert len(looks) == len(lines) == len(names)
    assert len(figures) == 2


def test_a_forecast_shows_names_as_they_are(tmp_path: Path) -> None:
    """Between two dollars, matplotlib reads a formula, and fails where it is none."""
    names = ["domain/a$\\frac$", "task/$5 to $6"]
    kept = dict.fromkeys(names, Foreseen(excess=0.1, retention=0.9, low=0.8, high=0.95))
    size = ForeseenSize(removed=0.5, parameters=1, fraction=0.5, speed=2.0, corpora=kept, instead={})
    picture = tmp_path / "forecast.svg"
    outlook.outlook_picture(Outlook("n", "b", 2, "global", [size], {}, {}, dict.fromkeys(names), []), picture)
    assert {*names} <= {element.text for element in ElementTree.parse(picture).iter()}


def test_alignment_is_drawn_where_it_is_defined() -> None:
    entries = [{"name": HOSTILE, "layers": [1.0, None, 0.8]}, {"name": "task qa", "layers": [None, None, None]}]
    assert "on 1 corpora; the lowest is 0.8000" in str(alignment_picture("a", entries))
    assert alignment_picture("a", entries[1:]) is None
