"""The wheel works without the clone: its code, its corpora and its specs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

SCRIPT = """
import shlex, sys
import expertprune
from expertprune.cli import main
print(expertprune.__file__)
for line in sys.argv[1:]:
    main(shlex.split(line), standalone_mode=False)
"""


@pytest.mark.slow
def test_an_installed_wheel_has_all_that_commands_need(tmp_path: Path, store: Path, tiny_llama: Path) -> None:
    pytest.importorskip("hatchling")
    pip, installed, here = [sys.executable, "-m", "pip", "--quiet"], tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", installed, wheel], check=True)
    assert (installed / "bin" / "expertprune").is_file()
    lines = [
        "init english-math-own-corpus",
        "list corpora",
        f"validate english-math-own-corpus.yaml --set base.model={tiny_llama} --set budget.ffn=8 --set budget.multiple_of=8",
    ]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = [sys.executable, "-c", SCRIPT, *lines]
    done = subprocess.run(run, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{installed}/expertprune/")
    assert "medical-chat" in done.stdout
    assert {path.name for path in here.iterdir()} == {"english-math-own-corpus.yaml", "data"}
