"""Inputs that once broke a command, found by `bench.torture`: each is refused, or taken, without a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.torture.children import import_rooms
from bench.torture.fuzz import PLACE, listing
from bench.torture.inputs import Kind, entry, kinds
from bench.torture.workplace import Workplace, first_commands
from tests.calling import call
from tests.limits import frugal

FOUND = sorted((Path(__file__).parent / "fuzzed").glob("*-*"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workplace, dict[str, Kind]]]:
    """A tiny base, an expert and everything else that commands read; and what of it is to be replaced."""
    import_rooms()
    folder = tmp_path_factory.mktemp("fuzzed")
    place, begin = Workplace.make(folder / "place", seed=0), folder / "begin"
    begin.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EXPERTPRUNE_STORE", str(place.store))
        for arguments in first_commands(place, begin):
            call(*arguments)
        yield place, {kind.name: kind for kind in kinds(place, begin)}


@pytest.mark.parametrize("found", FOUND, ids=lambda path: path.name)
def test_what_broke_once(
    workplace: tuple[Workplace, dict[str, Kind]], found: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, known = workplace
    kind = known[found.name.rpartition("-")[0]]
    if kind.name in ("suite", "task"):
        pytest.importorskip("lm_eval")
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(place.store))
    original = kind.file.read_bytes()
    try:
        for command in kind.commands:
            kind.file.write_bytes(found.read_bytes().replace(PLACE, str(place.folder).encode()))
            before = listing(place)
            with frugal():
                result = CliRunner().invoke(entry(command), command)
            assert result.exit_code in (0, 2), f"{result.output}\n{result.exception!r}"
            assert not listing(place) - before, "it writes outside its output"
            shutil.rmtree(place.out.parent / "made", ignore_errors=True)
    finally:
        kind.file.write_bytes(original)
