"""Why an expert's units were cut: who kept how many in each layer, where relevance lies, what dimensions agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertprune.artifacts.plan import Plan
from expertprune.artifacts.profile import Profile
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

KINDS = ("shared", "expert_exclusive", "general_exclusive")


FRACTION = 0.25  # of a layer's units that count as irrelevant where nothing was cut


def label(structure: Structure) -> str:
    """What a structure's units are called."""
    return STRUCTURES.get(structure.value, structure.value.replace("_", " "))


def decided(plan: Plan) -> list[Structure]:
    """The structures whose units were chosen; query heads that left with their KV group were not."""
    return [structure for structure in Structure if any(structure.value in layer.why for layer in plan.layers)]


def kept_units(plan: Plan) -> list[dict[str, Any]]:
    """Kept and cut units of every structure that the model has, by layer, and who protected them; kinds over all layers."""
    found = []
    for structure in Structure:
        of = [shape.units(structure) for shape in plan.shapes]
        if not sum(of):
            continue
        kept = [len(units.of(structure)) for units in plan.kept]
        why = [layer.why.get(structure.value) for layer in plan.layers]
        found.append(
            {
                "structure": structure.value,
                "label": label(structure),
                "decided": any(why),
                "units": sum(of),
                "kept": sum(kept),
                "cut": sum(of) - sum(kept),
                "kept_fraction": sum(kept) / sum(of),
                "layers": {"of": of, "kept": kept, "threshold": [None if w is None else w["threshold"] for w in why]},
                "protected": _protected(why),
                "kinds": _kinds(why),
            }
        )
    return found


def _protected(why: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """Kept units by who gave them their score, in the order in which the plan names them."""
    sources = list(dict.fromkeys(source for reason in why if reason for source in reason["protected"]))
    by_layer = {
        source: [int(reason["protected"].get(source, 0)) if reason else 0 for reason in why] for source in sources
    }
    return [{"source": source, "units": sum(counts), "layers": counts} for source, counts in by_layer.items()]


def _kinds(why: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        counts = [reason[kind] for reason in why if reason and kind in reason]
        if counts:
            units, kept = (sum(int(each[key]) for each in counts) for key in ("units", "kept"))
            found.append({"kind": kind.replace("_", "-"), "units": units, "kept": kept})
    return found


def relevance_findings(
    plan: Plan,
    profiles: Mapping[str, Profile],
    criterion: Criterion,
    aggregate: str | float,
    part: str | None,
    experts: Criterion | None = None,
) -> list[dict[str, Any]]:
    """Per structure: where the relevance of each corpus lies, how much of it was cut, and what corpora agree on.

    Only structures that were chosen count, or FFN neurons where nothing was. `by_layer` is the part of the corpus'
    relevance that a layer's units hold, which sums to 1 over the layers; `cut` the part that the cut units held.

    Args:
        profiles: by corpus; of all of the plan's corpora.
        experts: the criterion of whole experts, where it is another.
    """
    found = []
    for structure in decided(plan) or [Structure.FFN]:
        by = experts if experts is not None and structure is Structure.EXPERTS else criterion
        if structure not in by.structures:
            continue
        by_corpus = {name: relevance(each, structure, by, aggregate, part) for name, each in profiles.items()}
        cut = _cut_units(plan, structure)
        found.append(
            {
                "structure": structure.value,
                "label": label(structure),
                "corpora": [{"name": name, **_shares(layers, cut)} for name, layers in by_corpus.items()],
                "overlap": _overlap(by_corpus, cut),
            }
        )
    return found


def _cut_units(plan: Plan, structure: Structure) -> list[NDArray[np.bool_]]:
    """Which units are cut, layer by layer, `[units]`."""
    layers = []
    for shape, kept in zip(plan.shapes, plan.kept, strict=True):
        cut = np.ones(shape.units(structure), dtype=np.bool_)
        cut[list(kept.of(structure))] = False
        layers.append(cut)
    return layers


def _shares(layers: Sequence[Array], cut: Sequence[NDArray[np.bool_]]) -> dict[str, Any]:
    total = sum(float(scores.sum()) for scores in layers)
    if total <= 0:
        return {"by_layer": None, "cut": None}
    lost = sum(float(scores[gone].sum()) for scores, gone in zip(layers, cut, strict=True))
    return {"by_layer": [float(scores.sum()) / total for scores in layers], "cut": lost / total}


def _overlap(by_corpus: Mapping[str, Sequence[Array]], cut: Sequence[NDArray[np.bool_]]) -> dict[str, Any] | None:
    """How far the irrelevant sets agree, at the fraction that was cut; `None` where no layer has two units.

    `matrix` holds Jaccard indices; `cut_within` says which part of the cut units each corpus finds irrelevant, and
    `cut_within_all` which part all dimensions do (general aside), against what independent sets would give.
    """
    units = sum(gone.size for gone in cut)
    fraction = sum(int(gone.sum()) for gone in cut) / units or FRACTION
    choosable = [layer for layer, gone in enumerate(cut) if gone.size > 1]
    layers = [np.stack([scores[layer] for scores in by_corpus.values()]) for layer in choosable]
    compared = compare_structure(layers, fraction)
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

    return {
        "fraction": fraction,
        "units": compared.units,
        "irrelevant": compared.irrelevant,
        "chance": chance_overlap([scores.shape[1] for scores in layers], counts),
        "corpora": names,
        "matrix": compared.overlap.tolist(),
        "rank_correlation": compared.rank_correlation.tolist(),
        "agreed": int(agreed.sum()),
        "agreed_by_chance": _by_chance(layers, counts, sum(dimensions)),
        "agreed_and_cut": int((agreed & gone).sum()),
        "cut_within": [within(row) for row in member],
        "cut_within_all": within(agreed),
    }


def _by_chance(layers: Sequence[Array], counts: Sequence[int], corpora: int) -> float:
    """Expected size of the intersection of independent sets, one a corpus: `Σ_l n_l (k_l / n_l)^corpora`."""
    pairs = zip(layers, counts, strict=True)
    return float(sum(scores.shape[1] * (count / scores.shape[1]) ** corpora for scores, count in pairs))
