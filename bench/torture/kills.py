"""Commands that are killed, run in pairs, or find the disk full."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.torture.children import Disturbance, Finished, finish, run, start
from bench.torture.workplace import Workplace, contents, differences


@dataclass(frozen=True)
class Command:
    """A command to be disturbed, what it makes, and whether it replaces what is there."""

    name: str
    arguments: list[str]
    made: Path
    needs_expert: bool = False
    replaces: bool = False


def commands(place: Workplace) -> list[Command]:
    spec, out, sweep, gguf = place.spec, place.out, place.out.parent / "sweep", place.out.parent / "expert.gguf"
    build = ["build", str(spec), "--out", str(out)]
    other = ["--set", "budget.ffn=0.5"]
    export = ["export", str(out), "--out", str(gguf), "--type", "f32"]
    plan, planned = out.parent / "plan.json", place.folder / "plan.json"
    compose = ["compose", str(spec), "--out", str(plan), "--overwrite"]
    prune = ["prune", str(planned), "--out", str(out), "--overwrite"]
    return [
        Command("build", build, out),
        Command("build --overwrite", [*build, "--overwrite", *other], out, needs_expert=True, replaces=True),
        Command("sweep", ["sweep", str(spec), "--budgets", "0.25,0.5", "--out", str(sweep), "--keep-experts"], sweep),
        Command("compose --overwrite", compose, plan, needs_expert=True, replaces=True),
        Command("prune --overwrite", prune, out, needs_expert=True, replaces=True),
        Command("evaluate", ["evaluate", str(out)], out, needs_expert=True, replaces=True),
        Command("export", export, gguf, needs_expert=True),
        Command("export --overwrite", [*export, "--overwrite"], gguf, needs_expert=True, replaces=True),
    ]


class Trial:
    """One command in one workplace: how it begins, what an undisturbed run makes, and what must hold after another."""

    def __init__(self, place: Workplace, command: Command, begin: Path) -> None:
        self.place, self.command, self.begin = place, command, begin
        self.reset()
        self.before = contents(command.made)
        self.undisturbed = self.run()
        if self.undisturbed.code != 0:
            raise RuntimeError(f"{command.name} fails undisturbed: {self.undisturbed.output}")
        self.after, self.stored = contents(command.made), place.stored()

    def reset(self) -> None:
        """The workplace as it is before the command."""
        self.place.clear()
        if self.command.needs_expert:
            shutil.copytree(self.begin / "expert", self.place.out)
            shutil.copytree(self.begin / "store", self.place.store)
        if self.command.replaces and self.command.made.suffix:
            shutil.copyfile(self.begin / self.command.made.name, self.command.made)

    def run(self, disturbed: Disturbance | None = None) -> Finished:
        return run(self.command.arguments, self.place.store, self.place.temporary, disturbed)

    def killed(self, disturbed: Disturbance) -> list[str]:
        """What is wrong after the command was killed, and after the next run."""
        self.reset()
        finished = self.run(disturbed)
        problems = self.place.problems() + self._halves(contents(self.command.made))
        if finished.code not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
            problems.append(f"exit {finished.code} instead of a kill: {finished.output[-400:]}")
        if self.command.replaces and not contents(self.command.made):
            problems.append("nothing is at the path of what was to be replaced")
        there = self.command.made.exists() and not self.command.replaces and self.command.name != "sweep"
        if there:  # published before the kill: it is replaced as a user would
            arguments = [*self.command.arguments, "--overwrite"]
            again = run(arguments, self.place.store, self.place.temporary)
        else:
            again = self.run()
        if again.code != 0:
            problems.append(f"the next run exits with {again.code}: {again.output[-400:]}")
        problems += differences(contents(self.command.made), self.after)
        problems += [f"the store differs by {file}" for file in sorted(self.place.stored() ^ self.stored)]
        return problems + self.place.problems() + self.place.leftovers()

    def _halves(self, now: Mapping[str, bytes]) -> list[str]:
        """Files that are neither as before the command nor as after it, and weights of which only some are.

        An expert is published before it is evaluated, and a sweep is noted after each budget: what both write again may
        be on its way.
        """
        now = {name: content for name, content in now.items() if ".partial" not in name and ".replaced" not in name}
        found = []
        for name, content in now.items():
            if content in (self.before.get(name), self.after.get(name)):
                continue
            if not name.endswith((*_WRITTEN_AGAIN, ".json")) or not content or not _reads(name, content):
                found.append(f"{name} is neither what was there nor what the command makes")
        for folder in {Path(name).parent for name in now if name.endswith(".safetensors")}:
            sides = [_weights(side, folder) for side in (self.before, self.after)]
            if _weights(now, folder) not in sides:
                found.append(f"the weights in {folder} are of different experts")
        return found

    def full(self, disturbed: Disturbance) -> list[str]:
        """What is wrong after the disk was full."""
        self.reset()
        finished = self.run(disturbed)
        problems = self.place.problems() + self.place.leftovers()
        if finished.code == 0:  # what failed can be made again, such as the digest of a file
            return problems + differences(contents(self.command.made), self.after)
        if not finished.clean:
            problems.append(f"exit {finished.code}: {finished.output[-600:]}")
        now = contents(self.command.made)
        published = self.command.name in ("build", "build --overwrite", "sweep")  # before it is evaluated
        if now != self.before and not published:
            problems.append("what was there has changed, though the command failed")
        return problems


_WRITTEN_AGAIN = ("README.md", "report.html")


def _reads(name: str, content: bytes) -> bool:
    """Whether a file that is JSON by its name is whole."""
    try:
        return not name.endswith(".json") or json.loads(content) is not None
    except ValueError:
        return False


def _weights(files: Mapping[str, bytes], folder: Path) -> dict[str, bytes]:
    return {name: each for name, each in files.items() if name.endswith(".safetensors") and Path(name).parent == folder}


def kills(place: Workplace, begin: Path, number: int | None, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Kill each command at every change to the disk, within the writing of every file, and as often at random times.

    Args:
        number: at most so many kills; `None`: all.
    """
    chance = random.Random(seed)
    places: list[tuple[Trial, Disturbance]] = []
    for trial in [Trial(place, command, begin) for command in commands(place)]:
        sizes = sorted({len(content) // 2 for content in trial.after.values() if len(content) > 64})
        places += [(trial, Disturbance(change=change)) for change in range(1, trial.undisturbed.changes + 1)]
        places += [(trial, Disturbance(file_limit=size)) for size in sizes]
    chance.shuffle(places)
    times = [(trial, Disturbance(after=chance.uniform(0.0, trial.undisturbed.seconds))) for trial, _ in places]
    cases = [case for pair in zip(places, times, strict=True) for case in pair]
    for trial, disturbed in cases[:number]:
        yield f"{trial.command.name}, {disturbed}", trial.killed(disturbed)


def full_disks(place: Workplace, begin: Path, number: int | None, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Every tenth change fails for want of room, and every file of the result cannot grow to its size."""
    cases: list[tuple[Trial, Disturbance]] = []
    for trial in (Trial(place, command, begin) for command in commands(place)):
        changes = range(1 + seed % 10, trial.undisturbed.changes + 1, 10)
        sizes = sorted({len(content) for content in trial.after.values() if len(content) > 64})
        cases += [(trial, Disturbance(change=change, kind="full")) for change in changes]
        cases += [(trial, Disturbance(file_limit=size - 1, kind="full")) for size in sizes]
    random.Random(seed).shuffle(cases)
    for trial, disturbed in cases[:number]:
        yield f"{trial.command.name}, {disturbed}", trial.full(disturbed)


# --- pairs ------------------------------------------------------------------------------------------------------------


def pairs(place: Workplace, begin: Path, number: int | None, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Two commands at once on one store and one output, every second pair in PID namespaces of their own."""
    chance = random.Random(seed)
    known = commands(place)
    for count in range(50 if number is None else number):
        two = chance.choices([each for each in known if each.name != "sweep"], k=2) if count % 3 else [known[0]] * 2
        place.clear()
        if any(each.needs_expert for each in two):
            shutil.copytree(begin / "expert", place.out)
            shutil.copytree(begin / "store", place.store)
        if count % 2:
            ended = _in_namespaces(place, two)
        else:
            started = []
            for each in two:
                started.append(start(each.arguments, place.store, place.temporary))
            ended = [finish(each) for each in started]
        problems = [f"exit {each.code}: {each.output[-400:]}" for each in ended if not each.clean]
        fresh = [each for each, command in zip(ended, two, strict=True) if command.name == "build"]
        if not any(each.needs_expert for each in two) and sum(each.code == 0 for each in fresh) != 1:
            problems.append("of two builds to one new folder, not exactly one succeeds")
        # Whatever lies beside the output by another name is a result that somebody was told of.
        told = "".join(each.output for each in ended).replace("\n", "")
        for path in place.out.parent.iterdir():
            if path.name.startswith("expert-"):
                if path.name not in told:
                    problems.append(f"{path.name} was kept and not named")
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield " and ".join(each.name for each in two), problems + place.problems() + place.leftovers()


def _in_namespaces(place: Workplace, two: list[Command]) -> list[Finished]:
    """Both commands with the process id 1, as in containers that share a disk."""
    environment = {"EXPERTPRUNE_STORE": str(place.store), "TMPDIR": str(place.temporary), "HF_HUB_OFFLINE": "1"}
    begun = [
        subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "expertprune", *each.arguments],
            env={**_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in two
    ]
    outputs = [process.communicate()[0] for process in begun]
    return [
        Finished(process.returncode, output, 0.0, 0.0, 0.0, 0) for process, output in zip(begun, outputs, strict=True)
    ]


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
