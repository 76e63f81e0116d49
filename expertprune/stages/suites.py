"""Measure an expert against its base on suites of tasks and corpora."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from expertprune.artifacts.evaluation import Evaluation, Group, Settings, TaskResult
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import GENERAL, Corpus, CorpusName
from expertprune.corpora.leaks import Examples
from expertprune.corpora.loading import load_corpora
from expertprune.errors import SpecError, gathered
from expertprune.evaluation.harness import models
from expertprune.evaluation.harness import tasks as harness
from expertprune.evaluation.harness.stored import StoredScores, versions
from expertprune.evaluation.harness.tasks import HarnessTask, Scores, less_is_better, run_task
from expertprune.evaluation.measure import group_of
from expertprune.evaluation.retention import RESAMPLES, Counted, Paired, bits_per_byte, summarize
from expertprune.evaluation.suites import Suite, TaskEntry, bare_task, find_suites
from expertprune.files import store_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_tokenizer
from expertprune.models.running import RunningBase, run_folder
from expertprune.progress import Track, silent
from expertprune.reporting.card import write_card
from expertprune.spec.reading import TRUST
from expertprune.spec.schema import Spec
from expertprune.stages.evaluate import measure_folder, measuring
from expertprune.stages.validate import leak_guard

Backend = Literal["hf", "vllm"]


@dataclass(frozen=True)
class ChosenTask:
    """A task of a suite, and the group that it counts in."""

    task: HarnessTask
    suite: str
    group: Group


@dataclass(frozen=True)
class Measurement:
    """Everything that is measured, found and checked before a model is loaded."""

    expert: Expert
    spec: Spec
    base: ResolvedBase
    store: Path
    suites: list[Suite]
    backend: Backend
    limit: int | None
    tasks: list[ChosenTask]
    corpora: list[Corpus]

    @property
    def groups(self) -> set[str]:
        return {each.group for each in self.tasks} | {group_of(corpus) for corpus in self.corpora}


def evaluate_suites(
    expert: str | Path,
    suites: Sequence[str] = (),
    tasks: Sequence[str] = (),
    backend: Backend = "hf",
    limit: int | None = None,
    base: str | Path | None = None,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    floors: Mapping[str, float] | None = None,
    track: Track = silent,
) -> Evaluation:
    """Measure an expert against its base on suites, and write the result into its folder.

    What the folder says of corpora stays where no suite measures perplexity; everything else is
    replaced.

    Args:
        suites: names of suites that ship, or paths.
        tasks: names of tasks of lm-evaluation-harness, besides.
        backend: who answers the tasks: `hf`, the running models of transformers; `vllm`, a server
            of each over HTTP. Perplexity and alignment need whole distributions and hidden states,
            so transformers measures them always.
        limit: at most so many examples of each task.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec.
        floors: groups of which something must be measured; see `retention.shortfalls`.

    Raises:
        CheckpointError: the folder is no expert, or the base is not the one that it was cut from.
        SpecError: an unknown suite or task, one without examples, one that calibrated the expert,
            or lm-evaluation-harness is missing.
        ServingError, UsageError: the server cannot be had (backend `vllm`).
    """
    measurement = prepare(Path(expert), suites, tasks, backend, limit, base, store, overrides)
    if missing := sorted(set(floors or {}) - measurement.groups):
        raise SpecError(
            f"--fail-under: nothing that is measured counts as {' or as '.join(missing)}: add a suite that does"
        )
    counted: list[Counted] = []
    found: dict[str, TaskResult] = {}
    scores = _run_tasks(measurement, track)
    for each in measurement.tasks:
        counted.append(Counted(each.task.label, each.group, _paired(each.task, *scores[each.task.label])))
        found[each.task.label] = _result(each, measurement.backend, counted[-1].paired, *scores[each.task.label])
    generated = {each.task.label for each in measurement.tasks if each.task.generates}
    of_corpora = _run_corpora(measurement, track)
    if measurement.corpora:
        counted += [
            Counted(f"{name} bits_per_byte", corpus.group, bits_per_byte(corpus.per_document))
            for name, corpus in of_corpora.corpora.items()
            if corpus.per_document
        ]
    result = Evaluation(
        settings=of_corpora.settings.model_copy(
            update={
                "suites": {suite.name: suite.digest for suite in measurement.suites},
                "backend": measurement.backend,
                "limit": measurement.limit,
                "versions": versions(),
            }
        ),
        corpora=of_corpora.corpora,
        tasks={label: result for label, result in found.items() if label not in generated},
        generation={label: result for label, result in found.items() if label in generated},
        summary=summarize(counted),
        alignment=of_corpora.alignment if measurement.corpora else {},
    )
    write_card(replace(measurement.expert, evaluation=result))
    return result


# --- what is measured -------------------------------------------------------------------------------------------------


def prepare(
    folder: Path,
    names: Sequence[str],
    tasks: Sequence[str],
    backend: Backend,
    limit: int | None,
    base: str | Path | None,
    store: str | Path | None,
    overrides: Mapping[str, Any] | None,
) -> Measurement:
    """Find and check everything that `evaluate_suites` needs; see there."""
    expert, place = Expert.load(folder), store_folder(store)
    overrides = {**(overrides or {}), **({"base.model": str(base)} if base is not None else {})}
    spec = expert.local_spec(place, overrides)
    suites = find_suites(names)
    entries = _entries(suites, tasks)
    if entries:
        harness.require_harness(served=backend == "vllm")
        harness.check_names([entry for entry, _, _ in entries])
    resolved = expert.find_base(place, spec.base)
    problems: list[str] = []
    corpora: list[Corpus] = []
    chosen: list[ChosenTask] = []
    own, trusted = load_corpora(spec), (overrides or {}).get(TRUST) is True
    guard = leak_guard(own, expert.calibration_digests)
    with gathered(problems):
        corpora = guard.clean(_corpora(spec, suites, own))
    for entry, suite, generates in entries:
        with gathered(problems):
            task = harness.load_task(
                entry, harness.generates(entry) if generates is None else generates, limit, trusted
            )
            chosen.append(ChosenTask(task, suite, entry.group_for(spec.dimensions)))
    problems += guard.problems(*(Examples(f"task {each.task.label}", "examples", each.task.texts) for each in chosen))
    if problems:
        raise SpecError(problems)
    return Measurement(expert, spec, resolved, place, suites, backend, limit, chosen, corpora)


def _entries(suites: Sequence[Suite], names: Sequence[str]) -> list[tuple[TaskEntry, str, bool | None]]:
    """Every task, its suite, and whether it generates answers (`None`: ask the library)."""
    found: list[tuple[TaskEntry, str, bool | None]] = []
    for suite in suites:
        found += [(entry, suite.name, False) for entry in suite.tasks]
        found += [(entry, suite.name, True) for entry in suite.generation]
    known = {entry.label for entry, _, _ in found}
    bare = [bare_task(name) for name in names]
    return found + [(entry, suite, None) for entry, suite in bare if entry.label not in known]


def _corpora(spec: Spec, suites: Sequence[Suite], own: Mapping[CorpusName, Corpus]) -> list[Corpus]:
    """The corpora that the suites name; those that the spec does not name count as general."""
    wanted: list[str] = []
    for suite in suites:
        if suite.perplexity is not None:
            wanted += suite.perplexity.corpora if suite.perplexity.corpora is not None else map(str, own)
    chosen: dict[CorpusName, Corpus] = {}
    others = []
    for name in wanted:
        matches = {each: corpus for each, corpus in own.items() if each.answers_to(name)}
        chosen |= matches
        others += [] if matches else [name]
    if others:
        try:
            loaded = load_corpora(spec.model_copy(update={"general": [*spec.general, *others]}))
        except SpecError as error:
            raise SpecError([f"perplexity.corpora: {problem}" for problem in error.problems]) from None
        names = [CorpusName(GENERAL, name) for name in others]
        chosen |= {name: replace(loaded[name], calibration=()) for name in names}
    return list(chosen.values())


# --- tasks ------------------------------------------------------------------------------------------------------------


def _run_tasks(measurement: Measurement, track: Track) -> dict[str, tuple[Scores, Scores]]:
    """Scores of base and expert on every task; those of the base are kept in the store."""
    stored = StoredScores(measurement.store, measurement.base, measurement.backend, measurement.limit)
    tasks = [each.task for each in measurement.tasks]
    base = {task.label: scores for task in tasks if (scores := stored.load(task)) is not None}
    missing = [task for task in tasks if task.label not in base]
    for task, scores in _run(measurement, measurement.base.folder, "base", missing, track):
        base[task.label] = scores
        stored.save(task, scores)
    result = {}
    for task, scores in _run(measurement, measurement.expert.folder, "expert", tasks, track):
        if scores.examples != base[task.label].examples:
            raise SpecError(f"task {task.label}: base and expert were not asked the same: its prompts differ")
        result[task.label] = (base[task.label], scores)
    return result


def _run(
    measurement: Measurement, folder: Path, name: str, tasks: Sequence[HarnessTask], track: Track
) -> Iterator[tuple[HarnessTask, Scores]]:
    """One model on each task, through the chosen backend."""
    if not tasks:
        return
    with _answering(measurement, folder, name) as model, track(f"tasks, {name}", len(tasks)) as step:
        for task in tasks:
            yield task, run_task(task, model, measurement.limit)
            step()


@contextlib.contextmanager
def _answering(measurement: Measurement, folder: Path, name: str) -> Iterator[Any]:
    base = measurement.base
    tokenizer = load_tokenizer(folder, base.trust_remote_code)
    if measurement.backend == "hf":
        yield models.running_model(run_folder(folder, base), tokenizer)
        return
    from expertprune.serving.server import Server

    arguments = [f"--dtype={str(base.dtype).removeprefix('torch.')}"]
    with Server(folder, model_name=name, arguments=arguments) as server:
        yield models.served_model(folder, server.url, name, tokenizer)


def _paired(task: HarnessTask, base: Scores, expert: Scores) -> Paired:
    return Paired(base.values, expert.values, base.weights, task.chance, less_is_better(task.reported))


def _result(each: ChosenTask, backend: Backend, paired: Paired, base: Scores, expert: Scores) -> TaskResult:
    agreement = None
    if base.answers is not None and expert.answers is not None:
        agreement = float(np.mean([a == b for a, b in zip(base.answers, expert.answers, strict=True)]))
    about = {"suite": each.suite, "group": each.group, "backend": backend, "metric": each.task.reported}
    return TaskResult(**about, **paired.measured().model_dump(), agreement=agreement)


# --- corpora ----------------------------------------------------------------------------------------------------------


def _run_corpora(measurement: Measurement, track: Track) -> Evaluation:
    """Perplexity and, where base and expert have the same tokens, alignment.

    Where no suite measures perplexity, the corpora of the evaluation that the folder holds.
    """
    if not measurement.corpora:
        return measurement.expert.evaluation or Evaluation(settings=Settings(resamples=RESAMPLES))
    other_tokens = measurement.expert.plan.vocabulary is not None  # then only their bytes are the same
    metrics = ["bits_per_byte"] if other_tokens else ["bits_per_byte", "kl"]
    settings = measurement.spec.evaluate.model_copy(update={"metrics": metrics})
    running = RunningBase(measurement.base)
    evaluator = measuring(running, measurement.corpora, settings, other_tokens)
    align = not other_tokens and any(suite.alignment for suite in measurement.suites)
    return measure_folder(evaluator, measurement.expert.folder, running, track, align)
