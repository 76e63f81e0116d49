"""Matplotlib figures as SVG elements in the page's colours and font, with ids of their own."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Matplotlib draws with these colours. The element names variables of the page in their place, so
# that one figure serves a light and a dark page.
INK, MUTED, RULE, ACCENT = "#010101", "#020202", "#030303", "#040404"


SERIES = tuple(f"#0600{number:02x}" for number in range(6))


_VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)},
}  # fmt: skip


_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


_REFERENCE = re.compile(r"url\(#([^)]+)\)")


_FONT = re.compile(r"font-family:[^;]*;?\s*")


_SHORT_FONT = re.compile(r"font:\s*((?:\S+\s+)*?)([\d.]+px)[^;]*")


def figure_of(width: float, height: float) -> Figure:
    """A figure of so many CSS pixels, which are also the unit of its fonts and lines."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def svg(figure: Figure, name: str, alternative: str) -> str:
    """A figure as an `<svg>` element.

    Args:
        name: begins its ids, so give each figure of a page another one.
        alternative: text for readers who do not see the figure.
    """
    import matplotlib

    stream = io.BytesIO()
    settings: Any = {"svg.hashsalt": name, "svg.fonttype": "none"}
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font has glyphs that matplotlib's own lacks
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    root = ElementTree.fromstring(stream.getvalue())
    _clean(root)
    _name_ids(root, name)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {
        "viewBox": box, "role": "img", "aria-label": alternative, "width": box.split()[2], "height": box.split()[3]
    }  # fmt: skip
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _clean(root: ElementTree.Element) -> None:
    """Name the page's colours; drop namespaces, metadata and the style sheet."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(_SVG) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, f"var({variable})")
            if key == "style":
                value = _SHORT_FONT.sub(r"font-size: \2", _FONT.sub("", value)) if "font" in value else value
            element.attrib["href" if key == f"{_XLINK}href" else key] = value


def _name_ids(root: ElementTree.Element, name: str) -> None:
    """Put the figure's name before ids that something refers to, and drop the other ids."""
    wanted = {value.removeprefix("#") for e in root.iter() if (value := e.get("href", "")).startswith("#")}
    wanted |= {found for e in root.iter() for value in e.attrib.values() for found in _REFERENCE.findall(value)}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in wanted:
            element.set("id", f"{name}-{own}")
        for key, value in list(element.attrib.items()):
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            else:
                element.set(key, _REFERENCE.sub(lambda found: f"url(#{name}-{found.group(1)})", value))
