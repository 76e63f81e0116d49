"""`expertprune init`: a shipped spec is copied with its data, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertprune.files import shipped
from expertprune.spec.reading import load_spec
from tests.calling import call

SHIPPED = sorted(shipped("profiles").glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda path: path.stem)
def test_the_copy_of_every_shipped_spec_stands_alone(spec: Path, here: Path) -> None:
    """It reads the same, and the files that it names lie beside it, not in the installed package."""
    call("init", spec.stem, "--out", "mine/expert.yaml")
    copy = here / "mine" / "expert.yaml"
    assert copy.read_bytes() == spec.read_bytes()
    for source in load_spec(copy).corpora.sources.values():
        for file in (*(source.path or []), *(source.evaluation or [])):
            assert Path(file).is_relative_to(here)
            assert Path(file).is_file()


def test_the_data_of_a_spec_come_with_it(here: Path) -> None:
    told = json.loads(call("init", "english-math-own-corpus", "--json").output)
    assert told["files"] == ["english-math-own-corpus.yaml", "data/word-problems.jsonl"]
    ours = shipped("profiles") / "data" / "word-problems.jsonl"
    assert (here / "data" / "word-problems.jsonl").read_bytes() == ours.read_bytes()


@pytest.mark.parametrize("there", ["english-math-own-corpus.yaml", "data/word-problems.jsonl"])
def test_nothing_is_overwritten_and_then_nothing_is_written(here: Path, there: str) -> None:
    (here / "data").mkdir()
    (here / there).write_text("mine")
    assert f"{there}: exists already" in call("init", "english-math-own-corpus", code=2).stderr
    assert [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()] == [there]
    assert (here / there).read_text() == "mine"


def test_an_unknown_name_gets_the_nearest_one(here: Path) -> None:
    assert "unknown spec 'germen'; did you mean 'german'?" in call("init", "germen", code=2).stderr
    assert list(here.iterdir()) == []


def test_without_a_name_the_specs_are_listed(here: Path) -> None:
    listed = json.loads(call("init", "--json").output)["specs"]
    assert [entry["name"] for entry in listed] == [path.stem for path in SHIPPED]
    assert all(entry["about"].endswith(".") for entry in listed)
    assert all(path.stem in call("init").output for path in SHIPPED)
    assert "--out goes with a NAME" in call("init", "--out", "x.yaml", code=2).stderr
    assert list(here.iterdir()) == []
