"""Plant deliberate bugs one by one and see that the tests catch each: `python -m tests.mutants [NAME...]`.

`mutants.yaml` lists them. Each is planted in a temporary copy of the checkout, where its tests run until one fails. It is
worth a run after tests were merged or dropped. The tests must pass without a bug, which `make check` shows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
COPIED = ("expertprune", "tests", "profiles", "corpora", "bench", "pyproject.toml", "README.md", "CONTRIBUTING.md")
# What pytest's exit code says of a planted bug.
VERDICTS = {0: "NOT CAUGHT", 1: "caught", 2: "BROKEN: the bug keeps tests from being collected", 5: "NO TEST SELECTED"}


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` stands once in `file` and becomes `new`; `tests` are arguments of pytest, one of which must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def problem(self) -> str | None:
        """Why it cannot be planted in this checkout, if so."""
        path = ROOT / self.file
        count = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        return None if count == 1 else f"SNIPPET FOUND {count} TIMES in {self.file}"


def mutants() -> list[Mutant]:
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    found = [Mutant(name, **entry) for name, entry in entries.items()]
    unchanged = [mutant.name for mutant in found if mutant.old == mutant.new]
    assert not unchanged, f"these change nothing: {unchanged}"
    return found


def verdicts(chosen: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Each bug with `caught`, or with what is wrong."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        for mutant in chosen:
            yield mutant, mutant.problem() or _verdict(mutant, Path(folder))


def _verdict(mutant: Mutant, copy: Path) -> str:
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    # without bytecode: a stale file could hide a bug of the same size, planted in the same second
    variables = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    pytest = ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, *pytest, *shlex.split(mutant.tests)]
    try:
        done = subprocess.run(command, cwd=copy, env=variables, capture_output=True)
    finally:
        path.write_text(original, encoding="utf-8")
    return VERDICTS.get(done.returncode, f"pytest ended with {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of bugs in mutants.yaml, or of their files; default: all"
    )
    parser.add_argument("--list", action="store_true", help="only check that every snippet is found once")
    options = parser.parse_args()
    everything = mutants()
    chosen = [each for each in everything if not options.names or {each.name, each.file} & {*options.names}]
    if not chosen:
        parser.error(f"no such bug; there are: {', '.join(each.name for each in everything)}")
    missed = 0
    results = ((each, each.problem() or "found") for each in chosen) if options.list else verdicts(chosen)
    start = time.monotonic()
    for mutant, verdict in results:
        missed += verdict not in ("caught", "found")
        print(f"{verdict:<12} {mutant.name} ({time.monotonic() - start:.0f} s)", flush=True)
        start = time.monotonic()
    print(f"{len(chosen) - missed} of {len(chosen)} {'found' if options.list else 'caught'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
