"""Pictures of the report: values stand where they belong, and a figure is an element that any page can hold."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from expertprune.reporting.page.charts import alignment_picture, kept_picture, relevance_picture, retention_picture
from expertprune.reporting.page.inline import ACCENT, INK, figure_of, svg

HOSTILE = "<script>alert(1)</script> $x_1$ & \"q\" 'q' 日本"


def style_of(element: ElementTree.Element, key: str) -> str:
    found = re.search(rf"(?:^|;\s*){key}:\s*([^;]+)", element.get("style", ""))
    return found.group(1) if found else ""


def a_figure(text: str = "text") -> Any:
    figure = figure_of(200, 100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.plot([0, 1], [0, 1], color=ACCENT, marker="o")
    axes.text(0.5, 0.5, text, color=INK, fontsize=12, parse_math=False)
    return figure


def test_an_element_has_the_pages_colours_and_no_style_sheet() -> None:
    root = ElementTree.fromstring(svg(a_figure(), "one", "what it shows"))
    assert root.tag == "svg"
    assert (root.get("viewBox"), root.get("role"), root.get("aria-label")) == ("0 0 200 100", "img", "what it shows")
    assert not list(root.iter("style"))
    assert not list(root.iter("metadata"))
    (text,) = [element for element in root.iter("text") if element.text == "text"]
    assert style_of(text, "fill") == "var(--ink)"
    assert style_of(text, "font-size") == "12px"
    assert "font-family" not in text.get("style", "")
    assert any(style_of(path, "stroke") == "var(--accent)" for path in root.iter("path"))


def test_ids_of_two_elements_differ_and_refer_within() -> None:
    ids = []
    for name in ("one", "two"):
        root = ElementTree.fromstring(svg(a_figure(), name, "picture"))
        own = {element.get("id") for element in root.iter() if element.get("id")}
        assert own
        used = {use.get("href", "")[1:] for use in root.iter("use")}
        used |= set(re.findall(r"url\(#([^)]+)\)", ElementTree.tostring(root, encoding="unicode")))
        assert used == own
        ids.append(own)
    assert not ids[0] & ids[1]


def test_text_stays_text() -> None:
    drawn = svg(a_figure(HOSTILE), "one", HOSTILE)
    assert "<script" not in drawn
    root = ElementTree.fromstring(drawn)
    assert root.get("aria-label") == HOSTILE
    assert HOSTILE in [element.text for element in root.iter("text")]


def metric(name: str, retention: float | None, group: str = "expert", wide: float | None = 0.0) -> dict[str, Any]:
    low, high = (None, None) if retention is None or wide is None else (retention - wide, retention + wide)
    return {"group": group, "name": name, "label": "accuracy", "retention": retention, "low": low, "high": high}


def test_marks_stand_at_their_values_and_what_is_undefined_has_none() -> None:
    rows = [metric("a" * 99, 0.8), metric("undefined", None), metric("b", 0.9, wide=None), metric("c", 1.1, "general")]
    picture = retention_picture("r", rows)
    assert picture is not None
    root = ElementTree.fromstring(picture)
    marks = [(float(use.get("y", "")), float(use.get("x", ""))) for use in root.iter("use")]
    first, second, third = (x for _, x in sorted(marks))  # in the order of the rows, downwards
    assert (second - first) / (third - first) == pytest.approx(0.1 / 0.3, rel=1e-3)
    assert "3 metrics" in root.get("aria-label", "")
    assert any((element.text or "").endswith("a…") for element in root.iter("text"))  # a long name is cut
    assert retention_picture("r", [metric("undefined", None)]) is None


def test_bars_are_as_high_as_their_counts() -> None:
    structure = {
        "label": "FFN neurons",
        "of": [40, 40],
        "kept_by_layer": [30, 20],
        "protected": [{"source": "language", "layers": [10, 20]}, {"source": "general", "layers": [20, 0]}],
    }
    root = ElementTree.fromstring(kept_picture("k", structure))
    heights: dict[str, list[float]] = {}
    for path in root.iter("path"):
        points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))]
        fill = style_of(path, "fill")
        if len(points) == 4 and fill.startswith("var(--"):
            heights.setdefault(fill, []).append(max(y for _, y in points) - min(y for _, y in points))
    unit = heights["var(--series-0)"][0] / 10
    assert heights["var(--series-0)"][1] == pytest.approx(20 * unit, rel=1e-3)
    assert heights["var(--series-3)"][0] == pytest.approx(20 * unit, rel=1e-3)
    assert heights["var(--muted)"][:2] == pytest.approx([10 * unit, 20 * unit], rel=1e-3)


def test_a_heat_map_is_logarithmic() -> None:
    corpora = [
        {"name": "language/en", "by_layer": [0.001, 0.01, 0.989]},
        {"name": "task/qa", "by_layer": [0.1, 0.1, 0.8]},
    ]
    picture = relevance_picture("h", "FFN neurons", corpora)
    assert picture is not None
    cells = [each for each in ElementTree.fromstring(picture).iter("path") if style_of(each, "fill") == "var(--accent)"]
    wide = [float(style_of(cell, "fill-opacity") or 1) for cell in cells[:6]]  # in the order of rows and columns
    assert wide[0] == min(wide)
    assert wide[2] == max(wide)
    assert wide[3] == wide[4]
    # 0.001, 0.01 and 0.1 are equally far from each other
    assert wide[1] - wide[0] == pytest.approx(wide[3] - wide[1], abs=2e-3)
    assert relevance_picture("h", "FFN neurons", [{"name": "a", "by_layer": None}]) is None


def test_alignment_is_drawn_where_it_is_defined() -> None:
    entries = [{"name": HOSTILE, "layers": [1.0, None, 0.8]}, {"name": "task qa", "layers": [None, None, None]}]
    picture = alignment_picture("a", entries)
    assert picture is not None
    assert "on 1 corpora; the lowest is 0.8000" in ElementTree.fromstring(picture).get("aria-label", "")
    assert alignment_picture("a", entries[1:]) is None
