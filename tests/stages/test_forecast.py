"""What is said and refused before a build begins: memory, disks, stages, and what a user should know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import expertprune
from expertprune.engine import memory
from expertprune.engine.team import Team
from expertprune.errors import CheckpointError
from expertprune.files import places
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages import outlook
from expertprune.stages.forecast import forecast, of_experts
from expertprune.stages.validate import validate
from tests.calling import call, call_json
from tests.models.test_conversion import file_of
from tests.patching import everywhere
from tests.stages.test_sweep import AFTER

Patch = pytest.MonkeyPatch


def test_weights_are_not_fetched_for_what_cannot_fit(
    spec_data: dict[str, Any], tmp_path: Path, store: Path, monkeypatch: Patch
) -> None:
    spec_data["base"] = {"model": str(file_of("llama", tmp_path)), "dtype": "float32"}  # it has no weights yet
    spec = parse_spec(spec_data, "spec", tmp_path)
    stages: list[str] = []

    @contextlib.contextmanager
    def track(stage: str, steps: int) -> Iterator[Callable[[], None]]:
        stages.append(stage)
        yield lambda: None

    few = {"evaluate.documents": 1, "evaluate.corpora": ["medical"]}
    runs: dict[str, Callable[[], object]] = {
        "build": lambda: expertprune.build(spec, tmp_path / "expert", few, track=track),
        "sweep": lambda: expertprune.sweep(spec, [0.25], overrides=few, track=track),
        "profile": lambda: expertprune.profile(spec, track=track),
    }
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        for name in ("build", "sweep"):
            with pytest.raises(CheckpointError, match=r"lower calibration\.tokens_per_batch"):
                runs[name]()
    assert list(store.glob("bases/*/config.json"))
    assert not list(store.glob("bases/*/*.safetensors"))
    for name, run in runs.items():
        monkeypatch.setenv("EXPERTPRUNE_STORE", str(tmp_path / name))
        stages.clear()
        run()
        assert stages[0] == "convert llama.gguf", name


def test_what_is_written_is_compared_with_each_disk(
    tiny_spec: Spec, tmp_path: Path, store: Path, monkeypatch: Patch
) -> None:
    needs: dict[str, tuple[Path, int]] = {}

    def note(found: dict[str, tuple[Path, int]]) -> None:
        needs.update(found)
        raise CheckpointError("no room")

    everywhere(monkeypatch, "expertprune.files.places.require_rooms", note)
    monkeypatch.setattr(memory, "SHARE", 0.0)  # memory takes no hidden states
    monkeypatch.setenv(places.SPOOL_VARIABLE, str(tmp_path / "spool"))
    with pytest.raises(CheckpointError, match="no room"):
        expertprune.build(tiny_spec, tmp_path / "expert", {"base.layers": "streamed"})
    assert {name: folder for name, (folder, _) in needs.items()} == {
        "--store": store, "--spool": tmp_path / "spool", "--out": tmp_path / "expert",
    }  # fmt: skip
    assert all(size > 0 for _, size in needs.values())
    assert needs["--out"][1] == 4 * AFTER[0.25]


def test_a_retention_floor_may_take_several_experts(tiny_spec: Spec) -> None:
    budget = {"retention": {"expert": 0.9}, "multiple_of": 4}
    spec = parse_spec({**tiny_spec.document(), "budget": budget}, "spec", Path.cwd())
    stages = {stage.name: stage for stage in forecast(spec).stages}
    tried = stages["retention, 3 experts at most"]
    assert tried.tokens > 3 * (stages["repair"].tokens - stages["evaluate"].tokens) > 0  # and the held-back documents
    assert tried.seconds > 3 * stages["write"].seconds
    assert "retention, 3 experts at most" not in {stage.name for stage in forecast(tiny_spec).stages}


def test_what_a_user_should_know_before_is_said_by_validate_and_build(
    spec_file: Path, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlook, "known_languages", lambda tokenizer: ["en", "zh"])
    few = ("evaluate.documents=1", "evaluate.corpora=[medical]")
    auto = ("--set", "compose.allocation=auto")
    found = call_json("validate", spec_file, *auto)
    other = {"global": "uniform", "uniform": "global"}[found["decided"]["allocation"]]
    assert len(found["notes"]) == 2
    assert f"expertprune forecast says what {other} would keep" in found["notes"][0]
    assert "was made for Chinese too" in found["notes"][1]
    assert "was made for Chinese too" in call("validate", spec_file, *auto).output
    assert len(call_json("validate", spec_file)["notes"]) == 1  # its allocation is its own choice
    call("build", spec_file, "--out", tmp_path / "expert", *auto, *(part for each in few for part in ("--set", each)))
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    (told,) = [message for message in levels if "this will take about" in message]
    assert levels[told] == "INFO"  # shown without --verbose, and no warning
    assert [levels[f"tiny: {note}"] for note in found["notes"]] == ["INFO", "WARNING"]


def test_a_member_of_a_team_is_told_what_it_does_itself(tiny_spec: Spec, monkeypatch: Patch) -> None:
    prepared = validate(tiny_spec)
    whole = of_experts({"": prepared}, stored=False)
    monkeypatch.setattr("expertprune.engine.team._present", [Team(0, 3)])
    share = of_experts({"": prepared}, stored=False)
    tokens = [{stage.name: stage.tokens for stage in each.stages if stage.tokens} for each in (whole, share)]
    assert tokens[0].keys() == tokens[1].keys()
    for name, every in tokens[0].items():
        assert every / 6 < tokens[1][name] < every / 2, name
