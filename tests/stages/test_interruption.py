"""A build that is interrupted or killed leaves nothing that looks finished, and the next one goes on from there."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.profile import Profile, ProfilePart
from tests.calling import call
from tests.experts import plain_spec
from tests.patching import everywhere
from tests.processes import server

pytestmark = pytest.mark.slow
# Profiles that are stored when a child is held: the second is not in its place yet, and later stages have all four.
STORED = {"profile": 1, "prune": 4}
UNEVALUATED = ["--set", "evaluate.enabled=false"]
terminated = pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)


@dataclass(frozen=True)
class Whole:
    """Experts that nothing has disturbed, of which one is half as wide and not evaluated; not to be changed."""

    spec: Path
    expert: Path
    small: Path
    store: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    found = Whole(folder / "tiny.yaml", folder / "expert", folder / "small", folder / "store")
    found.spec.write_text(yaml.safe_dump(plain_spec(folder, tiny_llama)))
    call("build", found.spec, "--out", found.expert, "--store", found.store)
    call("build", found.spec, "--out", found.small, "--store", found.store, "--set", "budget.ffn=0.5", *UNEVALUATED)
    return found


@pytest.fixture
def warm(whole: Whole, store: Path) -> Path:
    """The store, with the profiles of undisturbed builds."""
    return Path(shutil.copytree(whole.store, store, dirs_exist_ok=True))


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden entries included."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(*arguments: Any, hold: str, sent: signal.Signals) -> str:
    """Run a command that gets a signal at a place of `tests.processes`; returns what it says of errors."""
    finished = server().run(*arguments, hold=hold, send=sent)
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    assert finished.code == (-signal.SIGKILL if sent is signal.SIGKILL else 1)
    assert sent is signal.SIGKILL or "interrupted" in finished.stderr
    return finished.stderr


@pytest.mark.parametrize(
    ("place", "sent"), [("profile", signal.SIGINT), ("prune", signal.SIGTERM), ("prune", signal.SIGKILL)]
)
def test_an_interrupted_build_leaves_no_expert_and_the_next_one_reuses_its_profiles(
    tmp_path: Path, whole: Whole, store: Path, monkeypatch: pytest.MonkeyPatch, place: str, sent: signal.Signals
) -> None:
    out = tmp_path / "experts" / "expert"
    held("build", whole.spec, "--out", out, hold=place, sent=sent)
    assert not out.exists()
    assert sent is signal.SIGKILL or names(out.parent) == set()
    stored = sorted((store / "profiles").glob("[!.]*"))
    assert len(stored) == STORED[place]
    assert all(Profile(path).digest == path.stem for path in stored)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in stored}
    profiled = []

    def counting(text: Any, parts: list[ProfilePart], path: Path, about: Any, *rest: Any) -> Profile:
        profiled.append(about.corpus)
        return original(text, parts, path, about, *rest)

    original = everywhere(monkeypatch, "expertprune.profiling.store.measure", counting)
    call("build", whole.spec, "--out", out)
    assert len(profiled) == 4 - STORED[place]
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in stored} == before
    assert names(out.parent) == {"expert"}
    assert contents(out) == contents(whole.expert)


@terminated
def test_a_half_written_profile_is_never_taken_for_one(whole: Whole, store: Path, sent: signal.Signals) -> None:
    """A killed run leaves it, and the next removes it."""
    held("profile", whole.spec, hold="profile", sent=sent)
    left = [name for name in names(store / "profiles") if name.startswith(".")]
    half_written = [name.endswith(".partial") for name in left if not name.endswith(".working")]
    assert half_written == [True] * (sent is signal.SIGKILL)
    assert sum(name.endswith(".working") for name in left) == 1  # finished layers, which the next run goes on with
    call("profile", whole.spec)
    assert len(names(store / "profiles")) == 4
    assert not [name for name in names(store / "profiles") if name.startswith(".")]


@terminated
def test_an_interrupted_overwrite_keeps_the_old_expert(
    tmp_path: Path, whole: Whole, warm: Path, sent: signal.Signals
) -> None:
    out = Path(shutil.copytree(whole.small, tmp_path / "experts" / "expert"))
    old = contents(out)
    held("evaluate", out, hold="evaluate", sent=sent)
    assert contents(out) == old
    held("build", whole.spec, "--out", out, "--overwrite", hold="prune", sent=sent)
    assert contents(out) == old
    call("evaluate", out)
    new = contents(out)
    assert {name for name in new if new[name] != old.get(name)} == {"expertprune.json", "changes.json", "README.md"}
    call("build", whole.spec, "--out", out, "--overwrite", *UNEVALUATED)
    assert names(out.parent) == {"expert"}
    assert contents(out)["config.json"] == contents(whole.expert)["config.json"] != old["config.json"]


@terminated
def test_an_expert_outlives_its_evaluation(tmp_path: Path, whole: Whole, warm: Path, sent: signal.Signals) -> None:
    out = tmp_path / "expert"
    said = held("build", whole.spec, "--out", out, hold="evaluate", sent=sent)
    assert sent is signal.SIGKILL or f"not evaluated: run: expertprune evaluate {out}" in said
    assert Expert.load(out).evaluation is None
    call("evaluate", out)
    assert contents(out) == contents(whole.expert)
