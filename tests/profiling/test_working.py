"""A pass that was killed goes on from its last finished layer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertprune import profile
from expertprune.artifacts.profile import FORWARD, VOCABULARY, ProfilePart
from expertprune.files import is_leftover, remove_leftovers, working_folder
from expertprune.models.passes import TextRun
from expertprune.profiling import traversal, working
from expertprune.profiling.gradients import Taped
from expertprune.profiling.store import measure, working_path
from expertprune.profiling.working import Working
from expertprune.relevance import Pass
from tests.models.test_sources import text_of
from tests.profiles import made_up_about
from tests.tiny import save_tiny

PARTS = [FORWARD, ProfilePart(Pass.GRADIENT, "kl"), VOCABULARY]
LAYERS = 3


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(scope="module", autouse=True)
def _no_graphs_kept() -> Iterator[None]:
    """And gradients behind every layer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(working, "PAUSE", 0.0)
        patched.setattr(traversal, "graph_bytes", lambda text: 1 << 60)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "llama", num_hidden_layers=LAYERS)


def measure_all(text: TextRun, path: Path) -> dict[str, bytes]:
    """All profiles, by the names of their files."""
    measure(text, PARTS, path, made_up_about(path.stem))
    return {part.path(path).name: part.path(path).read_bytes() for part in PARTS}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[bool, dict[str, bytes]]:
    """What streamed and resident passes give that nothing disturbs."""
    return {
        streamed: measure_all(text_of(folder, streamed), folder.parent / str(streamed) / "d.safetensors")
        for streamed in (True, False)
    }


# Of each layer forward, the vocabulary, losses, of each layer backward.
@pytest.mark.parametrize(("streamed", "saved"), [(True, 2), (True, 4), (True, 5), (True, 6), (False, 2), (False, 6)])
def test_a_killed_pass_goes_on_and_gives_the_same_profile(
    saved: int, streamed: bool, folder: Path, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when so many results were kept."""
    expected, kept, save = undisturbed[streamed], [], Working.save

    def killed(self: Working, *given: object) -> None:
        if len(kept) == saved:
            raise Killed
        save(self, *given)  # type: ignore[arg-type]
        kept.append(given)

    path = tmp_path / "d.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Working, "save", killed)
        with pytest.raises(Killed):
            measure_all(text_of(folder, streamed), path)
    differentiated, run = [], Taped.run
    monkeypatch.setattr(Taped, "run", lambda *given: (differentiated.append(given[2]), run(*given))[1])
    assert measure_all(text_of(folder, streamed), path) == expected
    # A layer counts as finished when its gradients and those above the next one are kept.
    back = max(0, saved - LAYERS - 2) if streamed else 0
    assert sorted(set(differentiated)) == list(range(LAYERS - back))
    assert {each.name for each in tmp_path.iterdir()} == set(expected)


def test_gradients_are_kept_only_after_a_pause(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    save = Working.save

    def watched(self: Working, *given: object) -> None:
        save(self, *given)  # type: ignore[arg-type]
        seen.update(path.name for path in (self.folder or Path()).glob("*above*"))

    monkeypatch.setattr(Working, "save", watched)
    for pause, some in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(working, "PAUSE", pause)
        measure_all(text_of(folder, True), tmp_path / f"{some}.safetensors")
        assert bool(seen) == some


def test_a_kill_while_finished_work_is_removed_leaves_what_the_next_command_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed), working_folder(tmp_path / ".d.working") as folder:
            (folder / "forward.0.safetensors").write_bytes(b"x")
    assert [is_leftover(path) for path in tmp_path.iterdir()] == [True]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_work_of_a_profile_that_is_stored_goes_with_the_next_run(spec_file: Path, store: Path) -> None:
    left = [working_path(each.path) for each in profile(spec_file, store=store).values()]
    for folder in left:
        folder.mkdir()
        (folder / "forward.0.safetensors").write_bytes(b"x")
    profile(spec_file, store=store)
    assert not any(folder.exists() for folder in left)
