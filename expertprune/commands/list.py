"""`expertprune list`: what a spec or a suite can name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from expertprune.commands.terminal import common, leading_comment, records_table, reporting, show

Row = dict[str, Any]  # one line of a table: its columns by their headers


@click.command("list")
@click.argument("kind", type=click.Choice(["corpora", "suites", "criteria", "models"]))
@common
@reporting
def list_names(kind: str, as_json: bool) -> None:
    """List the corpora, suites, criteria or models that you can name without a path.

    \b
    expertprune list corpora
    """
    sources = {"corpora": _corpora, "suites": _suites, "criteria": _criteria, "models": _models}
    records = [*sources[kind]()]
    show(as_json, {"kind": kind, kind: records}, lambda: records_table(records))


def _corpora() -> Iterator[Row]:
    """The corpora that ship, with the number of documents and questions in each."""
    from expertprune.files import read_yaml, shipped

    folder = shipped("corpora")
    for dimension, values in read_yaml(folder / "catalogue.yaml").items():
        for value, entry in values.items():
            counts = {
                header: _rows(folder / entry[key]) if key in entry else 0
                for header, key in (("calibration", "path"), ("evaluation", "evaluation"), ("questions", "questions"))
            }
            yield {"name": f"{dimension}/{value}", **counts, "about": entry["about"]}


def _rows(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _suites() -> Iterator[Row]:
    """The suites that ship; `hub` says whether their data come from the Hugging Face hub."""
    from expertprune.evaluation.suites import load_suite, shipped_suites

    for name, path in shipped_suites().items():
        suite = load_suite(path)
        entries = (*suite.tasks, *suite.generation)
        yield {
            "name": name,
            "tasks": [entry.label for entry in entries],
            "hub": any(entry.file is None for entry in entries),
            "about": leading_comment(path),
        }


def _criteria() -> Iterator[Row]:
    """All registered criteria: what they score, the pass over the model that they need, and their paper."""
    from expertprune.relevance import criteria

    for name, criterion in sorted(criteria.items()):
        forward = "forward" if criterion.sees_data else "none"
        yield {
            "name": name,
            "structures": [structure.value for structure in criterion.structures],
            "pass": criterion.needs.value if criterion.needs else forward,
            "paper": criterion.paper,
        }


def _models() -> Iterator[Row]:
    """The models that come as Python packages."""
    from expertprune.arch import bundled_models

    for name, model in sorted(bundled_models().items()):
        yield {
            "name": name,
            "installed": all(importlib.util.find_spec(part.module) is not None for part in model.packaged),
            "install": model.install,
            "licence": model.licence,
        }
