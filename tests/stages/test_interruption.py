"""A build that is interrupted or killed leaves nothing that looks finished, and the next one goes on from there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.profile import Profile, ProfilePart
from tests.calling import call
from tests.patching import everywhere
from tests.processes import Finished, server

# Profiles that are stored when a child is held: the second is not in its place yet, and later stages have all four.
STORED = {"profile": 1, "prune": 4}
UNEVALUATED = ["--set", "evaluate.enabled=false"]

terminated = pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec_data))
    return path


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden entries included."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_end(finished: Finished, sent: signal.Signals) -> None:
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    if sent is signal.SIGKILL:
        assert finished.code == -signal.SIGKILL
    else:
        assert finished.code == 1
        assert "interrupted" in finished.stderr


@pytest.mark.parametrize(
    ("place", "sent"),
    [("profile", signal.SIGINT), ("profile", signal.SIGKILL), ("prune", signal.SIGTERM), ("prune", signal.SIGKILL)],
)  # fmt: skip
def test_an_interrupted_build_leaves_no_expert_and_the_next_one_reuses_its_profiles(
    tmp_path: Path, spec_file: Path, store: Path, monkeypatch: pytest.MonkeyPatch, place: str, sent: signal.Signals
) -> None:  # fmt: skip
    out = tmp_path / "experts" / "expert"
    check_end(server().run("build", spec_file, "--out", out, hold=place, send=sent), sent)
    assert not out.exists()
    if sent is not signal.SIGKILL:
        assert names(out.parent) == set()
    stored = sorted((store / "profiles").glob("[!.]*"))
    assert len(stored) == STORED[place]
    assert all(Profile(path).digest == path.stem for path in stored)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in stored}
    profiled = []

    def counting(text: Any, parts: list[ProfilePart], path: Path, about: Any, *rest: Any) -> Profile:
        profiled.append(about.corpus)
        return original(text, parts, path, about, *rest)

    original = everywhere(monkeypatch, "expertprune.profiling.store.measure", counting)
    call("build", spec_file, "--out", out, *UNEVALUATED)
    assert len(profiled) == 4 - STORED[place]
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in stored} == before
    assert names(out.parent) == {"expert"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_half_written_profile_is_never_taken_for_one(spec_file: Path, store: Path, sent: signal.Signals) -> None:
    """A killed run leaves it, and the next removes it."""
    check_end(server().run("profile", spec_file, hold="profile", send=sent), sent)
    left = [name for name in names(store / "profiles") if name.startswith(".")]
    assert [name.endswith(".partial") for name in left if not name.endswith(".working")] == [True] * (
        sent is signal.SIGKILL
    )
    assert sum(name.endswith(".working") for name in left) == 1  # finished layers, which the next run goes on with
    call("profile", spec_file)
    assert len(names(store / "profiles")) == 4
    assert not [name for name in names(store / "profiles") if name.startswith(".")]


def test_a_build_after_a_killed_one_gives_what_an_undisturbed_one_gives(tmp_path: Path, spec_file: Path) -> None:
    out, undisturbed = tmp_path / "expert", tmp_path / "undisturbed"
    server().run("build", spec_file, "--out", out, hold="prune", send=signal.SIGKILL)
    call("build", spec_file, "--out", out)
    call("build", spec_file, "--out", undisturbed)
    assert contents(out) == contents(undisturbed)


@terminated
def test_an_interrupted_overwrite_keeps_the_old_expert(tmp_path: Path, spec_file: Path, sent: signal.Signals) -> None:
    out = tmp_path / "experts" / "expert"
    call("build", spec_file, "--out", out, "--set", "budget.ffn=0.5", *UNEVALUATED)
    old = contents(out)
    check_end(server().run("build", spec_file, "--out", out, "--overwrite", hold="prune", send=sent), sent)
    assert contents(out) == old
    call("build", spec_file, "--out", out, "--overwrite", *UNEVALUATED)
    assert names(out.parent) == {"expert"}
    assert contents(out) != old


@terminated
def test_an_expert_outlives_the_evaluation_behind_its_build(
    tmp_path: Path, spec_file: Path, sent: signal.Signals
) -> None:
    out, undisturbed = tmp_path / "expert", tmp_path / "undisturbed"
    check_end(server().run("build", spec_file, "--out", out, hold="evaluate", send=sent), sent)
    assert Expert.load(out).evaluation is None
    call("evaluate", out)
    call("build", spec_file, "--out", undisturbed)
    assert contents(out).keys() == contents(undisturbed).keys()
    assert Expert.load(out).evaluation == Expert.load(undisturbed).evaluation
    changed = {name for name, data in contents(undisturbed).items() if contents(out)[name] != data}
    assert not changed


@terminated
def test_an_interrupted_evaluation_leaves_the_expert_as_it_was(
    tmp_path: Path, spec_file: Path, sent: signal.Signals
) -> None:
    out = tmp_path / "experts" / "expert"
    call("build", spec_file, "--out", out, *UNEVALUATED)
    old = contents(out)
    check_end(server().run("evaluate", out, hold="evaluate", send=sent), sent)
    assert contents(out) == old
    call("evaluate", out)
    new = contents(out)
    assert {name for name in new if new[name] != old.get(name)} == {"expertprune.json", "changes.json", "README.md"}


@terminated
def test_an_interrupted_prune_leaves_no_expert(tmp_path: Path, spec_file: Path, sent: signal.Signals) -> None:
    out, plan = tmp_path / "experts" / "expert", tmp_path / "plan.json"
    call("compose", spec_file, "--out", plan)
    check_end(server().run("prune", plan, "--out", out, hold="prune", send=sent), sent)
    assert not out.exists()
    call("prune", plan, "--out", out)
    assert names(out.parent) == {"expert"}
    assert not (out / ".repair").exists()
