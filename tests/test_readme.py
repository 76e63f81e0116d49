"""Every command in README works, on few documents; `test_tutorial` asks its curl line of a server."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, commands, page

SERVING = [command for command in commands() if command.startswith(("expertprune serve", "curl "))]
EXPERTPRUNE = [command for command in commands() if command.startswith("expertprune ") and command not in SERVING]
SETUP = [command for command in commands() if command.startswith((".venv/bin/", "python3 -m venv"))]
MAKE = [command for command in commands() if command.startswith("make ")]
# For `build`: a minute, not ten. `evaluate` measures as the expert's spec says, so little text too.
FEW = " ".join(
    f" --set {key}={value}"
    for key, value in {
        "calibration.documents": 2,
        "calibration.max_tokens": 128,
        "evaluate.documents": 2,
        "evaluate.max_tokens": 32,
        "evaluate.metrics": "[bits_per_byte,agreement]",  # questions are many; `test_end_to_end` asks some
    }.items()
)


def test_every_command_belongs_to_a_group_that_is_tested() -> None:
    assert len(EXPERTPRUNE) + len(SETUP) + len(MAKE) + len(SERVING) == len(commands())
    assert [command.split()[1] for command in EXPERTPRUNE] == ["init", "validate", "build", "evaluate", "report"]
    assert [command.partition(" experts/")[0].split(" -s ")[0] for command in SERVING] == ["expertprune serve", "curl"]
    assert len(page("README.md").splitlines()) <= 150


def dry_run(*command: str) -> str:
    return subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_targets_exist_and_the_lines_without_make_are_what_make_runs() -> None:
    """`make --always-make --dry-run demo` prints the commands that README gives to those who have no make."""
    made = {command: dry_run(*shlex.split(command), "--always-make", "PYTHON=python3") for command in MAKE}
    printed = made["make demo"].replace(" --quiet", "").replace(" --disable-pip-version-check", "")
    for command in SETUP[1:]:
        assert command in printed
    assert any(line.endswith("-m venv .venv") for line in printed.splitlines())
    assert SETUP[0].endswith("-m venv .venv")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, where commands may leave what they write."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("profiles", "corpora"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(store: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "EXPERTPRUNE_STORE": str(store), "PATH": path}


def output_of(command: str, workplace: Path, store: Path) -> str:
    options: dict[str, Any] = {"cwd": workplace, "env": environment(store), "capture_output": True, "text": True}
    done = subprocess.run(command, shell=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_in_their_order(workplace: Path, real_store: Path) -> None:
    for command in EXPERTPRUNE:
        output_of(command + (FEW if command.startswith("expertprune build ") else ""), workplace, real_store)
    about = json.loads((workplace / "experts" / "my-expert" / "expertprune.json").read_text())
    kept = about["plan"]["budget"]["ffn"]["kept"]
    assert sum(kept) == 32_256  # of 30 layers of 1536 together, 0.3 less: 504 times 64
    assert "other/de" in about["evaluation"]["corpora"]
    assert (workplace / "experts" / "my-expert" / "report.html").is_file()
