"""Measure suites, and keep each result in the store, so that no task or corpus is measured twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from expertprune.artifacts.evaluation import Alignment, CorpusResult, Evaluation, Group, Settings
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.record import Record
from expertprune.corpora.documents import Corpus
from expertprune.errors import SpecError
from expertprune.evaluation.harness import models
from expertprune.evaluation.harness.scores import Scores
from expertprune.evaluation.harness.stored import StoredScores, result_path
from expertprune.evaluation.harness.tasks import HarnessTask, run_task
from expertprune.evaluation.measure import group_of
from expertprune.evaluation.retention import RESAMPLES
from expertprune.evaluation.suites import Suite
from expertprune.files import EXPERT_FILE, digest_of, digest_of_files, file_digest, is_report, read_kept, write_json
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_tokenizer
from expertprune.models.running import RunningBase, run_folder
from expertprune.progress import Track
from expertprune.spec.schema import Evaluate, Spec
from expertprune.stages.elsewhere import means_of
from expertprune.stages.evaluate import measure_folder, measuring

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
    align: bool

    @property
    def groups(self) -> set[str]:
        return {each.group for each in self.tasks} | {group_of(corpus) for corpus in self.corpora}

    @property
    def keys(self) -> list[str]:
        """Names of the files in the store that this measurement comes to."""
        roles = (self.of_base, self.of_expert)
        scored = [stored.path(each.task) for each in self.tasks for stored in roles]
        return sorted(path.name for path in (*scored, *(self._path(corpus) for corpus in self.corpora)))

    @property
    def done(self) -> bool:
        """Whether everything is in the store."""
        roles = (self.of_base, self.of_expert)
        scored = (stored.load(each.task) is not None for each in self.tasks for stored in roles)
        return all(scored) and all(self._stored(corpus) is not None for corpus in self.corpora)

    @cached_property
    def of_base(self) -> StoredScores:
        """The base's scores on tasks."""
        base = self.base
        about = [base.digest, base.tokenizer_digest, _beside(base.folder, base), *means_of(base)]
        return StoredScores(self.store, digest_of(about), self.backend, self.limit)

    @cached_property
    def of_expert(self) -> StoredScores:
        """The expert's scores on tasks."""
        paths = [
            path
            for path in sorted(self.expert.folder.iterdir())
            if path.suffix in _READ and path.name != EXPERT_FILE and not is_report(path.name)
        ]
        files = {path.name: file_digest(path, self.store) for path in paths}
        about = [files, _beside(self.expert.folder, self.base), *means_of(self.base)]
        return StoredScores(self.store, digest_of(about), self.backend, self.limit)

    def scores(self) -> dict[str, tuple[Scores, Scores]]:
        """Stored scores of base and expert by task. Raises `SpecError` where they were asked different things."""
        found = {}
        for task in (each.task for each in self.tasks):
            base, expert = self.of_base.load(task), self.of_expert.load(task)
            assert base is not None
            assert expert is not None
            if base.examples != expert.examples:
                raise SpecError(f"task {task.label}: base and expert were not asked the same: its prompts differ")
            found[task.label] = base, expert
        return found

    def results(self) -> Evaluation:
        """Stored perplexity and, where base and expert have the same tokens, alignment.

        Where no suite measures perplexity, the corpora of the evaluation that the folder holds.
        """
        if not self.corpora:
            return self.expert.evaluation or Evaluation(settings=Settings(resamples=RESAMPLES))
        about = self.settings
        stored = {str(corpus.name): self._stored(corpus) for corpus in self.corpora}
        known = {name: each for name, each in stored.items() if each is not None}
        return Evaluation(
            settings=Settings(
                documents=about.documents,
                max_tokens=about.max_tokens,
                metrics=list(about.metrics or ()),
                resamples=RESAMPLES,
            ),
            corpora={name: each.result for name, each in known.items()},
            alignment={key: value for each in known.values() for key, value in each.alignment.items()},
        )

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, track: Track) -> None:
        """Measure what is not in the store, and keep it there."""
        for stored, folder, name in (
            (self.of_base, self.base.folder, "base"),
            (self.of_expert, self.expert.folder, "expert"),
        ):
            missing = [each.task for each in self.tasks if stored.load(each.task) is None]
            for task, scores in self._asked(folder, name, missing, track):
                stored.save(task, scores)
        self._read([corpus for corpus in self.corpora if self._stored(corpus) is None], track)

    def _asked(
        self, folder: Path, name: str, tasks: Sequence[HarnessTask], track: Track
    ) -> Iterator[tuple[HarnessTask, Scores]]:
        """One model on each task, through the chosen backend."""
        if not tasks:
            return
        if any(task.generates for task in tasks):  # what a damaged model writes does not show it
            checkpoint = Checkpoint(folder)
            for each in checkpoint.tensors:
                checkpoint.read_finite(each)
        with self._answering(folder, name) as model, track(f"tasks, {name}", len(tasks)) as step:
            for task in tasks:
                yield task, run_task(task, model, self.limit, name)
                step()

    @contextlib.contextmanager
    def _answering(self, folder: Path, name: str) -> Iterator[Any]:
        base = self.base
        tokenizer = load_tokenizer(folder, base.trust_remote_code)
        if self.backend == "hf":
            yield models.running_model(run_folder(folder, base), tokenizer)
            return
        from expertprune.serving.server import Server

        arguments = [f"--dtype={str(base.dtype).removeprefix('torch.')}"]
        with Server(folder, model_name=name, arguments=arguments) as server:
            yield models.served_model(folder, server.url, name, tokenizer, next(iter(server.keys), None))

    def _read(self, corpora: Sequence[Corpus], track: Track) -> None:
        """Perplexity and alignment on corpora."""
        if not corpora:
            return
        running = RunningBase(self.base)
        evaluator = measuring(running, corpora, self.settings, self.other_tokens)
        align, gone = self.align and not self.other_tokens, self.expert.plan.gone
        found = measure_folder(evaluator, self.expert.folder, running, track, align, gone)
        for corpus in corpora:
            name = str(corpus.name)
            aligned = {key: value for key, value in found.alignment.items() if key == name.replace("/", " ", 1)}
            kept = _OnCorpus(result=found.corpora[name], alignment=aligned)
            write_json(self._path(corpus), kept.model_dump(mode="json"))

    @property
    def other_tokens(self) -> bool:
        """Whether base and expert read different tokens, of which only the bytes are the same."""
        return self.expert.plan.vocabulary is not None

    @property
    def settings(self) -> Evaluate:
        """How corpora are measured."""
        metrics = ["bits_per_byte"] if self.other_tokens else ["bits_per_byte", "kl"]
        return self.spec.evaluate.model_copy(update={"metrics": metrics})

    def _path(self, corpus: Corpus) -> Path:
        text = [*corpus.measured, self.base.templates_digest, group_of(corpus)]
        about = [self.of_base.model, self.of_expert.model, text, self.settings.model_dump(mode="json"), self.align]
        return result_path(self.store, "corpus", *about)

    def _stored(self, corpus: Corpus) -> _OnCorpus | None:
        return read_kept(self._path(corpus), _OnCorpus)


def _beside(folder: Path, base: ResolvedBase) -> str:
    """Digest of what answers depend on beside config, weights and tokenizer: how it generates, and trusted code."""
    code = folder.rglob("*.py") if base.trust_remote_code else ()
    return digest_of_files(sorted([*folder.glob("generation_config.json"), *code]), folder)


class _OnCorpus(Record):
    """What was measured of base and expert on one corpus."""

    result: CorpusResult
    alignment: dict[str, Alignment]


_READ = (".safetensors", ".json", ".model", ".jinja", ".txt")
