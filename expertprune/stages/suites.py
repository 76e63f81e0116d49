"""Measure an expert against its base on suites of tasks and corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertprune.artifacts.changes import AnswerChange, Changes
from expertprune.artifacts.evaluation import Evaluation, TaskResult
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import GENERAL, Corpus, CorpusName
from expertprune.corpora.leaks import Examples
from expertprune.corpora.loading import load_corpora
from expertprune.engine.tasks import Engine, Local, RemoteCall, Report, Shard, Task
from expertprune.engine.team import team
from expertprune.errors import SpecError, UsageError, gathered, under
from expertprune.evaluation import changes
from expertprune.evaluation.harness import tasks as harness
from expertprune.evaluation.harness.metrics import less_is_better
from expertprune.evaluation.harness.scores import Scores, common_beginning
from expertprune.evaluation.harness.stored import versions
from expertprune.evaluation.harness.tasks import HarnessTask
from expertprune.evaluation.retention import Counted, Paired, bits_of_corpora, check_floors, summarize
from expertprune.evaluation.suites import Suite, TaskEntry, bare_task, find_suites
from expertprune.files import EXPERT_FILE, check_writable, digest_of, store_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_tokenizer
from expertprune.models.running import to_stream
from expertprune.models.spool import Limits
from expertprune.progress import Track, silent
from expertprune.spec.reading import TRUST
from expertprune.spec.schema import Spec
from expertprune.stages.elsewhere import base_with, check_same, means_of
from expertprune.stages.evaluate import record
from expertprune.stages.generate import generator
from expertprune.stages.suite_scores import Backend, ChosenTask, Measurement
from expertprune.stages.validate import leak_guard


def evaluate_suites(
    expert: str | Path,
    suites: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    backend: Backend = "hf",
    limit: int | None = None,
    base: str | Path | None = None,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    floors: Mapping[str, float] | None = None,
    track: Track = silent,
    engine: Engine | None = None,
) -> Evaluation:
    """Measure an expert against its base on suites, and write the result into its folder.

    What the folder says of corpora stays where no suite measures perplexity; everything else is
    replaced.

    Args:
        suites: names of suites that ship, or paths; one, or several.
        tasks: names of tasks of lm-evaluation-harness, besides.
        backend: who answers the tasks: `hf`, the running models of transformers; `vllm`, a server
            of each over HTTP. Perplexity and alignment need whole distributions and hidden states,
            so transformers measures them always.
        limit: at most so many examples of each task.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec.
        floors: groups of which something must be measured; see `retention.shortfalls`.
        engine: what runs a task for each suite; default: this process does them all together.

    Raises:
        CheckpointError: the folder is no expert or cannot be written, or the base is not the one that
            it was cut from.
        SpecError: an unknown suite or task, one without examples, one that calibrated the expert,
            or lm-evaluation-harness is missing.
        ServingError, UsageError: the server cannot be had (backend `vllm`).
        UsageError: something is given that would change nothing.
    """
    if team().size > 1:
        raise UsageError(
            "suites need a whole model, whose work a team does not share: run them without torchrun, as tasks by "
            "--engine ray or --shard"
        )
    check_writable(Expert.load(expert).folder / EXPERT_FILE)
    suites, tasks = ((each,) if isinstance(each, str) else tuple(each) for each in (suites, tasks))
    asked = SuiteRequest(Path(expert), suites, tasks, backend, limit, base, store, overrides)
    asked.check_used()
    measurement = asked.prepared(device=None if engine is None else engine.device)
    check_floors(floors or {}, measurement.groups)
    counted: list[Counted] = []
    found: dict[str, TaskResult] = {}
    if engine is None or isinstance(engine, Local):
        measurement.run(track)
    else:
        engine.run(asked.tasks_of(measurement), track)
    scores = measurement.scores()
    for each in measurement.tasks:
        counted.append(Counted(each.task.label, each.group, _paired(each.task, *scores[each.task.label])))
        found[each.task.label] = _result(each, measurement.backend, counted[-1].paired, *scores[each.task.label])
    generated = {each.task.label for each in measurement.tasks if each.task.generates}
    of_corpora = measurement.results()
    if measurement.corpora:
        counted += bits_of_corpora(of_corpora.corpora)
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
    record(measurement.expert.folder, result, _changes(measurement, of_corpora), measurement.expert.plan.digest)
    return result


def _changes(measured: Measurement, found: Evaluation) -> Changes:
    """The largest changes on corpora, those in the folder where none were measured, and on tasks."""
    if measured.corpora:
        known = changes.of_corpora(measured.corpora, found.corpora)
    else:
        known = Changes.read(measured.expert.folder) or Changes()
    of_corpora: dict[str, list[AnswerChange]] = {}
    for each in known.answers:
        if each.source in found.corpora:
            of_corpora.setdefault(each.source, []).append(each)
    scores = measured.scores()
    tasks = [changes.of_task(each.task, each.group, *scores[each.task.label]) for each in measured.tasks]
    return known.model_copy(update={"answers": changes.largest([*of_corpora.values(), *tasks])})


# --- what is measured -------------------------------------------------------------------------------------------------


_OF_SUITES = ("evaluate.corpora", "evaluate.others", "evaluate.metrics")  # keys that count without suites only


@dataclass(frozen=True)
class SuiteRequest:
    """What a user wants to have measured (see `evaluate_suites`)."""

    expert: Path
    suites: Sequence[str]
    tasks: Sequence[str]
    backend: Backend
    limit: int | None
    base: str | Path | None
    store: str | Path | None
    overrides: Mapping[str, Any] | None

    def check_used(self) -> None:
        """Raises `UsageError` for what is given and would change nothing."""
        given = dict(self.overrides or {})
        whole = given.get("evaluate")
        given |= {f"evaluate.{key}": value for key, value in whole.items()} if isinstance(whole, dict) else {}
        if wrong := [key for key in _OF_SUITES if key in given]:
            raise UsageError(f"{', '.join(wrong)}: suites and tasks say themselves what is measured on which corpora; give "
                             "this key without --suite and --task")  # fmt: skip
        if (self.limit, self.backend) != (None, "hf") and not _entries(find_suites(self.suites), self.tasks):
            raise UsageError("--limit and --backend are of tasks, and these suites have none: leave them out, or give "
                             "--task; --documents limits the documents of a corpus")  # fmt: skip

    def prepared(self, align: bool | None = None, device: str | None = None, dtype: str = "auto") -> Measurement:
        """Find and check everything that is needed.

        Args:
            align: whether hidden states are compared; default: if a suite says so.
            device, dtype: what the models run with; default: as the spec says, on this machine.
        """
        expert, place = Expert.load(self.expert), store_folder(self.store)
        moved = {"base.model": str(self.base)} if self.base is not None else {}
        spec = expert.local_spec(place, {**(self.overrides or {}), **moved})
        suites = find_suites(self.suites)
        entries = _entries(suites, self.tasks)
        if entries:
            harness.require_harness(served=self.backend == "vllm")
            harness.check_names([entry for entry, _, _ in entries])
        resolved = base_with(expert.find_base(place, spec.base), spec.base, device, dtype)
        if entries and self.backend == "hf" and _streamed(resolved):
            raise UsageError(
                "tasks call the model as a whole, and the base's layers are streamed (base.layers): give --backend vllm, "
                "which may share it over several GPUs, or measure the spec's corpora with `expertprune evaluate` alone"
            )
        problems: list[str] = []
        corpora: list[Corpus] = []
        chosen: list[ChosenTask] = []
        own = load_corpora(spec, place, generator(resolved, spec, place, write=False))
        guard = leak_guard(own, expert.calibration_digests)
        with gathered(problems):
            named = dict(zip(dict.fromkeys(self.suites), suites, strict=True))
            corpora = guard.clean(_corpora(spec, named, own, place))
        trusted = (self.overrides or {}).get(TRUST) is True
        asked_in_chat = any(entry.chat for entry, _, _ in entries)
        tokenizer = load_tokenizer(resolved.folder, resolved.trust_remote_code) if asked_in_chat else None
        for entry, suite, generates in entries:
            with gathered(problems):
                wanted = harness.generates(entry) if generates is None else generates
                task = harness.load_task(entry, wanted, self.limit, tokenizer, trusted)
                chosen.append(ChosenTask(task, suite, entry.group_for(spec.dimensions)))
        problems += guard.problems(
            *(Examples(f"task {each.task.label}", "examples", each.task.texts) for each in chosen)
        )
        if problems:
            raise SpecError(problems)
        align = any(suite.alignment for suite in suites) if align is None else align
        return Measurement(expert, spec, resolved, place, suites, self.backend, self.limit, chosen, corpora, align)

    def tasks_of(self, whole: Measurement) -> list[Task]:
        """A task for each suite, and one for the tasks that are named alone."""
        requests = [replace(self, suites=(name,), tasks=()) for name in dict.fromkeys(self.suites)]
        requests += [replace(self, suites=(), tasks=self.tasks)] if self.tasks else []
        return [each._task(whole) for each in requests]

    def _task(self, whole: Measurement) -> Task:
        means = means_of(whole.base)
        measurement = self.prepared(whole.align, *means)
        asked = replace(
            self,
            expert=self.expert.resolve(),
            suites=tuple(str(Path(name).resolve()) if Path(name).is_file() else name for name in self.suites),
            store=whole.store.resolve(),
        )
        arguments = {"asked": asked, "align": whole.align, "means": means, "expected": measurement.keys}
        return Task(
            name=" ".join(("suite", *self.suites) if self.suites else ("tasks", *self.tasks)),
            digest=digest_of(measurement.keys),
            done=lambda: measurement.done,
            run=measurement.run,
            elsewhere=RemoteCall(measure_elsewhere, arguments),
        )


def measure_elsewhere(
    asked: SuiteRequest, align: bool, means: tuple[str, str], expected: list[str], track: Track = silent
) -> None:
    """Measure in a process that shares the store with the one that asks; the results go there.

    Args:
        means: the type of device and the dtype that the models run with (see `means_of`).

    Raises:
        UsageError: this machine would measure something else than `expected`, names of results.
    """
    measurement = asked.prepared(align, *means)
    check_same(", ".join(asked.suites or asked.tasks), digest_of(expected), digest_of(measurement.keys))
    measurement.run(track)


def suites_shard(asked: SuiteRequest, shard: Shard, track: Track = silent) -> Report:
    """A shard's share of an evaluation on suites, in the store."""
    asked.check_used()
    return shard.work(asked.tasks_of(asked.prepared()), track)


def _streamed(base: ResolvedBase) -> bool:
    """Whether a base's layers are streamed. Where that hangs on a GPU that is elsewhere, the task there says so."""
    if base.source == "auto" and base.device.type == "cuda" and not torch.cuda.is_available():
        return False
    return to_stream(base.checkpoint, base, Limits.of_environment())


def _entries(suites: Sequence[Suite], names: Sequence[str]) -> list[tuple[TaskEntry, str, bool | None]]:
    """Every task, its suite, and whether it generates answers (`None`: ask the library)."""
    found: list[tuple[TaskEntry, str, bool | None]] = []
    for suite in suites:
        found += [(entry, suite.name, False) for entry in suite.tasks]
        found += [(entry, suite.name, True) for entry in suite.generation]
    known = {entry.label for entry, _, _ in found}
    bare = [bare_task(name) for name in dict.fromkeys(names)]
    return found + [(entry, suite, None) for entry, suite in bare if entry.label not in known]


def _corpora(spec: Spec, suites: Mapping[str, Suite], own: Mapping[CorpusName, Corpus], store: Path) -> list[Corpus]:
    """The corpora that the suites name; those that the spec does not name count as general.

    Args:
        suites: by the names or paths that the user gave.
    """
    chosen: dict[CorpusName, Corpus] = {}
    problems: list[str] = []
    for given, suite in suites.items():
        if suite.perplexity is None:
            continue
        others = []
        for name in suite.perplexity.corpora if suite.perplexity.corpora is not None else map(str, own):
            matches = {each: corpus for each, corpus in own.items() if each.answers_to(name)}
            chosen |= matches
            others += [] if matches or CorpusName(GENERAL, name) in chosen else [name]
        if others:
            with gathered(problems), under(f"{given}: perplexity.corpora"):
                loaded = load_corpora(spec.model_copy(update={"general": [*spec.general, *others]}), store)
                for each in (loaded[CorpusName(GENERAL, name)] for name in others):
                    if all(each.measured[1:] != known.measured[1:] for known in chosen.values()):  # by another name
                        chosen[each.name] = replace(each, calibration=())
    if problems:
        raise SpecError(problems)
    return list(chosen.values())


# --- results -----------------------------------------------------------------------------------------------------------


def _paired(task: HarnessTask, base: Scores, expert: Scores) -> Paired:
    return Paired(base.values, expert.values, base.weights, task.chance, less_is_better(task.reported))


def _result(each: ChosenTask, backend: Backend, paired: Paired, base: Scores, expert: Scores) -> TaskResult:
    agreement = common = None
    if each.task.generates and base.answers is not None and expert.answers is not None:
        agreement = float(np.mean([a == b for a, b in zip(base.answers, expert.answers, strict=True)]))
    if base.texts is not None and expert.texts is not None:
        common = common_beginning(base.texts, expert.texts)
    about = {"suite": each.suite, "group": each.group, "backend": backend, "metric": each.task.reported}
    about["digest"] = each.task.digest
    return TaskResult(**about, **paired.measured().model_dump(), agreement=agreement, common=common)
