"""Experts side by side: one row per metric, and where their numbers cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from expertprune.artifacts.evaluation import CorpusGroup, Group
from expertprune.reporting.page.findings import MetricRow, ReportData
from expertprune.reporting.page.reasons import LAYERS, CutStructure
from expertprune.spec.schema import PER_TOKEN, TO_BASE

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class StructureRow:
    """Kept units of a structure, with a cell for each expert (`None`: it has no such units)."""

    label: str
    cells: list[CutStructure | None]


@dataclass(frozen=True)
class LineupRow:
    """One metric, with a cell for each expert (`None`: not measured).

    `values` says why the experts' own numbers cannot be compared, `retention` why their retentions
    cannot; `None` where they can.
    """

    name: str
    label: str
    cells: list[MetricRow | None]
    values: str | None
    retention: str | None


@dataclass(frozen=True)
class Lineup:
    """What several experts have in common, and what to mind when you compare them."""

    notes: list[str]
    structures: list[StructureRow]
    rows: list[LineupRow]


def lineup(experts: Sequence[ReportData]) -> Lineup:
    """Several experts side by side, with every structure and metric that one of them has."""
    same_base = _same(experts, lambda expert: expert.base.digest)
    keys = dict.fromkeys((row.group, row.name, row.metric) for each in experts for row in each.metrics)
    rows = [_row(experts, key, same_base) for key in sorted(keys, key=lambda key: get_args(CorpusGroup).index(key[0]))]
    notes = []
    if not same_base:
        names = ", ".join(dict.fromkeys(expert.base.model for expert in experts))
        notes.append(
            f"These experts have different bases ({names}): each retention is relative to the expert's own base."
        )
    if unlike := [row for row in rows if row.values]:
        notes.append(f"In {len(unlike)} of {len(rows)} rows the numbers are not of the same kind; the row says why.")
    notes += [
        f"The {group} retentions are of different documents; compare the rows of corpora that the experts share."
        for group in get_args(Group)
        if not _same([_read(expert, group) for expert in experts if expert.retention[group]], lambda read: read)
    ]
    timed = [expert.throughput for expert in experts if expert.throughput is not None]
    if not _same(timed, lambda throughput: str(throughput.machine)):
        notes.append("Throughput was measured on different machines.")
    elif not _same(timed, lambda throughput: throughput.settings):
        notes.append("Throughput was measured with different prompts.")
    labels = {entry.structure: entry.label for expert in experts for entry in expert.structures}
    structures = [
        StructureRow(label, [_of_structure(each, structure, label) for each in experts])
        for structure, label in labels.items()
    ]
    return Lineup(notes, structures, rows)


def _of_structure(expert: ReportData, structure: str, label: str) -> CutStructure | None:
    """An expert's units of a structure. Its plan counts whole layers only if some were to go; else all are there."""
    found = next((each for each in expert.structures if each.structure == structure), None)
    if found is not None or structure != LAYERS:
        return found
    layers = len(expert.structures[0].of)
    return CutStructure(LAYERS, label, False, layers, layers, 0, 1.0, [1] * layers, [1] * layers, [], [])


def _same(items: Sequence[_Item], key: Callable[[_Item], Any]) -> bool:
    return all(key(item) == key(items[0]) for item in items)


def _read(expert: ReportData, group: Group) -> set[str]:
    """The documents behind the headline of a group."""
    of_documents = (row for row in expert.metrics if (row.suite, row.unit) == ("corpora", "documents"))
    return {row.same for row in of_documents if row.group == group}


def _row(experts: Sequence[ReportData], key: tuple[str, str, str], same_base: bool) -> LineupRow:
    cells = [next((row for row in each.metrics if (row.group, row.name, row.metric) == key), None) for each in experts]
    there = [(expert, row) for expert, row in zip(experts, cells, strict=True) if row is not None]
    first, metric, values = there[0][1], key[2], None
    if not _same(there, lambda each: each[1].same):
        values = f"not the same {first.unit}"
    elif metric in PER_TOKEN and not _same(there, lambda each: each[0].base.tokenizer_digest):
        values = "different tokenizers"
    elif metric in TO_BASE and not same_base:
        values = "compared with different bases"
    retention = None if same_base and values is None else values or "relative to different bases"
    return LineupRow(first.name, first.label, cells, values, retention)
