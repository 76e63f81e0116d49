"""Plans: which units are kept in each layer, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from expertprune.artifacts.kept import KeptText, ShapeDocument, Width, kept_document, kept_units
from expertprune.errors import PlanError
from expertprune.files import PLAN, digest_of, problems_of, read_json, staged_output, to_json
from expertprune.spec.schema import Retention
from expertprune.spec.values import Amount, Rows
from expertprune.units import (
    KeptRows,
    KeptUnits,
    LayerShape,
    pack_indices,
    unpack_indices,
)

PLAN_SCHEMA = 2


class _Record(BaseModel):
    """A piece of a plan's document: types are checked, unknown keys are errors, nothing changes
    afterwards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class BaseReference(_Record):
    """The base that a plan was made for: its name and the digest of its weights and config."""

    model: str
    digest: str


class Parameters(_Record):
    """Parameters of the base and of the expert."""

    before: int = Field(gt=0)
    after: int = Field(gt=0)


class KindCount(_Record):
    """How many units of a layer are of one kind, and how many of those are kept."""

    units: int
    kept: int


KINDS = ("shared", "expert_exclusive", "general_exclusive")


class UnitReasons(_Record):
    """Why a layer keeps the units of one structure.

    `threshold` is the largest score that was dropped, `protected` counts the kept units by the
    dimension, or `general`, that gave them their score. The kinds are there where general corpora
    are.
    """

    threshold: float | None
    protected: dict[str, int]
    shared: KindCount | None = None
    expert_exclusive: KindCount | None = None
    general_exclusive: KindCount | None = None


class RetentionFound(_Record):
    """A floor of `budget.retention`, and what the expert keeps of each corpus' held-back documents."""

    retention: Retention
    found: dict[str, float]


def _requested(value: Any) -> Any:
    return RetentionFound.model_validate(value) if isinstance(value, dict) and "retention" in value else value


class StructureBudget(_Record):
    """What was requested of a structure, and the units that each layer has (`of`), keeps and loses.

    FFN neurons are those of one routed expert where there are several. A number where all layers
    agree, else a list with one number for each layer.
    """

    requested: Annotated[Amount | RetentionFound, BeforeValidator(_requested)]
    of: int | list[int]
    kept: int | list[int]
    removed: int | list[int]


class UnseenCoverage(_Record):
    """How much of the tokens of a corpus' unseen text the kept rows cover: estimate and 90%
    interval.

    Each end of the interval holds by itself with 95% confidence.
    """

    estimate: float
    low: float
    high: float
    documents: int
    tokens: int


class RowReasons(_Record):
    """Why a plan keeps these vocabulary rows.

    Attributes:
        threshold: the largest relevance that was dropped.
        protected: kept tokens by what kept them.
        coverage: by corpus, the part of its calibration tokens that is kept.
        unseen: by corpus, the estimate for unseen text; not for a corpus of fewer than two
        documents.
        tokens: by corpus, how many calibration tokens were counted.
        last_kept, first_dropped: examples from both sides of the threshold.
    """

    requested: Rows | None
    threshold: float | None
    protected: dict[str, int]
    coverage: dict[str, float]
    unseen: dict[str, UnseenCoverage]
    tokens: dict[str, int]
    last_kept: list[str]
    first_dropped: list[str]


class DepthReasons(_Record):
    """Why whole layers go, or stay.

    `relevance` has one number for each layer of the base, `source` the dimension, or `general`, that
    gave it. `why` is of all layers together.
    """

    relevance: list[float]
    source: list[str]
    why: UnitReasons


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps, and why: the reasons of each structure that is cut, by its name."""

    kept: KeptUnits
    why: Mapping[str, UnitReasons] = field(default_factory=dict)


@dataclass(frozen=True)
class VocabularyPlan:
    """Which vocabulary rows are kept, and why. `tokenizer` is the digest of the base's tokenizer,
    whose ids these are.
    """

    rows: KeptRows
    tokenizer: str
    why: RowReasons | None = None


@dataclass(frozen=True)
class Plan:
    """Which units are kept in each layer, and why: everything that `prune` needs, in a readable
    JSON file.

    Attributes:
        spec: the spec's own document, with what it leaves open decided.
        profiles: the digest of each corpus' profile.
        shapes: the base's layers.
        budget: by structure, for the structures that the base has; `layers` where whole layers go.
        depth: where whole layers go.
    """

    name: str
    base: BaseReference
    parameters: Parameters
    shapes: Sequence[LayerShape]
    layers: Sequence[LayerPlan]
    budget: Mapping[str, StructureBudget] = field(default_factory=dict)
    profiles: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: VocabularyPlan | None = None
    depth: DepthReasons | None = None

    @property
    def kept(self) -> list[KeptUnits]:
        return [layer.kept for layer in self.layers]

    @property
    def gone(self) -> tuple[int, ...]:
        """The layers that go whole, in the base's numbering."""
        return tuple(layer for layer, units in enumerate(self.kept) if units.gone)

    def reasons(self, structure: str) -> list[UnitReasons]:
        """Why units of a structure are kept, by layer that it was chosen in; of `layers`, once for all."""
        if structure == "layers":
            return [self.depth.why] if self.depth is not None else []
        return [layer.why[structure] for layer in self.layers if structure in layer.why]

    def kinds(self, structure: str) -> dict[str, KindCount]:
        """The units of a structure by their kind (`KINDS`), in all layers that lose some; empty without general corpora."""
        found = {}
        for kind in KINDS:
            if of := [count for why in self.reasons(structure) if (count := getattr(why, kind)) is not None]:
                found[kind] = KindCount(units=sum(each.units for each in of), kept=sum(each.kept for each in of))
        return found

    @property
    def digest(self) -> str:
        return digest_of(self.document())

    @property
    def cuts_layers(self) -> bool:
        """Whether any layer loses a unit, and so has something to repair."""
        return any(layer.kept != shape.all_kept for layer, shape in zip(self.layers, self.shapes, strict=True))

    def holding(self, found: RetentionFound) -> Plan:
        """This plan, found for a retention floor: its budget names the floor and what the expert keeps."""
        budget = {name: entry.model_copy(update={"requested": found}) for name, entry in self.budget.items()}
        return replace(self, budget=budget)

    def document(self) -> dict[str, Any]:
        """The plan as plain data, which `from_document` reads."""
        return {
            "schema": PLAN_SCHEMA,
            "kind": "plan",
            "name": self.name,
            "base": self.base.document(),
            "budget": {structure: entry.document() for structure, entry in self.budget.items()},
            "parameters": self.parameters.document(),
            "profiles": dict(self.profiles),
            "layers": [
                _layer_document(index, layer, shape)
                for index, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True))
            ],
            **({"depth": self.depth.document()} if self.depth is not None else {}),
            **({"vocabulary": _vocabulary_document(self.vocabulary)} if self.vocabulary is not None else {}),
            "spec": dict(self.spec),
        }

    @classmethod
    def from_document(cls, data: Any, where: str) -> Plan:
        """A plan from its document. Raises `PlanError` that names `where`, and the key that is
        wrong.
        """
        if not isinstance(data, dict) or data.get("kind") != "plan":
            raise PlanError(f"{where}: not a plan (its 'kind' is not 'plan')")
        if data.get("schema") != PLAN_SCHEMA:
            raise PlanError(
                f"{where}: a plan of schema {data.get('schema')}, this version reads {PLAN_SCHEMA}; compose it again"
            )
        try:
            return _plan(_PlanDocument.model_validate(data))
        except ValidationError as error:
            first = problems_of(error, _PlanDocument)[0]
            raise PlanError(f"{where}: damaged plan: {first}; compose it again") from None
        except ValueError as error:
            raise PlanError(f"{where}: damaged plan: {error}; compose it again") from None

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the plan. Raises `CheckpointError` if something is there that may not be replaced."""
        with staged_output(path, PLAN, overwrite) as temporary:
            temporary.write_text(to_json(self.document()) + "\n", encoding="utf-8")


def load_plan(path: Path) -> Plan:
    """Read a plan; raises `PlanError` if the file is missing or is no plan."""
    if path.suffix in (".yaml", ".yml"):
        raise PlanError(f"{path}: is a spec, not a plan; expertprune build and expertprune compose read specs")
    return Plan.from_document(read_json(path, error=PlanError), str(path))


# --- the document ---------------------------------------------------------------------------------------------------


_MOST_NEURONS = 2**25  # of all layers: more than any model has


class _LayerDocument(_Record):
    layer: int
    of: ShapeDocument
    kept: KeptText | None
    why: dict[str, UnitReasons]


class _VocabularyDocument(_Record):
    of: Width
    rows: int
    tokens: int
    kept: str
    padding: list[int]
    tokenizer: str
    why: RowReasons | None


class _PlanDocument(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    base: BaseReference
    budget: dict[str, StructureBudget]
    parameters: Parameters
    profiles: dict[str, str]
    layers: list[_LayerDocument]
    vocabulary: _VocabularyDocument | None = None
    depth: DepthReasons | None = None
    spec: dict[str, Any]


def _layer_document(index: int, layer: LayerPlan, shape: LayerShape) -> dict[str, Any]:
    of = asdict(shape)
    if not shape.experts:
        del of["experts"]
    if shape.expert_groups == 1:
        del of["expert_groups"]
    return {
        "layer": index,
        "of": of,
        "kept": kept_document(layer.kept, shape),
        "why": {name: reasons.document() for name, reasons in layer.why.items()},
    }


def _vocabulary_document(plan: VocabularyPlan) -> dict[str, Any]:
    rows = plan.rows
    return {
        "of": rows.of,
        "rows": rows.rows,
        "tokens": len(rows.kept),
        "kept": pack_indices(rows.kept, rows.of),
        "padding": list(rows.padding),
        "tokenizer": plan.tokenizer,
        "why": plan.why.document() if plan.why is not None else None,
    }


def _plan(data: _PlanDocument) -> Plan:
    shapes = [LayerShape(**vars(layer.of)) for layer in data.layers]
    for index, each in enumerate(data.layers):
        if each.layer != index:
            raise ValueError(f"layers: layer {each.layer} stands where layer {index} belongs")
    if sum(shape.neurons for shape in shapes) > _MOST_NEURONS:
        raise ValueError("layers: they have more FFN neurons than any model")
    layers = [
        LayerPlan(kept_units(each.kept, shape, each.layer), each.why)
        for each, shape in zip(data.layers, shapes, strict=True)
    ]
    if layers and layers[0].kept.gone:
        raise ValueError("layers: layer 0 must stay")
    if data.depth is not None and not len(data.depth.relevance) == len(data.depth.source) == len(layers):
        raise ValueError("depth: it must have one relevance and one source for each layer")
    vocabulary = _vocabulary(data.vocabulary) if data.vocabulary is not None else None
    return Plan(
        data.name,
        data.base,
        data.parameters,
        shapes,
        layers,
        data.budget,
        data.profiles,
        data.spec,
        vocabulary,
        data.depth,
    )


def _vocabulary(data: _VocabularyDocument) -> VocabularyPlan:
    rows = KeptRows(data.of, unpack_indices(data.kept, data.of), tuple(data.padding))
    if not rows.kept or not all(0 <= row < data.of for row in rows.padding):
        raise ValueError(f"vocabulary: rows must be some of 0-{data.of - 1}")
    return VocabularyPlan(rows, data.tokenizer, data.why)
