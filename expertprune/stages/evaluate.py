"""Measure an expert against its base on corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Corpus, CorpusName
from expertprune.corpora.loading import load_corpora
from expertprune.evaluation.measure import batches_needed
from expertprune.evaluation.measure import evaluate as evaluate_models
from expertprune.evaluation.retention import Floats
from expertprune.files import store_folder
from expertprune.models.loading import load_tokenizer
from expertprune.models.running import RunningBase, run_folder
from expertprune.progress import Track, silent
from expertprune.reporting.card import write_card
from expertprune.spec.schema import Evaluate
from expertprune.stages.generate import generator
from expertprune.stages.validate import evaluation_corpora, leak_guard


def evaluate(
    expert: str | Path,
    corpora: list[str] | None = None,
    base: str | Path | None = None,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
) -> Evaluation:
    """Measure an expert against its base again, and write the result into its folder.

    Args:
        corpora: which of its spec's corpora; default: all.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec, such as `{"evaluate.documents": 32}`.

    Raises:
        CheckpointError: the folder is no expert, or the base is not the one that it was cut from.
        SpecError: a document that calibrated the expert is among those to evaluate on.
    """
    described, place = Expert.load(expert), store_folder(store)
    overrides = dict(overrides or {}) | ({"evaluate.corpora": corpora} if corpora else {})
    if base is not None:
        overrides["base.model"] = str(base)
    spec = described.local_spec(place, overrides)
    resolved = described.find_base(place, spec.base)
    loaded: dict[CorpusName, Corpus] = load_corpora(spec, place, generator(resolved, spec, place, write=False))
    evaluated = evaluation_corpora(spec, loaded, leak_guard(loaded, described.calibration_digests))
    return evaluate_folder(described.folder, RunningBase(resolved), evaluated, spec.evaluate, track)


def evaluate_folder(
    folder: Path,
    running: RunningBase,
    corpora: Sequence[Corpus],
    settings: Evaluate,
    track: Track,
    answers: dict[str, Floats] | None = None,
) -> Evaluation:
    """Measure an expert against its base, and write the result into its folder.

    Args:
        corpora: already guarded against leaks.
        answers: what the base answered, for the next expert of the same base (see
            `evaluation.evaluate`).
    """
    described, base = Expert.load(folder), running.base
    own = None  # unless the expert's tokenizer is another than the base's
    if described.plan.vocabulary is not None:
        own = load_tokenizer(folder, base.trust_remote_code)
    expert = run_folder(folder, base)
    with track("evaluate", batches_needed(corpora)) as step:
        result = evaluate_models(running.model, expert, running.tokenizer, corpora, settings, step, answers, own)
    write_card(replace(described, evaluation=result))
    return result
