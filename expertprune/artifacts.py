"""What lies between two stages, on disk: profiles, plans and evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.errors import CheckpointError, PlanError
from expertprune.files import digest_of, staged_file, write_json
from expertprune.units import (
    KeptRows,
    KeptUnits,
    LayerShape,
    format_indices,
    pack_indices,
    parse_indices,
    unpack_indices,
)

PROFILE_SCHEMA = 2
PLAN_SCHEMA = 1


def halved(name: str, values: Tensor) -> dict[str, Tensor]:
    """Values as float16 under `name`, after division by `name.scale`, a power of two that puts the largest near 2¹⁵.

    Massive activations overflow half precision, and a scale leaves 29 binary orders of magnitude below the largest.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    # no smaller than float32's smallest normal number, below which a scale would vanish itself
    scale = 2.0 ** max(math.ceil(math.log2(largest)) - 15, -126) if 0 < largest < math.inf else 1.0
    return {name: (values / scale).to(torch.float16), f"{name}.scale": torch.tensor(scale, dtype=torch.float32)}


@dataclass(frozen=True)
class ProfileKey:
    """What a profile depends on; its digest is the profile's name."""

    model: str
    tokenizer: str
    corpus: str
    max_tokens: int
    dtype: str

    @property
    def digest(self) -> str:
        return digest_of([PROFILE_SCHEMA, asdict(self)])


class Profile:
    """The stored statistics of one (model, corpus) pair: one safetensors file, its description in the header.

    Statistics are read one tensor at a time, so a profile larger than memory is no problem. For layer `l`:

    - `ffn.l.rms` `[documents, ffn]`, float16: root mean square of each `down_proj` input over a document's tokens,
      times `ffn.l.rms.scale`, a power of two that puts the largest value near the top of half precision;
    - `ffn.l.sum`, `ffn.l.square_sum` `[ffn]`, float64: over all tokens;
    - `heads.l.rms`, `.rms.scale`, `.sum`, `.square_sum`: the same for the channels of the `o_proj` input;
    - `heads.l.impact` `[documents, query_heads]` and `groups.l.impact` `[documents, kv_heads]`, float32: mean squared
      change of the attention's output without the head, without the group;
    - `*.l.output_l1`, `*.l.output_l2` `[channels]`, float32: norms of the output projection's columns;
    - `ffn.l.weight_norm`, `heads.l.weight_norm`, `groups.l.weight_norm` `[units]`: Frobenius norm of all that a unit owns;
    - of layers of experts, where `ffn` of the above is all neurons of all experts, each time the router's weight, and 0 on
      tokens that go elsewhere: `experts.l.frequency`, `experts.l.impact`, `experts.l.routed_norm`
      `[documents, experts]`, float32: how often each is chosen, mean squared norm of what it writes, and mean norm of that
      on the tokens routed to it, both times the router's weight; `experts.l.weight_norm` `[experts]`;
    - `stream.l.square` `[documents]`: mean square of the residual stream after the layer;
    - `tokens` `[documents]`: tokens of each document that the model predicts.

    What other passes over the same corpus give lies in parts beside it, `DIGEST.PART.safetensors`, one for each pass that
    was made: `gradient-language_model`, `gradient-kl`, `regional`, `removal`, `removal-fisher`. Each holds `ffn.l.value` and
    `heads.l.value` (and `experts.l.value`), `[documents, units]` in half precision with their scales (removals: float32
    `[units]`, and `groups.l.value` too). The part `vocabulary` holds, of each vocabulary row, `count` `[rows]`, int64, how
    often its token occurs, and `mass` `[rows]`, float32, the probability that the model puts on it, mean over positions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.about: dict[str, Any] = json.loads((file.metadata() or {}).get("expertprune", "{}"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such profile") from None
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable profile ({error}); delete it and profile again") from None
        if not isinstance(self.about, dict):
            raise CheckpointError(f"{path}: not a profile; delete it and profile again")
        if self.about.get("schema") != PROFILE_SCHEMA:
            raise CheckpointError(f"{path}: a profile of schema {self.about.get('schema')}, not {PROFILE_SCHEMA}")

    def read(self, name: str) -> Tensor:
        """One statistic, as stored."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def part(self, name: str) -> Profile | None:
        """What another pass over the same corpus gave, or `None` if it was not made."""
        path = part_path(self.path, name)
        return Profile(path) if path.is_file() else None

    def read_half(self, name: str) -> Tensor:
        """A statistic that was stored in half precision with its scale, float32."""
        return self.read(name).float().mul_(self.read(f"{name}.scale"))

    @property
    def digest(self) -> str:
        return str(self.about["digest"])

    @property
    def corpus(self) -> str:
        return str(self.about["corpus"])

    @property
    def documents(self) -> list[str]:
        return list(self.about["documents"])

    @property
    def tokens(self) -> int:
        return int(self.about["tokens"])

    @property
    def layers(self) -> list[LayerShape]:
        return [LayerShape(**shape) for shape in self.about["layers"]]


def part_path(profile: Path, part: str) -> Path:
    """Where a part of a profile lies."""
    return profile.with_name(f"{profile.stem}.{part}.safetensors")


def save_profile(path: Path, about: dict[str, Any], statistics: dict[str, Tensor]) -> Profile:
    """Write a profile, whole or not at all."""
    about = {"schema": PROFILE_SCHEMA, **about}
    with staged_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in statistics.items()},
            temporary,
            metadata={"expertprune": json.dumps(about)},
        )
    return Profile(path)


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
    search: list[float] = field(default_factory=list)  # fitness of each allocation that was tried, in order
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
            **({"search": self.search} if self.search else {}),
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
            data.get("search", []),
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
