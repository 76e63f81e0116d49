"""A pass that was killed goes on from its last finished layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertprune.artifacts.profile import FORWARD, VOCABULARY, Profile, ProfilePart
from expertprune.models.passes import TextRun
from expertprune.profiling import traversal
from expertprune.profiling.gradients import Taped
from expertprune.profiling.store import measure
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
