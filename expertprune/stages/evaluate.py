"""Measure an expert against its base on corpora."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.changes import Changes
from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Corpus, CorpusName
from expertprune.corpora.loading import load_corpora
from expertprune.engine.team import team
from expertprune.errors import CheckpointError, UnevaluatedError, under, unevaluated
from expertprune.evaluation.changes import of_corpora
from expertprune.evaluation.measure import Measuring, group_of
from expertprune.evaluation.reading import Read
from expertprune.evaluation.retention import check_floors
from expertprune.files import EXPERT_FILE, check_writable, one_at_a_time, store_folder
from expertprune.models.loading import load_tokenizer
from expertprune.models.passes import TextRun
from expertprune.models.running import RunningBase, stream_folder
from expertprune.progress import Track, silent
from expertprune.pruning.repair import Passengers
from expertprune.reporting.card import write_card
from expertprune.spec.schema import Evaluate
from expertprune.stages.elsewhere import facts
from expertprune.stages.generate import generator
from expertprune.stages.validate import check_measures, evaluation_corpora, leak_guard

log = logging.getLogger(__name__)


def evaluate(
    expert: str | Path,
    corpora: list[str] | None = None,
    base: str | Path | None = None,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    floors: Mapping[str, float] | None = None,
) -> Evaluation:
    """Measure an expert against its base again, and write the result into its folder.

    Args:
        corpora: which of its spec's corpora; default: all.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec, such as `{"evaluate.documents": 32}`.
        floors: groups of which some text must be measured; see `retention.shortfalls`.

    Raises:
        CheckpointError: the folder is no expert or cannot be written, or the base is not the one that
            it was cut from.
        SpecError: a document that calibrated the expert is among those to evaluate on.
    """
    described, place = Expert.load(expert), store_folder(store)
    team().check_shared(described.folder, "expert")
    team().lead(lambda: check_writable(described.folder / EXPERT_FILE))
    overrides = dict(overrides or {}) | ({"evaluate.corpora": corpora} if corpora else {})
    if base is not None:
        overrides["base.model"] = str(base)
    spec = described.local_spec(place, overrides)
    with team().after_the_first():
        resolved = described.find_base(place, spec.base)
    team().agree(lambda: {**facts(resolved), "expert": described.plan.digest})
    with under(str(described.folder / EXPERT_FILE)):
        loaded: dict[CorpusName, Corpus] = load_corpora(spec, place, generator(resolved, spec, place, write=False))
        evaluated = evaluation_corpora(spec, loaded, leak_guard(loaded, described.calibration_digests), place)
        check_measures(spec, evaluated)
    other_tokens = described.plan.vocabulary is not None
    of_text = spec.evaluate.reads_documents
    check_floors(floors or {}, {group_of(corpus) for corpus in evaluated if of_text and corpus.evaluation})
    running = RunningBase(resolved)
    evaluator = measuring(running, evaluated, spec.evaluate, other_tokens)
    measured = measure_folder(evaluator, described.folder, running, track)
    return record(described.folder, measured, of_corpora(evaluated, measured.corpora), described.plan.digest)


def measuring(
    running: RunningBase,
    corpora: Sequence[Corpus],
    settings: Evaluate,
    other_tokens: bool,
    limit: str = "evaluate.max_tokens",
) -> Measuring:
    """What measures experts of a base on corpora, which are already guarded against leaks (see `Measuring`)."""
    base = team().run(TextRun(running.model, running.base.family, (), ()))
    return Measuring(base, running.base.tokenizer, corpora, settings, other_tokens, limit)


def measure_folder(
    evaluator: Measuring,
    folder: Path,
    running: RunningBase,
    track: Track,
    align: bool = False,
    gone: Collection[int] = (),
) -> Evaluation:
    """Measure the expert in a folder; nothing is written.

    Args:
        align, gone: compare hidden states too (see `Measuring.against`).
    """
    base = running.base
    tokenizer = load_tokenizer(folder, base.trust_remote_code) if evaluator.other_tokens else None
    with track("evaluate", evaluator.steps(len(base.layers))) as step:
        expert = team().run(TextRun(stream_folder(folder, base), base.family, (), ()))
        return evaluator.against(expert, step, tokenizer, align, gone)


class Meanwhile:
    """Measures an expert while it is repaired, where the repair takes passengers; else afterwards.

    Args:
        evaluator: what is to be measured. Several experts of one base may share it, one after the
            other; the base then reads once.
    """

    def __init__(self, evaluator: Measuring) -> None:
        self.evaluator = evaluator
        self.passengers = None if evaluator.other_tokens else Passengers(evaluator.batches, evaluator.known)

    def result(self, folder: Path, running: RunningBase, track: Track) -> Evaluation:
        """The evaluation of the expert, which is in its folder by now; nothing is written."""
        aboard = self.passengers
        if aboard is None or aboard.base is None or aboard.expert is None:
            return measure_folder(self.evaluator, folder, running, track)
        # The expert's embeddings and head are the base's; what was cut is behind it in its stream.
        with track("evaluate", len(aboard.batches)) as step:
            return self.evaluator.of_streams(aboard.base, Read(self.evaluator.base, aboard.expert), step)


@contextlib.contextmanager
def evaluated_after(folder: Path) -> Iterator[None]:
    """The evaluation of an expert that is in its place: say so where it fails or is interrupted.

    Raises:
        UnevaluatedError: the evaluation failed.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        unevaluated(stopped, folder)
        raise
    except Exception as error:
        log.info("the evaluation of %s failed", folder, exc_info=True)
        raise UnevaluatedError(folder, error) from error


def record(folder: Path, result: Evaluation, changes: Changes, plan: str) -> Evaluation:
    """Write an evaluation into the folder of its expert.

    Args:
        changes: the largest ones, with their texts, for a file of their own.
        plan: digest of the plan of the expert that was measured; another could have taken its place meanwhile.

    Raises:
        CheckpointError: another expert is there now.
    """

    def write() -> None:
        with one_at_a_time(folder):  # a build that replaces the folder waits
            expert = Expert.load(folder)
            if expert.plan.digest != plan:
                raise CheckpointError(
                    f"{folder}: another expert took its place while it was measured; evaluate it again"
                )
            changes.save(folder)
            write_card(replace(expert, evaluation=result))

    team().lead(write)
    team().wait()
    return result
