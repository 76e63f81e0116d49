"""Run a pass over a corpus and store what it gives as a profile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertprune.artifacts.profile import Profile, ProfileKey, part_path, save_profile
from expertprune.corpora.batches import Batch
from expertprune.corpora.documents import Document
from expertprune.errors import CheckpointError
from expertprune.files import digest_of
from expertprune.models.base import ResolvedBase
from expertprune.profiling.forward import collect
from expertprune.profiling.gradients import gradient_pass
from expertprune.profiling.regional import regional_pass
from expertprune.profiling.rows import PART as VOCABULARY
from expertprune.profiling.rows import vocabulary_pass
from expertprune.progress import Progress
from expertprune.relevance import Pass

log = logging.getLogger(__name__)


def profile_key(base: ResolvedBase, documents: Sequence[Document], max_tokens: int) -> ProfileKey:
    """What the profile of these documents depends on."""
    digests = [digest_of(document.text) for document in documents]  # tokens see white space, so it counts here
    dtype = str(base.dtype).removeprefix("torch.")
    return ProfileKey(base.digest, base.tokenizer_digest, digest_of(digests), max_tokens, dtype)


def profile_path(store: Path, key: ProfileKey) -> Path:
    return store / "profiles" / f"{key.digest}.safetensors"


def profile_corpus(
    model: Any,
    base: ResolvedBase,
    corpus: str,
    documents: Sequence[Document],
    batches: Sequence[Batch],
    key: ProfileKey,
    store: Path,
    progress: Progress | None = None,
) -> Profile:
    """Run the forward pass and store its profile under its digest."""
    statistics = collect(model, base.family, base.layers, batches, progress)
    return save_profile(profile_path(store, key), _about(base, corpus, documents, batches, key), statistics)


def profile_part(
    model: Any,
    base: ResolvedBase,
    corpus: str,
    documents: Sequence[Document],
    batches: Sequence[Batch],
    key: ProfileKey,
    store: Path,
    part: str,
    progress: Progress | None = None,
) -> Profile:
    """Run one of the other passes, as their parts are named (see `Profile`), and store its part."""
    kind, _, variant = part.partition("-")
    arguments = (model, base.family, base.layers, batches)
    if part == VOCABULARY:
        statistics = vocabulary_pass(model, base.family, batches, progress)
    elif kind == Pass.GRADIENT:
        statistics = gradient_pass(*arguments, variant, progress=progress)
    else:
        statistics = regional_pass(*arguments, progress)
    bad = [name for name, tensor in statistics.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(f"{bad[0]}: the {part} pass gave values that are not finite: try base.dtype: float32")
    about = {**_about(base, corpus, documents, batches, key), "part": part}
    return save_profile(part_path(profile_path(store, key), part), about, statistics)


def _about(
    base: ResolvedBase, corpus: str, documents: Sequence[Document], batches: Sequence[Batch], key: ProfileKey
) -> dict[str, Any]:
    return {
        "digest": key.digest,
        "key": asdict(key),
        "base": base.name,
        "corpus": corpus,
        "documents": [document.digest for document in documents],
        "tokens": sum(batch.tokens for batch in batches),
        "layers": [asdict(shape) for shape in base.layers],
    }
