"""Run a pass over a corpus and store what it gives as a profile."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from expertprune.arch import attention_of
from expertprune.artifacts.profile import FORWARD, Profile, ProfileAbout, ProfileKey, ProfilePart, save_profile
from expertprune.corpora.documents import Document
from expertprune.engine.team import team
from expertprune.files import code_digest, digest_of, digest_of_files, working_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.passes import TextRun
from expertprune.models.states import KeepStates, keep_nothing
from expertprune.profiling.traversal import Statistics, Traversal
from expertprune.profiling.working import Working
from expertprune.progress import Track, silent

PACKAGES = ("torch", "transformers")
# The modules that compute statistics: a change to any of them makes new profiles. A test holds that these are all
# that `profiling` imports, but those that cannot change a number.
SOURCES = ("arch", "artifacts/profile.py", "corpora/batches.py", "engine/team.py", "models/checkpoint.py",
           "models/encodings.py", "models/layers.py", "models/loading.py", "models/passes.py", "models/precision.py",
           "models/routed.py", "models/sources.py", "models/spool.py", "models/states.py", "models/streaming.py",
           "models/tensorfile.py", "profiling", "units.py")  # fmt: skip


def profile_key(base: ResolvedBase, text: str, max_tokens: int) -> ProfileKey:
    """What a profile depends on, on this machine.

    Args:
        text: digest of the tokens that are read, see `CalibrationText`.
    """
    remote = digest_of_files(sorted(base.folder.rglob("*.py")), base.folder) if base.trust_remote_code else ""
    return ProfileKey(
        model=base.digest,
        tokenizer=base.tokenizer_digest,
        corpus=text,
        max_tokens=max_tokens,
        dtype=str(base.dtype).removeprefix("torch."),
        device=base.device.type,
        attention=str(attention_of(base.checkpoint.config)),
        versions=_versions(),
        code=digest_of([code_digest(SOURCES), remote]),
    )


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def profile_path(store: Path, key: ProfileKey) -> Path:
    return store / "profiles" / f"{key.digest}.safetensors"


def about_profile(
    base: ResolvedBase, corpus: str, documents: Sequence[Document], key: ProfileKey, tokens: int
) -> ProfileAbout:
    """The header of a corpus' profile."""
    return ProfileAbout(
        digest=key.digest,
        key=key,
        base=base.name,
        corpus=corpus,
        documents=[document.digest for document in documents],
        layers=list(base.layers),
        tokens=tokens,
    )


def measure(
    text: TextRun,
    parts: Sequence[ProfilePart],
    path: Path,
    about: ProfileAbout,
    track: Track = silent,
    keep: KeepStates = keep_nothing,
    weights: dict[int, Statistics] | None = None,
) -> Profile:
    """Run text through the model once, and store the parts of a profile that this makes.

    A run that was killed in the middle goes on with what it has finished.

    Args:
        path: of the profile (see `profile_path`).
        about: of the forward pass (see `about_profile`).
        keep, weights: see `Traversal`.

    Raises:
        CheckpointError: the pass gives numbers that are not finite, or the disk is full.
    """
    # A team starts a profile anew: its members would not have finished the same layers.
    alone = team().size == 1
    with working_folder(working_path(path)) if alone else contextlib.nullcontext(None) as folder:
        traversal = Traversal(text, parts, working=Working(folder), keep=keep, weights=weights)
        with track(f"profile {about.corpus}", traversal.steps) as step:
            found = traversal.run(step)
        for part, statistics in found.items() if team().leads else ():
            own = about if part == FORWARD else about.model_copy(update={"part": str(part)})
            save_profile(part.path(path), own, statistics)
    team().wait()
    return Profile(path)


def working_path(path: Path) -> Path:
    """Where finished layers of a profile are kept until it is whole, by the profile's path."""
    return path.with_name(f".{path.stem}.working")
