"""Experts side by side: one row per metric, and where their numbers cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from expertprune.reporting.page.findings import ReportData

_RELATIVE = {"kl"}  # a distance to the expert's own base


_PER_TOKEN = {"perplexity", "kl"}  # of other tokens where the tokenizer is another one


def lineup(experts: Sequence[ReportData]) -> dict[str, Any]:
    """What several experts have in common, as plain data.

    `rows` holds every metric that one of them was measured on, with a cell for each expert (or `None`), and two reasons why
    numbers in a row cannot be compared, or `None`: `values` of the experts' own numbers, `retention` of their part of the
    base's.
    """
    same_base = _same(experts, lambda expert: expert.base["digest"])
    keys = dict.fromkeys((row["group"], row["name"], row["metric"]) for each in experts for row in each.metrics)
    rows = [_row(experts, key, same_base) for key in sorted(keys, key=lambda key: key[0] == "general")]
    notes = []
    if not same_base:
        names = ", ".join(dict.fromkeys(str(expert.base["model"]) for expert in experts))
        notes.append(
            f"These experts have different bases ({names}): each retention is relative to the expert's own base."
        )
    if not _same([e for e in experts if e.retention], lambda expert: (expert.retention or {})["measure"]):
        notes.append("Retention at the top is measured in different ways: evaluate all of them again to compare it.")
    unlike = [row for row in rows if row["values"]]
    if unlike:
        notes.append(f"In {len(unlike)} of {len(rows)} rows the numbers are not of the same kind; the row says why.")
    timed = [expert for expert in experts if expert.throughput]
    if not _same(timed, lambda expert: str((expert.throughput or {})["machine"])):
        notes.append("Throughput was measured on different machines.")
    elif not _same(timed, lambda expert: (expert.throughput or {})["settings"]):
        notes.append("Throughput was measured with different prompts.")
    return {"same_base": same_base, "notes": notes, "structures": _structures(experts), "rows": rows}


def _structures(experts: Sequence[ReportData]) -> list[dict[str, Any]]:
    """Kept units of every structure that one of the experts has, with a cell for each expert (or `None`)."""
    labels = {entry["structure"]: entry["label"] for expert in experts for entry in expert.structures}
    rows = []
    for structure, label in labels.items():
        found = [
            next((entry for entry in each.structures if entry["structure"] == structure), None) for each in experts
        ]
        cells = [entry and {key: entry[key] for key in ("units", "kept", "kept_fraction")} for entry in found]
        rows.append({"structure": structure, "label": label, "cells": cells})
    return rows


def _same(experts: Sequence[ReportData], key: Callable[[ReportData], Any]) -> bool:
    return all(key(expert) == key(experts[0]) for expert in experts)


def _row(experts: Sequence[ReportData], key: tuple[str, str, str], same_base: bool) -> dict[str, Any]:
    group, name, metric = key
    found = [next((row for row in each.metrics if (row["group"], row["name"], row["metric"]) == key), None)
             for each in experts]  # fmt: skip
    there = [(expert, row) for expert, row in zip(experts, found, strict=True) if row is not None]
    values = None
    if len({row["same"] for _, row in there}) > 1:
        values = f"not the same {there[0][1]['unit']}"
    elif metric in _PER_TOKEN and not _same([expert for expert, _ in there], lambda e: e.base["tokenizer_digest"]):
        values = "different tokenizers"
    elif metric in _RELATIVE and not same_base:
        values = "distances to different bases"
    retention = None if same_base and values is None else values or "relative to different bases"
    keys = ("base", "expert", "retention", "low", "high")
    cells = [row and {each: row[each] for each in keys} for row in found]
    label = there[0][1]["label"]
    return {"group": group, "name": name, "metric": metric, "label": label, "cells": cells, "values": values,
            "retention": retention}  # fmt: skip
