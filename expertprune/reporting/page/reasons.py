"""Why an expert's units were cut: who kept them, where relevance lies, what corpora agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertprune.artifacts.plan import Plan, UnitReasons
from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.composition.overlap import (
    Array,
    chance_overlap,
    compare_structure,
    irrelevant_sets,
    irrelevant_units,
    relevance,
)
from expertprune.corpora.documents import CorpusName
from expertprune.relevance import Criterion
from expertprune.reporting.pictures import STRUCTURES
from expertprune.units import Structure

FRACTION = 0.25  # of a layer's units that count as irrelevant where nothing was cut


LAYERS = "layers"  # whole ones, beside the structures within a layer


NOT_CUT = "not cut"  # in place of a dimension: units of layers that lose none


@dataclass(frozen=True)
class Protected:
    """Kept units that one dimension, or `general`, gave their score: in all, and by layer.

    Of layers that lose no unit, `NOT_CUT` has them all.
    """

    source: str
    units: int
    layers: list[int]


@dataclass(frozen=True)
class Kind:
    """Units that are shared, or exclusive to the expert or to general: in all, and how many stay."""

    name: str
    units: int
    kept: int


@dataclass(frozen=True)
class CutStructure:
    """Kept and cut units of one structure; `of` and `kept_by_layer` count them by layer.

    `decided` is false where no unit was chosen, as of query heads that left with their KV group.
    `kinds` is empty there, and without general corpora.
    """

    structure: str
    label: str
    decided: bool
    units: int
    kept: int
    cut: int
    kept_fraction: float
    of: list[int]
    kept_by_layer: list[int]
    protected: list[Protected]
    kinds: list[Kind]


@dataclass(frozen=True)
class CorpusRelevance:
    """The share of a corpus' relevance that each layer's units hold, and that the cut units held.

    `by_layer` sums to 1; both are `None` where the corpus gives the structure no relevance, and `cut` where no unit was
    cut.
    """

    name: str
    by_layer: list[float] | None
    cut: float | None


@dataclass(frozen=True)
class Overlap:
    """How far corpora agree on the irrelevant units of a structure: the least relevant `fraction`
    of each layer.

    `matrix` holds the Jaccard index of each pair of corpora's sets, `chance` that of independent
    sets. All dimensions (general aside) agree on `agreed` of the `irrelevant` units in a set,
    independent sets would on `agreed_by_chance`; `agreed_and_cut` of them were cut. `cut_within` is
    the share of the cut units that a corpus finds irrelevant, `cut_within_all` the share that all
    dimensions do.
    """

    fraction: float
    irrelevant: int
    chance: float
    corpora: list[str]
    matrix: list[list[float]]
    agreed: int
    agreed_by_chance: float
    agreed_and_cut: int
    cut_within: list[float | None]
    cut_within_all: float | None


@dataclass(frozen=True)
class StructureRelevance:
    """Where one structure's relevance lies on each corpus by its criterion, and how far corpora agree."""

    structure: str
    label: str
    criterion: str
    corpora: list[CorpusRelevance]
    overlap: Overlap | None


def label(structure: Structure) -> str:
    """What a structure's units are called."""
    return STRUCTURES.get(structure.value, structure.value.replace("_", " "))


def decided(plan: Plan) -> list[Structure]:
    """The structures whose units were chosen; heads that left with their KV group were not."""
    return [structure for structure in Structure if any(structure.value in layer.why for layer in plan.layers)]


def kept_units(plan: Plan) -> list[CutStructure]:
    """Kept and cut units of every structure that the model has; whole layers first, where some go."""
    found = _kept_layers(plan)
    for structure in Structure:
        of = [shape.units(structure) for shape in plan.shapes]
        if not sum(of):
            continue
        kept = [len(units.of(structure)) for units in plan.kept]
        why = [layer.why.get(structure.value) for layer in plan.layers]
        found.append(
            CutStructure(
                structure=structure.value,
                label=label(structure),
                decided=any(why),
                units=sum(of),
                kept=sum(kept),
                cut=sum(of) - sum(kept),
                kept_fraction=sum(kept) / sum(of),
                of=of,
                kept_by_layer=kept,
                protected=_protected(why, kept) if any(why) else [],
                kinds=_kinds(plan, structure.value),
            )
        )
    return found


def _kept_layers(plan: Plan) -> list[CutStructure]:
    if plan.depth is None:
        return []
    kept = [int(not units.gone) for units in plan.kept]
    sources = {
        source: [stays if source == own else 0 for stays, own in zip(kept, plan.depth.source, strict=True)]
        for source in plan.depth.why.protected
    }
    layers = CutStructure(
        structure=LAYERS,
        label="whole layers",
        decided=True,
        units=len(kept),
        kept=sum(kept),
        cut=len(kept) - sum(kept),
        kept_fraction=sum(kept) / len(kept),
        of=[1] * len(kept),
        kept_by_layer=kept,
        protected=[Protected(source, sum(counts), counts) for source, counts in sources.items()],
        kinds=_kinds(plan, LAYERS),
    )
    return [layers]


def _kinds(plan: Plan, structure: str) -> list[Kind]:
    return [Kind(name.replace("_", "-"), found.units, found.kept) for name, found in plan.kinds(structure).items()]


def _protected(why: Sequence[UnitReasons | None], kept: Sequence[int]) -> list[Protected]:
    """In the order in which the plan names those who protect; units that nobody had to protect last."""
    sources = dict.fromkeys(source for reason in why if reason for source in reason.protected)
    by_layer = {source: [reason.protected.get(source, 0) if reason else 0 for reason in why] for source in sources}
    uncut = [0 if reason else units for reason, units in zip(why, kept, strict=True)]
    by_layer |= {NOT_CUT: uncut} if any(uncut) else {}
    return [Protected(source, sum(counts), counts) for source, counts in by_layer.items()]


def relevance_findings(
    plan: Plan,
    profiles: Mapping[str, Profile],
    criterion: Criterion,
    aggregate: str | float,
    part: ProfilePart | None,
    experts: Criterion | None = None,
) -> list[StructureRelevance]:
    """Where relevance lies, by structure that was chosen (FFN neurons where nothing was).

    Args:
        profiles: by corpus; of all of the plan's corpora.
        experts: the criterion of routed experts, where it is another.
    """
    found = []
    for structure in decided(plan) or [Structure.FFN]:
        by = experts if experts is not None and structure is Structure.EXPERTS else criterion
        if structure not in by.structures:
            continue
        by_corpus = {name: relevance(each, structure, by, aggregate, part) for name, each in profiles.items()}
        cut = _cut_units(plan, structure)
        corpora = [_shares(name, layers, cut) for name, layers in by_corpus.items()]
        overlap = _overlap(by_corpus, cut)
        found.append(StructureRelevance(structure.value, label(structure), by.name, corpora, overlap))
    return found


def _cut_units(plan: Plan, structure: Structure) -> list[NDArray[np.bool_]]:
    """Which units are cut, layer by layer, `[units]`."""
    layers = []
    for shape, kept in zip(plan.shapes, plan.kept, strict=True):
        cut = np.ones(shape.units(structure), dtype=np.bool_)
        cut[list(kept.of(structure))] = False
        layers.append(cut)
    return layers


def _shares(name: str, layers: Sequence[Array], cut: Sequence[NDArray[np.bool_]]) -> CorpusRelevance:
    total = sum(float(scores.sum()) for scores in layers)
    if total <= 0:
        return CorpusRelevance(name, None, None)
    lost = sum(float(scores[gone].sum()) for scores, gone in zip(layers, cut, strict=True)) / total
    by_layer = [float(scores.sum()) / total for scores in layers]
    return CorpusRelevance(name, by_layer, lost if any(gone.any() for gone in cut) else None)


def _overlap(by_corpus: Mapping[str, Sequence[Array]], cut: Sequence[NDArray[np.bool_]]) -> Overlap | None:
    """The overlap at the fraction that was cut; `None` for one corpus, or where no layer has two units."""
    units = sum(gone.size for gone in cut)
    fraction = sum(int(gone.sum()) for gone in cut) / units or FRACTION
    choosable = [layer for layer, gone in enumerate(cut) if gone.size > 1]
    layers = [np.stack([scores[layer] for scores in by_corpus.values()]) for layer in choosable]
    compared = compare_structure(layers, fraction) if len(by_corpus) > 1 else None
    if compared is None:
        return None
    counts = [irrelevant_units(scores.shape[1], fraction) for scores in layers]
    sets = [irrelevant_sets(scores, count) for scores, count in zip(layers, counts, strict=True)]
    gone = np.concatenate([cut[layer] for layer in choosable])
    member = np.concatenate(sets, axis=1)  # [corpora, units]
    names = list(by_corpus)
    dimensions = [not CorpusName.parse(name).is_general for name in names]
    agreed: NDArray[np.bool_] = np.all(member[dimensions], axis=0)
    cut_units = int(gone.sum())

    def within(chosen: NDArray[np.bool_]) -> float | None:
        return float((chosen & gone).sum() / cut_units) if cut_units else None

    return Overlap(
        fraction=fraction,
        irrelevant=compared.irrelevant,
        chance=chance_overlap([scores.shape[1] for scores in layers], counts),
        corpora=names,
        matrix=compared.overlap.tolist(),
        agreed=int(agreed.sum()),
        agreed_by_chance=_by_chance(layers, counts, sum(dimensions)),
        agreed_and_cut=int((agreed & gone).sum()),
        cut_within=[within(row) for row in member],
        cut_within_all=within(agreed),
    )


def _by_chance(layers: Sequence[Array], counts: Sequence[int], corpora: int) -> float:
    """Expected intersection of independent sets, one per corpus: `Σ_l n_l (k_l / n_l)^corpora`."""
    pairs = zip(layers, counts, strict=True)
    return float(sum(scores.shape[1] * (count / scores.shape[1]) ** corpora for scores, count in pairs))
