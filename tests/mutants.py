"""Plant deliberate bugs one by one and see that the tests catch each: `python -m tests.mutants [NAME...]`.

`mutants.yaml` lists them. Each is planted in a temporary copy of the checkout, where its tests run until one fails. It is
worth a run after tests were merged or dropped. The tests must pass without a bug, which `make check` shows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

# Imported once, before the forks: they take longer than most tests.
import torch  # noqa: F401 isort: skip
import transformers  # isort: skip
import sklearn.feature_extraction.text  # noqa: F401 isort: skip

_ = (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM)  # imported when first named
# Without bytecode: a stale file could hide a bug of the same size, planted in the same second.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

ROOT = Path(__file__).parents[1]
COPIED = ("expertprune", "tests", "profiles", "corpora", "bench", "pyproject.toml", "README.md", "CONTRIBUTING.md")
# What pytest's exit code says of a planted bug.
VERDICTS = {
    0: "NOT CAUGHT",
    1: "caught",
    2: "BROKEN: the bug keeps tests from being collected",
    4: "NO SUCH TEST",
    5: "NO TEST SELECTED",
}


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
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, Path(folder) / name)
        for mutant in chosen:
            yield mutant, mutant.problem() or _verdict(mutant, Path(folder))


def _verdict(mutant: Mutant, copy: Path) -> str:
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        child = os.fork()
        if child == 0:
            _test(mutant.tests, copy)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        path.write_text(original, encoding="utf-8")
    return VERDICTS.get(code, f"pytest ended with {code}")


def _test(tests: str, copy: Path) -> NoReturn:
    """Run some tests of the copy in this process, which ends with pytest's exit code."""
    code = 70
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)  # for processes that tests start
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # this module's package, which is not the copy's
        code = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *shlex.split(tests)]))
    finally:
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of bugs, or of their files; default: all")
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
