"""The report in a real browser: it fits a phone, says nothing on the console, and asks nobody for anything."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from expertprune.reporting.page import report
from tests.browsers import CHROMIUM, browser
from tests.experts import copied, measured

__all__ = ["browser"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

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


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Any, tiny_build: tuple[Path, Path], tmp_path: Path) -> None:
    """As wide as a phone, with everything on it unfolded."""
    name = "an-expert-with-a-long-name-for-German-and-English-medicine"
    full = measured(copied(tiny_build, tmp_path / "full", name=name))
    bare = copied(tiny_build, tmp_path / "bare", evaluation=None)
    report(full, store=tiny_build[1])
    report(full, [bare], store=tiny_build[1])
    papers = set()
    for which, scheme, pictures in (("report", "light", 6), ("comparison", "dark", 0)):
        page, console, requests = (full / f"{which}.html").as_uri(), list[str](), list[str]()
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        with contextlib.closing(context):
            tab = context.new_page()
            tab.on("console", lambda message, console=console: console.append(message.text))
            tab.on("pageerror", lambda error, console=console: console.append(str(error)))
            tab.on("request", lambda request, requests=requests: requests.append(request.url))
            tab.goto(page)
            assert tab.evaluate(OVER) <= 0
            tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
            assert tab.evaluate(OVER) <= 0
            assert tab.evaluate(CUT) == []
            drawn = "[...document.querySelectorAll('figure svg')].filter(each => each.getBoundingClientRect().width)"
            assert tab.evaluate(f"{drawn}.length") == pictures
            papers.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            opened = tab.evaluate("document.querySelectorAll('details[open]').length")
            assert (opened >= 3) == (which == "report")  # a comparison folds nothing
        assert (console, requests) == ([], [page])
    assert len(papers) == 2  # light and dark
