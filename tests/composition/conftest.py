"""A spec over the tiny model whose corpora are profiled already."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.spec.reading import parse_spec
from tests.experts import plain_spec


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[dict[str, Any], Path]:
    """A spec as data, and a store with its profiles; neither is to be changed."""
    folder = tmp_path_factory.mktemp("profiled")
    data = plain_spec(folder, tiny_llama)
    expertprune.profile(parse_spec(data, "spec", folder), store=folder / "store")
    return data, folder / "store"


@pytest.fixture
def spec_data(profiled: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return copy.deepcopy(profiled[0])


@pytest.fixture
def warm_store(profiled: tuple[dict[str, Any], Path], store: Path) -> Path:
    """The test's own store, with the profiles in it."""
    return shutil.copytree(profiled[1], store, dirs_exist_ok=True)
