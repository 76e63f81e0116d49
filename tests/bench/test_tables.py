"""The tables of bench/README.md and bench/LOG.md, and the commands behind them."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import claims, experts, instruct, outlook, quality, records, served_bytes, tables, vocabulary
from bench.bytes import CELLS, SCHEMES, path_of
from bench.cells import Bench, Cell, Result, agrees, stored
from bench.measure import Sums


def test_the_tables_are_those_of_the_results() -> None:
    for path in tables.FILES:
        text = path.read_text()
        assert tables.filled(text, path.name) == text, f"{path.name} is stale: run python -m bench.tables"


def test_every_table_and_every_result_is_used() -> None:
    text = "".join(path.read_text() for path in tables.FILES)
    assert [name for name in tables.TABLES if f"<!-- {name} -->" not in text] == []
    used = {cell.path() for cell in every_cell(retired=True)}
    used |= {cell.path() for cell in (*outlook.SHAPES.values(), *outlook.cells())}
    used |= {records.RESULTS / f"{name}.json" for name in tables.RECORDED}
    used |= {records.RESULTS / f"vocabulary-{name}.json" for name in vocabulary.EXPERTS}
    every = set(records.RESULTS.glob("*.json"))
    assert used - every == set()
    # of these tables, what is measured so far
    partly = {cell.path for cell in claims.cells()} | {
        instruct.path_of(base, arm) for base in instruct.BASES for arm in (instruct.BASE, *instruct.ARMS)
    }
    partly |= {experts.path_of("base")} | {
        experts.path_of(*each) for each in itertools.product(experts.EXPERTS, experts.ROWS)
    }
    partly |= {row.path for row in served_bytes.ROWS.values()}
    assert every - used <= partly | {path_of(*row) for row in itertools.product(CELLS, SCHEMES)}


def test_a_table_is_written_between_its_marks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "new", "two": lambda: "newer"})
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\nc\n"
    expected = "a\n<!-- one -->\nnew\n<!-- /one -->\nb\n<!-- two -->\nnewer\n<!-- /two -->\nc\n"
    assert tables.filled(text, "FILE") == expected
    for wrong, said in (
        ("<!-- three -->\n<!-- /three -->\n", "FILE: <!-- three --> names no table; there are: one, two"),
        (text + "<!-- one -->\n", "FILE: every <!-- NAME --> needs"),
    ):
        with pytest.raises(ValueError, match=said):
            tables.filled(wrong, "FILE")


def test_a_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "README.md", list[Path]()
    path.write_text("<!-- one -->\nnew\n<!-- /one -->\n")
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "new"})
    monkeypatch.setattr(tables, "FILES", (path,))
    monkeypatch.setattr(Path, "write_text", lambda file, *_, **__: written.append(file))
    for words, expected in ((["--check"], []), ([], [path])):
        monkeypatch.setattr(sys, "argv", ["tables", *words])
        tables.main()
        assert written == expected


def result(nats: float, removed: int = 0, piqa: float = 1.0) -> Result:
    """`nats` for each of 100 tokens in each of two documents."""
    sums = Sums(np.array([nats * 100] * 2), np.array([100.0] * 2))
    made = {"commits": [f"c{removed}"], "dates": ["2026-01-01"], "versions": {"torch": "2"}}
    return Result(dict.fromkeys(("PubMedQA", "WikiText-2", "GSM8K"), sums), [piqa], removed, 7, made)


def test_a_row_shows_the_mean_over_seeds_and_their_range() -> None:
    def get(cell: Cell) -> Result:
        return result(2.0) if cell.method == "base" else result(2.1 + 0.1 * cell.seed, 19_906_560, cell.seed / 2)

    rows = {row[0]: row for row in quality.peers(get).rows}
    # exp(2) is 7.39; the seeds' mean of 2.1, 2.2 and 2.3 nats is 2.2, and exp(2.2) is 9.03.
    figures = ["9.03", "0.200 (0.200 to 0.200); seeds 0.100 to 0.300"]
    assert rows["flap"] == ["flap", "19.91M", *figures * 3, "0.500"]
    assert rows["base"][:4] == ["base", "", "7.39", "0.000 (0.000 to 0.000)"]
    assert rows["magnitude"][3] == "0.100 (0.100 to 0.100)"  # one seed: no range


def test_parts_and_means_are_compared_with_the_default() -> None:
    def get(cell: Cell) -> Result:
        return result(2.0 if cell.method == "base" else 2.5 if cell.overrides.get("compose.rule") == "mean" else 2.3)

    rows = {row[0]: row for row in quality.parts(get).rows}
    assert rows["intersection → mean"][1:3] == ["0.500", "+0.200 (+0.200 to +0.200)"]
    assert rows["ours (all parts as by default)"][1:3] == ["0.300", ""]

    def scored(cell: Cell) -> Result:
        return result(2.0 if cell.method == "base" else 2.1 if cell.general else 2.4, piqa=bool(cell.general))

    means = {row[0]: row for row in quality.task_means(scored).rows}
    assert means["expert only"] == ["expert only", *["0.400", "+0.300"] * 3, "0.000", "+1.000"]
    assert means[quality.FUSED] == [quality.FUSED, *["0.100", ""] * 3, "1.000", ""]


def test_a_result_is_taken_only_for_what_it_was_measured_on(tmp_path: Path) -> None:
    second = {"commits": ["b"], "dates": ["2026-01-03"], "versions": {"torch": "2"}}
    first = {"commits": ["a"], "dates": ["2026-01-01"], "versions": {"torch": "2", "expertprune": "1"}}
    assert records.described([second, first]) == "Commits a, b; expertprune 1, torch 2; 2026-01-01 to 2026-01-03."
    assert Cell("base").path() == Cell("base", dtype="auto").path() != Cell("base", dtype="bfloat16").path()
    assert Cell("flap", dtype="bfloat16").asked["dtype"] == "bfloat16"
    assert "dtype" not in Cell("flap").asked
    before = {"base": "x", "spec": {"compose": {"rule": "mean", "gone": 1}}}
    assert agrees(before, {"base": "x", "spec": {"compose": {"rule": "mean", "new": 2}}})
    assert not agrees(before, {"base": "x", "spec": {"compose": {"rule": "union"}}})
    assert not agrees(before, {"base": "y", "spec": {"compose": {"rule": "mean"}}})
    with pytest.raises(records.NotMeasuredError, match='"method": "flap"'):
        stored(Cell("flap"), tmp_path)


def every_cell(retired: bool = False) -> list[Cell]:
    cells: list[Cell] = []

    def get(cell: Cell) -> Result:
        cells.append(cell)
        return stored(cell)

    for table in quality.TABLES.values():
        table(get)
    if retired:
        quality.parts(get, quality.RETIRED)
        quality.task(get, ("obs",))
    return cells


def test_every_cell_is_a_legal_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "pieces", lambda self, name: tmp_path / f"{name}.jsonl")
    specs: dict[str, Any] = {}
    for cell in every_cell():
        specs.setdefault(str(replace(cell, seed=0)), Bench(tmp_path).spec(cell))
    for spec in vocabulary.EXPERTS:
        specs[spec] = vocabulary.Bench(tmp_path, 12).spec(spec)
    assert len(specs) > 50
