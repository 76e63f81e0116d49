"""A pass that was killed goes on from its last finished layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from expertprune import profile
from expertprune.artifacts.profile import FORWARD, VOCABULARY, Profile, ProfilePart
from expertprune.files import is_leftover, remove_leftovers, working_folder
from expertprune.models.passes import TextRun
from expertprune.profiling import traversal
from expertprune.profiling.gradients import Taped
from expertprune.profiling.store import measure, working_path
from expertprune.profiling.working import Working
from expertprune.relevance import Pass
from tests.models.test_sources import text_of
from tests.profiles import made_up_about
from tests.tiny import save_tiny

GRADIENT = ProfilePart(Pass.GRADIENT, "kl")
PARTS = [FORWARD, GRADIENT, VOCABULARY]
LAYERS = 3


class Killed(BaseException):
    """The end of a process."""


def measure_all(text: TextRun, path: Path) -> list[Profile]:
    measure(text, PARTS, path, made_up_about(path.stem))
    return [Profile(part.path(path)) for part in PARTS]


def same(found: Profile, expected: Profile) -> bool:
    def bytes_of(profile: Profile) -> bytes:
        return profile.path.read_bytes()

    return bytes_of(found) == bytes_of(expected)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "resident"])
@pytest.mark.parametrize("saved", range(2 * LAYERS + 2))
def test_a_killed_pass_goes_on_and_gives_the_same_profile(
    saved: int, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when so many results were kept: of each layer forward, the vocabulary, losses, of each layer backward."""
    monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)
    folder = save_tiny(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    expected = measure_all(text_of(folder, streamed), tmp_path / "undisturbed" / "d.safetensors")
    kept, save = [], Working.save

    def killed(self: Working, *given: object) -> None:
        if len(kept) == saved:
            raise Killed
        save(self, *given)  # type: ignore[arg-type]
        kept.append(given)

    path = tmp_path / "killed" / "d.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Working, "save", killed)
        with pytest.raises(Killed):
            measure_all(text_of(folder, streamed), path)
    differentiated, run = [], Taped.run
    monkeypatch.setattr(Taped, "run", lambda *given: (differentiated.append(given[2]), run(*given))[1])
    found = measure_all(text_of(folder, streamed), path)
    assert all(map(same, found, expected))
    # A layer counts as finished when its gradients and those above the next one are kept.
    back = max(0, saved - LAYERS - 2) if streamed else 0
    assert sorted(set(differentiated)) == list(range(LAYERS - back))
    assert {each.name for each in path.parent.iterdir()} == {each.path.name for each in found}


def test_a_kill_while_finished_work_is_removed_leaves_what_the_next_command_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        raise Killed

    def work() -> None:
        with working_folder(tmp_path / ".d.working") as folder:
            (folder / "forward.0.safetensors").write_bytes(b"x")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            work()
    assert [is_leftover(path) for path in tmp_path.iterdir()] == [True]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_work_of_a_profile_that_is_stored_goes_with_the_next_run(spec_file: Path, store: Path) -> None:
    profiles = profile(spec_file, store=store)
    left = [working_path(each.path) for each in profiles.values()]
    for folder in left:
        folder.mkdir()
        (folder / "forward.0.safetensors").write_bytes(b"x")
    profile(spec_file, store=store)
    assert not any(folder.exists() for folder in left)
