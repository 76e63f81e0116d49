"""An expert and profiles that tests of commands need not make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def warm(tiny_build: tuple[Path, Path], store: Path) -> Path:
    """The store, with the profiles of the tiny base and corpora."""
    return Path(shutil.copytree(tiny_build[1], store, dirs_exist_ok=True))


@pytest.fixture
def expert(tiny_build: tuple[Path, Path], warm: Path, tmp_path: Path) -> Path:
    """A copy of the evaluated tiny expert; its profiles are in the store."""
    return Path(shutil.copytree(tiny_build[0], tmp_path / "expert"))
