"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from tests.experts import build_tiny, plain_spec
from tests.patching import everywhere
from tests.tiny import save_tiny

LONGEST = ("test_readme.py", "test_end_to_end.py", "test_planted_experts.py", "test_end_to_end_gemma.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules begin first, so that no process is left with one of them alone."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a profile store of its own, and never touches the user's."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """A command in the main thread changes how the process is terminated."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def refuse_to_load(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder in several shards; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama", max_shard_size="20KB")


@pytest.fixture
def spec_data(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    """A spec over the tiny model and small corpora in `tmp_path`, as plain data to change."""
    return plain_spec(tmp_path, tiny_llama)


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    """The same as a file, `tiny.yaml` in `tmp_path`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec_data))
    return path


@pytest.fixture
def tiny_spec(spec_data: dict[str, Any], tmp_path: Path) -> Spec:
    return parse_spec(spec_data, "spec", tmp_path)


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, Path]:
    """The folder of an evaluated tiny expert, not to be changed, and the store with its profiles."""
    return build_tiny(tmp_path_factory.mktemp("build"), tiny_llama)


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all real builds of a run; a developer may point EXPERTPRUNE_TEST_STORE at a warm one."""
    return Path(os.environ.get("EXPERTPRUNE_TEST_STORE") or tmp_path_factory.mktemp("real-store"))
