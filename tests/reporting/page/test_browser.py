"""The report in a real browser: it fits a phone, says nothing on the console, and asks nobody for anything."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertprune.reporting.page import report
from tests.browsers import CHROMIUM, browser
from tests.experts import copied, measured

__all__ = ["browser"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
PHONE, DESK = 390, 1280

# How far content goes over the right edge, unless something around it scrolls.
OVER = """() => Math.max(document.documentElement.scrollWidth, ...[...document.body.querySelectorAll('*')]
  .filter(element => !element.closest('.scroll, pre, .word, svg') && element.getClientRects().length)
  .map(element => Math.ceil(element.getBoundingClientRect().right))) - innerWidth"""
# Text in the pictures that lies outside of its picture.
CUT = """() => [...document.querySelectorAll('svg text')].filter(text => {
  const outer = text.closest('svg').getBoundingClientRect(), inner = text.getBoundingClientRect();
  return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1
    || inner.bottom > outer.bottom + 1);
}).map(text => text.textContent)"""


def look(browser: Any, page: Path, width: int, scheme: str) -> SimpleNamespace:
    """What a browser sees of a page, with everything on it unfolded."""
    seen = SimpleNamespace(console=[], requests=[])
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    with contextlib.closing(context):
        tab = context.new_page()
        tab.on("console", lambda message: seen.console.append(message.text))
        tab.on("pageerror", lambda error: seen.console.append(str(error)))
        tab.on("request", lambda request: seen.requests.append(request.url))
        tab.goto(page.as_uri())
        folded = tab.evaluate(OVER)
        tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        seen.over = max(folded, tab.evaluate(OVER))
        seen.cut = tab.evaluate(CUT)
        widths = "[...document.querySelectorAll('figure svg')].map(each => each.getBoundingClientRect().width)"
        seen.pictures = [found for found in tab.evaluate(widths) if found]
        seen.paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.opened = tab.evaluate("document.querySelectorAll('details[open]').length")
    return seen


@pytest.fixture(scope="module")
def pages(tiny_build: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    full = measured(
        copied(tiny_build, folder / "full", name="an-expert-with-a-long-name-for-German-and-English-medicine")
    )
    bare = copied(tiny_build, folder / "bare", evaluation=None)
    report(full, store=tiny_build[1])
    report(full, [bare], store=tiny_build[1])
    return {"report": full / "report.html", "comparison": full / "comparison.html"}


@pytest.mark.parametrize("which", ["report", "comparison"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_in_a_browser(browser: Any, pages: dict[str, Path], which: str, width: int) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        seen = look(browser, pages[which], width, scheme)
        assert seen.over <= 0
        assert seen.console == []
        assert seen.requests == [pages[which].as_uri()]
        assert seen.cut == []
        assert (seen.opened >= 3) == (which == "report")  # a comparison folds nothing
        assert len(seen.pictures) == (6 if which == "report" else 0)
        papers.add(seen.paper)
    assert len(papers) == 2  # light and dark
