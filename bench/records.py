"""Results on disk: what a command measured, and with which commit, versions and date.

Every result lies in `bench/results/`. `bench.tables` writes the tables of README.md and LOG.md from
there, without a model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertprune.files import write_file

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("expertprune", "torch", "transformers")


class NotMeasuredError(LookupError):
    """A table needs a result that `bench/results/` does not hold."""


@dataclass(frozen=True)
class Table:
    """A table in Markdown: a header and rows of text."""

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(list(cells))

    def __str__(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        NotMeasuredError: there is no such file.
    """
    if not path.is_file():
        raise NotMeasuredError(f"{path} does not exist: nothing was measured for it yet")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a result, each of its keys on a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    write_file(path, f"{{\n{lines}\n}}\n".encode())


def made(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Commit, date and versions of this run; packages that are not installed are left out."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top)bench/{RESULTS.name}"
    ):
        commit += "-dirty"  # results of other runs do not count
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commits": [commit] if commit else [], "dates": [str(datetime.date.today())], "versions": versions}


def described(every: Iterable[dict[str, Any]]) -> str:
    """A paragraph that names all commits, versions and dates of several results (`made`)."""
    commits: set[str] = set()
    dates: set[str] = set()
    versions: set[str] = set()
    for each in every:
        commits.update(each["commits"])
        dates.update(each["dates"])
        versions.update(f"{name} {version}" for name, version in each["versions"].items())
    parts = [", ".join(sorted(versions))]
    if commits:
        parts.insert(0, f"Commit{'s' if len(commits) > 1 else ''} {', '.join(sorted(commits))}")
    first, last = min(dates), max(dates)
    parts.append(first if first == last else f"{first} to {last}")
    return paragraph("; ".join(parts) + ".")


def paragraph(text: str) -> str:
    """Prose in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def save_table(name: str, table: Table, how: dict[str, Any], note: str = "") -> None:
    """Keep a table that a command printed, with how it was made (`made`) and a note on the run."""
    path = RESULTS / f"{name}.json"
    write(path, {"made": how, "note": note, "columns": table.columns, "rows": table.rows})


def stored_table(name: str) -> str:
    """A table that a command kept with `save_table`, its note, and how it was made."""
    found = read(RESULTS / f"{name}.json")
    how = paragraph(f"{found['note']} {described([found['made']])}".strip())
    return f"{Table(found['columns'], found['rows'])}\n\n{how}"
