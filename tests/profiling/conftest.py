"""What tests of passes share."""

from __future__ import annotations

import pytest

from tests.patching import everywhere


@pytest.fixture
def not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay in float32, so that they compare closer than half precision allows."""
    everywhere(monkeypatch, "expertprune.artifacts.profile.halved", lambda name, values: {name: values})
