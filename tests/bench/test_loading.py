"""The script that loads an expert where expertprune is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.loading import Loaded, compared, load


def test_a_route_fails_where_expertprune_can_be_imported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expertprune is installed here"):
        load("transformers", sys.executable, tmp_path)


def test_tokens_are_compared_one_by_one() -> None:
    first = Loaded([[1, 2, 3], [4, 5]], {}, 1.0)
    assert compared(first, first) == "5 of 5"
    assert compared(first, Loaded([[1, 2], [5, 5]], {}, 1.0)) == "3 of 5"
