"""A headless Chromium for tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """The browser, for a test that cannot have its event loop afterwards; skipped without playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with (
        api.sync_playwright() as play,
        contextlib.closing(
            play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root, in a container
        ) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser; tests that use it are skipped without `CHROMIUM` or playwright."""
    with opened() as found:
        yield found
