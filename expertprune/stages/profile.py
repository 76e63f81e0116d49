"""Measure every corpus of a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from expertprune.artifacts.profile import FORWARD, VOCABULARY, Profile
from expertprune.composition.scoring import needed_part
from expertprune.corpora.batches import Batch
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import CheckpointError, SpecError
from expertprune.models.passes import TextRun
from expertprune.models.spool import Limits
from expertprune.profiling.gradients import backward_bytes
from expertprune.profiling.store import description, measure, profile_key, profile_path
from expertprune.progress import Track, silent
from expertprune.relevance import Pass
from expertprune.spec.schema import Budget
from expertprune.stages.validate import Prepared, SpecLike, validate
from expertprune.units import Structure


def profiles_of(prepared: Prepared, track: Track, run: bool = True) -> dict[CorpusName, Profile]:
    """The profile of every corpus, with the pass that the criterion needs; what is stored is not measured again.

    Args:
        run: whether what is missing may be measured.

    Raises:
        SpecError: something is missing and must not be measured.
        CheckpointError: the backward pass does not fit into memory.
    """
    base, part = prepared.base, needed_part(prepared.spec.relevance)
    parts = [FORWARD]
    if part is not None and _cuts_units(prepared.spec.budget):
        parts.append(part)
    if prepared.spec.budget.vocabulary is not None:
        parts.append(VOCABULARY)
    profiles: dict[CorpusName, Profile] = {}
    for name in corpus_names(prepared.spec):
        text = prepared.calibration[name]
        key = profile_key(base, text.documents, prepared.spec.calibration.max_tokens)
        path = profile_path(prepared.store, key)
        missing = [each for each in parts if not each.path(path).is_file()]
        if missing and not run:
            lacking = " and the ".join(map(str, missing))
            raise SpecError(f"the profile of {name} lacks the {lacking} pass: run the profile stage")
        if any(each.made_by is Pass.GRADIENT for each in missing):  # asked before the model is loaded for any pass
            check_backward_fits(prepared, text.batches)
        for each in missing:
            run_text = TextRun(prepared.running.model, base.family, base.layers, text.batches)
            steps = len(text.batches) if each.made_by is Pass.GRADIENT else len(base.layers)
            with track(f"profile {name}" + ("" if each == FORWARD else f" ({each})"), steps) as step:
                measure(run_text, each, path, description(base, str(name), text.documents, key), step)
        profiles[name] = Profile(path)
    return profiles


def _cuts_units(budget: Budget) -> bool:
    """Whether units of layers are to go, and not vocabulary rows alone, which no criterion scores."""
    return any(getattr(budget, each.value) for each in Structure) or budget.overall or budget.retention is not None


def check_backward_fits(prepared: Prepared, batches: Sequence[Batch]) -> None:
    """Raises `CheckpointError` where a backward pass through the whole model would not fit into memory."""
    base = prepared.base
    size = torch.empty(0, dtype=base.dtype).element_size()
    tokens = max(batch.ids.numel() for batch in batches)
    weights = base.checkpoint.parameters * size
    rows, chosen = base.checkpoint.config.get("vocab_size", 0), base.family.experts_per_token(base.checkpoint.config)
    needed = weights + backward_bytes(base.layers, rows, tokens, chosen)
    free = Limits.of_environment().free(base.device)
    free += weights if prepared.running.loaded else 0
    other = "regional, which needs one layer at a time" if base.family.has_ffn else "impact, which needs none"
    if needed > free:
        raise CheckpointError(
            f"relevance.criterion: {prepared.spec.relevance.criterion} needs a backward pass through the whole model, about "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; take criterion {other}, "
            "or lower calibration.tokens_per_batch"
        )


def profile(
    spec: SpecLike | Prepared,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> dict[CorpusName, Profile]:
    """The profile of every corpus of a spec; stored ones are reused, so only what is missing runs the model.

    A spec that `validate` has prepared is not read again; `store` and `overrides` were given there.
    """
    return profiles_of(spec if isinstance(spec, Prepared) else validate(spec, overrides, store), track)
