"""Trials of one part, one after the other, and what did not hold."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.torture.children import prepare, run
from bench.torture.records import save_row
from bench.torture.workplace import Workplace, first_commands

PARTS = ("kills", "pairs", "disk", "fuzz")


def main(description: str) -> None:
    """Read the command line, run the trials, and exit with 1 where one broke."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--number", type=int, help="how many trials of each part [default: kills and full disks: at every "
                        "change; pairs: 50; fuzz: 10,000]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="fuzz: a folder for the inputs that broke something")
    parser.add_argument("--save", action="store_true", help="put the numbers into bench/results")
    options = parser.parse_args()
    prepare()
    stopped: list[int] = []  # a signal ends the bench after its trial, and what was tried counts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    broken = sum(_tried(part, options, stopped) for part in (PARTS if options.part == "all" else (options.part,)))
    sys.exit(1 if broken else 0)


def _tried(part: str, options: argparse.Namespace, stopped: list[int]) -> int:
    """Run the trials of one part; how many broke."""
    from bench.torture.fuzz import fuzz
    from bench.torture.kills import full_disks, kills, pairs

    if stopped:
        return 0
    begun, broken, tried = time.monotonic(), [], 0
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        place, begin = Workplace.make(root / "place", options.seed), root / "begin"
        _first(place, begin)
        if part == "fuzz":
            trials = fuzz(place, begin, options.number, options.seed, options.keep)
        else:
            run_part = {"kills": kills, "pairs": pairs, "disk": full_disks}[part]
            trials = run_part(place, begin, options.number, options.seed)
        for name, problems in trials:
            tried += 1
            if problems:
                broken.append(name)
                print(f"{name}:", *problems, sep="\n  ", flush=True)
            if tried % 500 == 0:
                print(f"{tried} after {time.monotonic() - begun:.0f} s", flush=True)
            if stopped:
                break
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - begun
    result = {"part": part, "seed": options.seed, "trials": tried, "broken": len(broken)}
    print(json.dumps({**result, "seconds": round(seconds, 1)}), flush=True)
    if options.save:
        save_row(part, tried, len(broken), seconds)
    return len(broken)


def _first(place: Workplace, begin: Path) -> None:
    """An expert, its plan, its export and its store, from which trials begin."""
    begin.mkdir()
    for arguments in first_commands(place, begin):
        done = run(arguments, place.store, place.temporary)
        if done.code != 0:
            raise RuntimeError(done.output)
    shutil.copytree(place.out, begin / "expert")
    shutil.copytree(place.store, begin / "store")
    shutil.copyfile(place.folder / "plan.json", begin / "plan.json")
