"""Plans: which units are kept in each layer, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expertprune.errors import PlanError
from expertprune.files import digest_of, write_json
from expertprune.units import (
    KeptRows,
    KeptUnits,
    LayerShape,
    format_indices,
    pack_indices,
    parse_indices,
    unpack_indices,
)

PLAN_SCHEMA = 1


@dataclass
class LayerPlan:
    """What one layer keeps, and why.

    `why` maps a structure that is cut to its numbers: `threshold` (the largest score that was dropped), `protected`
    (kept units by the dimension, or `general`, that gave them their score) and the counts of shared and exclusive units.
    """

    kept: KeptUnits
    why: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class VocabularyPlan:
    """Which vocabulary rows are kept, and why.

    `tokenizer` is the digest of the base's tokenizer, whose ids these are. `why` has `requested`, `threshold` (the
    largest relevance that was dropped), `protected` (kept tokens by what kept them), `coverage` (by corpus, the part of its
    calibration tokens that is kept), `tokens` (by corpus, how many were counted) and examples from both sides of the
    threshold (`last_kept`, `first_dropped`).
    """

    rows: KeptRows
    tokenizer: str
    why: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "of": rows.of,
            "rows": rows.rows,
            "tokens": len(rows.kept),
            "kept": pack_indices(rows.kept, rows.of),
            "padding": list(rows.padding),
            "tokenizer": self.tokenizer,
            "why": self.why,
        }


def _vocabulary_from(data: dict[str, Any]) -> VocabularyPlan:
    of, padding = data["of"], tuple(data["padding"])
    rows = KeptRows(of, unpack_indices(data["kept"], of), padding)
    if not rows.kept or not all(isinstance(row, int) and 0 <= row < of for row in padding):
        raise ValueError(f"vocabulary: rows must be some of 0-{of - 1}")
    return VocabularyPlan(rows, data["tokenizer"], data["why"])


@dataclass
class Plan:
    """Which units are kept in each layer, and why: everything that `prune` needs, in a readable JSON file."""

    name: str
    base: dict[str, str]
    spec: dict[str, Any]
    profiles: dict[str, str]
    shapes: list[LayerShape]
    layers: list[LayerPlan]
    budget: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    vocabulary: VocabularyPlan | None = None

    @property
    def kept(self) -> list[KeptUnits]:
        return [layer.kept for layer in self.layers]

    @property
    def digest(self) -> str:
        return digest_of(self.document())

    @property
    def cuts_layers(self) -> bool:
        """Whether any layer loses a unit, and so has something to repair."""
        return any(layer.kept != shape.all_kept for layer, shape in zip(self.layers, self.shapes, strict=True))

    @property
    def cuts_nothing(self) -> bool:
        return not self.cuts_layers and self.vocabulary is None

    def document(self) -> dict[str, Any]:
        return {
            "schema": PLAN_SCHEMA,
            "kind": "plan",
            "name": self.name,
            "base": self.base,
            "budget": self.budget,
            "parameters": self.parameters,
            "profiles": self.profiles,
            "layers": [
                {
                    "layer": index,
                    "of": {key: value for key, value in asdict(shape).items() if key != "experts" or value},
                    "kept": {
                        "ffn": format_indices(layer.kept.ffn),
                        "query_heads": format_indices(layer.kept.query_heads),
                        "kv_groups": format_indices(layer.kept.kv_groups),
                        **({"experts": format_indices(layer.kept.experts)} if shape.experts else {}),
                    },
                    "why": layer.why,
                }
                for index, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True))
            ],
            **({"vocabulary": self.vocabulary.document()} if self.vocabulary is not None else {}),
            "spec": self.spec,
        }

    def save(self, path: Path) -> None:
        write_json(path, self.document())


def load_plan(path: Path) -> Plan:
    """Read a plan; raises `PlanError` if the file is missing or is no plan."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not a plan: {error}") from None
    return plan_from(data, str(path))


def plan_from(data: Any, where: str) -> Plan:
    """A plan from its document; raises `PlanError` naming `where` if it is none."""
    if not isinstance(data, dict) or data.get("kind") != "plan":
        raise PlanError(f"{where}: not a plan (its 'kind' is not 'plan')")
    if data.get("schema") != PLAN_SCHEMA:
        raise PlanError(f"{where}: a plan of schema {data.get('schema')}, this version reads {PLAN_SCHEMA}")
    try:
        shapes = [LayerShape(**layer["of"]) for layer in data["layers"]]
        layers = [
            LayerPlan(KeptUnits(**{key: parse_indices(text) for key, text in layer["kept"].items()}), layer["why"])
            for layer in data["layers"]
        ]
        for index, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
            _check_kept(shape, layer.kept, index)
        return Plan(
            data["name"],
            data["base"],
            data["spec"],
            data["profiles"],
            shapes,
            layers,
            data["budget"],
            data["parameters"],
            _vocabulary_from(data["vocabulary"]) if data.get("vocabulary") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{where}: damaged plan: {error}") from None


def _check_kept(shape: LayerShape, kept: KeptUnits, layer: int) -> None:
    for indices, count, what in (
        (kept.ffn, shape.neurons, "ffn"),
        (kept.query_heads, shape.query_heads, "query_heads"),
        (kept.kv_groups, shape.kv_heads, "kv_groups"),
        (kept.experts, shape.experts, "experts"),
    ):
        if not count and not indices:  # the model has none
            continue
        if not indices or indices[-1] >= count:
            raise ValueError(f"layer {layer}: {what} must keep some of 0-{count - 1}")
    per_group = len(kept.query_heads) // len(kept.kv_groups)
    groups = [head // shape.heads_per_group for head in kept.query_heads]
    if groups != [group for group in kept.kv_groups for _ in range(per_group)]:
        raise ValueError(f"layer {layer}: the query heads are not the same number in each kept KV group")
    neurons = len(kept.ffn) // max(1, len(kept.experts))
    if shape.experts and [unit // shape.ffn for unit in kept.ffn] != [e for e in kept.experts for _ in range(neurons)]:
        raise ValueError(f"layer {layer}: the FFN neurons are not the same number in each kept expert")
