"""Evaluations: base and expert measured on the same examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Evaluation:
    """Base and expert on the same examples.

    `corpora` maps a corpus to its metrics, a metric to `base`, `expert`, `retention`, `low` and `high`. What suites measure
    comes beside them: `tasks` and `generation` map a task to the same numbers and more, `summary` a group of them to its
    retention, `alignment` a dimension value to how alike hidden states are.
    """

    corpora: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        suites = {name: getattr(self, name) for name in ("tasks", "generation", "summary", "alignment")}
        found = {name: value for name, value in suites.items() if value}
        return {"kind": "evaluation", "settings": self.settings, "corpora": self.corpora, **found}

    @classmethod
    def from_document(cls, data: dict[str, Any]) -> Self:
        """What `document` wrote."""
        suites = {name: data.get(name, {}) for name in ("tasks", "generation", "summary", "alignment")}
        return cls(data["corpora"], data["settings"], **suites)
