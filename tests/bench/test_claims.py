"""What a table of tasks says of answers that are planted."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import claims
from bench.claims import BASE, TASKS, Cell, cells
from bench.records import made, write


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 25%, an expert of both texts answers all right, one of its task alone half, one of general text none."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    parts = {"general only": [0, 0, 0, 0], "task only": [1, 0, 1, 0]}
    for cell in cells((0.25,)):
        right = [1, 1, 1, 0] if cell == BASE else parts.get(cell.way, [1, 1, 1, 1])
        kept = {"right": dict.fromkeys(cell.tasks, right), "text": {"nats": [3.0], "tokens": [2]}, "made": made()}
        write(cell.path, kept)


@pytest.mark.usefixtures("planted")
def test_gains_are_differences_of_the_same_questions() -> None:
    assert claims.gain("both, weighted", "general only", (0.25,)) == "+100.0 (+100.0 to +100.0)"
    value, low, _, high = claims.gain("both, weighted", "task only", (0.25,)).replace("(", "").replace(")", "").split()
    assert value == "+50.0"
    assert float(low) < 50 < float(high)


@pytest.mark.usefixtures("planted")
def test_only_sparsities_with_all_cells_are_shown() -> None:
    write(Cell("magnitude", sparsity=0.4).path, {"right": {}, "text": {}, "made": made()})
    found = claims.text()
    assert "| 25% | taylor | both, weighted | 1.000 | 1.000 | 1.000 | 1.000 | 0.000" in found
    assert "40%" not in found


def test_every_cell_has_a_file_of_its_own() -> None:
    every = list(cells())
    assert len({cell.path for cell in every}) == len(every) == 1 + 2 * (1 + 2 * (1 + 3 * len(TASKS)))
