"""What is measured of an expert: suites and tasks with their data, found and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.leaks import guarded, leaked, not_profiled
from expertprune.corpora.loading import load_corpora
from expertprune.errors import SpecError, gathered
from expertprune.evaluation.harness import tasks as harness
from expertprune.evaluation.harness.tasks import HarnessTask
from expertprune.evaluation.suites import Suite, TaskEntry, bare_task, find_suite, suite_labels
from expertprune.files import store_folder
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Spec

Backend = Literal["hf", "vllm"]


@dataclass
class Measured:
    """A task of a suite, and what it says of."""

    task: HarnessTask
    suite: str
    group: str


@dataclass
class Measurement:
    """All that is measured, found and checked, and no model loaded."""

    expert: Expert
    spec: Spec
    base: ResolvedBase
    store: Path
    suites: list[Suite]
    backend: Backend
    limit: int | None
    tasks: list[Measured] = field(default_factory=list)
    corpora: list[Corpus] = field(default_factory=list)
    aligned: bool = False

    @property
    def groups(self) -> set[str]:
        return {each.group for each in self.tasks} | {group_of(corpus.name) for corpus in self.corpora}


def group_of(corpus: str) -> str:
    """Whether a corpus says of the expert's purpose or of what it keeps in general."""
    return "general" if CorpusName.parse(corpus).is_general else "expert"


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
    """Find and check everything that an evaluation on suites needs; for arguments and errors see `measuring`."""
    expert, place = Expert.load(folder), store_folder(store)
    overrides = {**(overrides or {}), **({"base.model": str(base)} if base is not None else {})}
    spec = expert.local_spec(place, overrides)
    suites = _suites(names)
    bare = [bare_task(name) for name in tasks]
    suite_labels(suites)
    entries = [(entry, suite.name, key == "generation") for suite in suites for key, entry in _entries(suite)]
    known = {entry.label for entry, _, _ in entries}
    entries += [(entry, suite, _generates(entry)) for entry, suite in bare if entry.label not in known]
    if entries:
        harness.require_harness(served=backend == "vllm")
        harness.check_names([entry for entry, _, _ in entries])
    resolved = expert.find_base(spec.base, place)
    measurement = Measurement(expert, spec, resolved, place, suites, backend, limit)
    problems: list[str] = []
    with gathered(problems):
        measurement.corpora = _corpora(measurement)
    measurement.aligned = any(suite.alignment for suite in suites)
    for entry, suite, generates in entries:
        with gathered(problems):
            task = harness.load_task(entry, generates, limit)
            measurement.tasks.append(Measured(task, suite, entry.group_for(spec.dimensions)))
    if problems:
        raise SpecError(problems)
    _check_leaks(measurement)
    return measurement


def _suites(names: Sequence[str]) -> list[Suite]:
    suites, problems = [], []
    for name in dict.fromkeys(names):
        try:
            suites.append(find_suite(name))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return suites


def _entries(suite: Suite) -> Iterator[tuple[str, TaskEntry]]:
    for key in ("tasks", "generation"):
        for entry in getattr(suite, key):
            yield key, entry


def _generates(entry: TaskEntry) -> bool:
    """Whether a task that no section claims generates its answers: as lm-evaluation-harness says."""
    return harness.output_type(entry) == "generate_until"


def _corpora(measurement: Measurement) -> list[Corpus]:
    """The corpora that the suites name, guarded against leaks; those that the spec does not name count as general."""
    sections = [suite.perplexity for suite in measurement.suites if suite.perplexity is not None]
    if not sections:
        return []
    own = {str(name): corpus for name, corpus in load_corpora(measurement.spec).items()}
    wanted: list[str] = []
    for section in sections:
        wanted += section.corpora if section.corpora is not None else list(own)
    chosen, others = [], []
    for name in dict.fromkeys(wanted):
        matches = [each for each in own if CorpusName.parse(each).answers_to(name)]
        chosen += matches
        others += [] if matches else [name]
    known = dict(own)
    if others:
        wider = measurement.spec.model_copy(update={"general": [*measurement.spec.general, *others]})
        try:
            loaded = {str(name): corpus for name, corpus in load_corpora(wider).items()}
        except SpecError as error:
            raise SpecError([f"perplexity.corpora: {problem}" for problem in error.problems]) from None
        for name in others:
            corpus = loaded[str(CorpusName("general", name))]
            known[corpus.name] = Corpus(corpus.name, (), corpus.evaluation, corpus.questions, corpus.set_aside)
            chosen.append(corpus.name)
    clean = {corpus.name: corpus for corpus in guarded(list(known.values()))}
    return not_profiled([clean[name] for name in dict.fromkeys(chosen)], measurement.expert.calibration_digests)


def _check_leaks(measurement: Measurement) -> None:
    """Raises `SpecError` if a task's example calibrated the expert: its text, or a longer field of its data."""
    if not measurement.tasks:
        return
    calibration = [d for corpus in load_corpora(measurement.spec).values() for d in corpus.calibration]
    profiled = measurement.expert.calibration_digests
    places: list[tuple[int, int]] = []
    documents: list[Document] = []
    for number, each in enumerate(measurement.tasks):
        for example, texts in enumerate(each.task.texts):
            documents += texts
            places += [(number, example)] * len(texts)
    bad = set(leaked(documents, calibration)) | {i for i, text in enumerate(documents) if text.digest in profiled}
    problems = []
    for number, each in enumerate(measurement.tasks):
        mine = sorted(i for i in bad if places[i][0] == number)
        if mine:
            count, text = len({places[i][1] for i in mine}), " ".join(documents[mine[0]].text.split())[:60]
            problems.append(
                f"task {each.task.label}: {count} of {each.task.examples} examples also calibrate the expert (the first: "
                f"{text!r}...): take them out of one of the two"
            )
    if problems:
        raise SpecError(problems)
