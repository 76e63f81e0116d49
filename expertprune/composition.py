"""Profiles to a plan: algebra on scores, without the model. Every decision about units is made here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertprune.artifacts import LayerPlan, Plan, Profile
from expertprune.budgets import Widths, removed_parameters, resolve_budget
from expertprune.corpora import CorpusName, corpus_names
from expertprune.errors import SpecError
from expertprune.models import BaseModel
from expertprune.registry import Registry
from expertprune.relevance import Criterion, UnitStatistics, criteria
from expertprune.spec import Fusion, Spec
from expertprune.units import KeptUnits, LayerShape, Structure

_PREFIX = {Structure.FFN: "ffn", Structure.QUERY_HEADS: "heads", Structure.KV_GROUPS: "groups"}

Rule = Callable[[Tensor], Tensor]
rules: Registry[Rule] = Registry("composition rule")


@rules.register("intersection")
def intersection(scores: Tensor) -> Tensor:
    """Irrelevant is what is irrelevant to every dimension (Cus-Prun): `max_d s_d`, `[dimensions, ...]` to `[...]`.

    A unit is in the intersection of the sets `{s_d ≤ q}` exactly when its largest score is at most `q`.
    """
    return scores.amax(0)


@rules.register("union")
def union(scores: Tensor) -> Tensor:
    """Irrelevant is what is irrelevant to any dimension: `min_d s_d`, `[dimensions, ...]` to `[...]`."""
    return scores.amin(0)


@rules.register("mean")
def mean(scores: Tensor) -> Tensor:
    """Dimensions outweigh each other: `mean_d s_d`, `[dimensions, ...]` to `[...]`."""
    return scores.mean(0)


def check_criterion(name: str) -> Criterion:
    """The criterion of a name; raises `SpecError` with the nearest one."""
    if name not in criteria:
        raise SpecError(f"relevance.criterion: {criteria.unknown(name)}")
    return criteria[name]


def unit_statistics(profile: Profile, structure: Structure, layer: int, seed: int) -> UnitStatistics:
    """What a criterion sees of one structure in one layer of a profile."""
    channels = "ffn" if structure is Structure.FFN else "heads"
    prefix = _PREFIX[structure]
    rms = profile.read(f"{channels}.{layer}.rms").float().mul_(profile.read(f"{channels}.{layer}.scale"))
    return UnitStatistics(
        rms=rms,
        impact=None if structure is Structure.FFN else profile.read(f"{prefix}.{layer}.impact"),
        output_l1=profile.read(f"{channels}.{layer}.output_l1"),
        output_l2=profile.read(f"{channels}.{layer}.output_l2"),
        weight_norm=profile.read(f"{prefix}.{layer}.weight_norm"),
        layer=layer,
        seed=(seed * 1009 + list(Structure).index(structure)) * 10007 + layer,
    )


def over_documents(scores: Tensor, how: str | float) -> Tensor:
    """`[documents, units]` to `[units]`: the mean, the maximum or a quantile."""
    if how == "mean":
        return scores.mean(0)
    if how == "max":
        return scores.amax(0)
    return torch.quantile(scores, float(how), dim=0)


@dataclass
class CorpusScores:
    """Of one corpus and structure, layer by layer: scaled relevance and RMS activation over its layer mean, `[units]`."""

    scaled: list[Tensor]
    activation: list[Tensor]


def corpus_scores(profile: Profile, structure: Structure, spec: Spec) -> CorpusScores:
    """Score, aggregate over documents, and put on the scale that corpora share.

    `share`: part of the corpus' total over the whole model. `percentile`: rank within the layer, in [0, 1].
    """
    criterion = check_criterion(spec.relevance.criterion)
    raw, activation = [], []
    for layer in range(len(profile.layers)):
        statistics = unit_statistics(profile, structure, layer, spec.relevance.seed)
        raw.append(over_documents(criterion.score(statistics).float(), spec.compose.aggregate).double())
        square = torch.linalg.vector_norm(statistics.rms, dim=0).square() / statistics.documents
        rms = statistics.per_unit(square).sqrt()
        activation.append((rms / rms.mean().clamp_min(1e-30)).double())
    if spec.compose.scale == "share":
        total = sum(float(scores.sum()) for scores in raw) or 1.0
        return CorpusScores([scores / total for scores in raw], activation)
    return CorpusScores([percentile(scores) for scores in raw], activation)


def percentile(scores: Tensor) -> Tensor:
    """Rank in [0, 1], ties sharing the mean of their ranks, `[units]`."""
    ordered = scores.sort().values
    low = torch.searchsorted(ordered, scores, side="left")
    high = torch.searchsorted(ordered, scores, side="right") - 1
    return (low + high).double() / 2 / max(1, scores.numel() - 1)


SHARED, EXPERT, GENERAL = 0, 1, 2


@dataclass
class Fused:
    """One score per unit of a layer, who gave it, and which kind of unit it is (all `[units]`)."""

    score: Tensor
    source: Tensor  # index into the dimensions, or their number for `general`
    kind: Tensor | None  # SHARED, EXPERT or GENERAL; None without general corpora


def fuse(
    expert: Tensor, general: Tensor, expert_rms: Tensor, general_rms: Tensor, fusion: Fusion
) -> tuple[Tensor, Tensor]:
    """Shared/exclusive fusion, after arXiv:2510.22489, with exposed constants.

    With `δ = |n_G − n_T| / (n_G + n_T)` of the normalized activations `n`: where `δ ≤ τ` a unit is shared and scores
    `λ s_G + (1 − λ) s_T`; otherwise it is exclusive to the expert (`n_T > n_G`), with `s_T`, or to general, with
    `max(β s_G, s_T)`.

    Args:
        expert, general: scores `s_T`, `s_G`, `[units]`.
        expert_rms, general_rms: RMS activation over its layer mean, `[units]`.

    Returns:
        The fused score and the kind of each unit, `[units]` each.
    """
    delta = (general_rms - expert_rms).abs() / (general_rms + expert_rms).clamp_min(1e-30)
    shared = fusion.lambda_ * general + (1 - fusion.lambda_) * expert
    exclusive = torch.where(expert_rms > general_rms, expert, torch.maximum(fusion.beta * general, expert))
    kind = torch.where(delta <= fusion.tau, SHARED, torch.where(expert_rms > general_rms, EXPERT, GENERAL))
    return torch.where(delta <= fusion.tau, shared, exclusive), kind


def score_structure(
    spec: Spec, profiles: Mapping[CorpusName, Profile], structure: Structure, layers: int
) -> list[Fused]:
    """The fused score of every unit of a structure, layer by layer."""
    scores = {name: corpus_scores(profile, structure, spec) for name, profile in profiles.items()}
    chosen = spec.dimensions.chosen
    general = [scores[CorpusName("general", value)] for value in spec.general]
    result = []
    for layer in range(layers):
        # Several values of one dimension: the expert serves all of them, so the largest counts.
        per_dimension = torch.stack(
            [
                torch.stack([scores[CorpusName(dimension, value)].scaled[layer] for value in values]).amax(0)
                for dimension, values in chosen.items()
            ]
        )
        rms = torch.stack(
            [
                torch.stack([scores[CorpusName(dimension, value)].activation[layer] for value in values]).amax(0)
                for dimension, values in chosen.items()
            ]
        )
        expert = rules[spec.compose.rule](per_dimension)
        source = (per_dimension - expert).abs().argmin(0)
        if not general:
            result.append(Fused(expert, source, None))
            continue
        general_score = torch.stack([corpus.scaled[layer] for corpus in general]).amax(0)
        general_rms = torch.stack([corpus.activation[layer] for corpus in general]).amax(0)
        fused, kind = fuse(expert, general_score, rules[spec.compose.rule](rms), general_rms, spec.compose.fusion)
        source = torch.where(fused > expert, len(chosen), source)
        result.append(Fused(fused, source, kind))
    return result


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; among equals the lower index stays, `[count]`."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def select_layer(shape: LayerShape, widths: Widths, scores: Mapping[Structure, Fused]) -> KeptUnits:
    """Keep the highest-scoring units of one layer: groups first, then the same number of heads in each kept group."""
    everything = shape.all_kept
    ffn, groups, heads = everything.ffn, everything.kv_groups, everything.query_heads
    if widths.ffn < shape.ffn:
        ffn = tuple(keep_largest(scores[Structure.FFN].score, widths.ffn).tolist())
    if widths.kv_groups < shape.kv_heads:
        groups = tuple(keep_largest(scores[Structure.KV_GROUPS].score, widths.kv_groups).tolist())
    per_group = shape.heads_per_group
    if widths.heads_per_group < per_group:
        score = scores[Structure.QUERY_HEADS].score
        heads = tuple(
            group * per_group + int(head)
            for group in groups
            for head in keep_largest(score[group * per_group : (group + 1) * per_group], widths.heads_per_group)
        )
    else:
        heads = tuple(head for head in heads if head // per_group in groups)
    return KeptUnits(ffn, heads, groups)


def explain(kept: KeptUnits, scores: Mapping[Structure, Fused], dimensions: list[str]) -> dict[str, dict[str, Any]]:
    """Why a layer keeps what it keeps, per structure that was scored (see `LayerPlan`)."""
    why: dict[str, dict[str, Any]] = {}
    for structure, fused in scores.items():
        mask = torch.zeros(fused.score.numel(), dtype=torch.bool)
        mask[torch.tensor(kept.of(structure))] = True
        names = [*dimensions, "general"]
        counts = Counter(names[index] for index in fused.source[mask].tolist())
        entry: dict[str, Any] = {
            "threshold": float(fused.score[~mask].max()) if not bool(mask.all()) else None,
            "protected": {name: counts[name] for name in names if name != "general" or fused.kind is not None},
        }
        if fused.kind is not None:
            for label, kind in (("shared", SHARED), ("expert_exclusive", EXPERT), ("general_exclusive", GENERAL)):
                of_kind = fused.kind == kind
                entry[label] = {"units": int(of_kind.sum()), "kept": int((of_kind & mask).sum())}
        why[structure.value] = entry
    return why


def compose(spec: Spec, base: BaseModel, profiles: Mapping[CorpusName, Profile]) -> Plan:
    """Decide which units are kept.

    Args:
        profiles: one for each corpus that the spec names.

    Raises:
        SpecError: unknown criterion, or a corpus without a profile.
        PlanError: the budget cannot be met, or the family's config cannot say the widths.
    """
    check_criterion(spec.relevance.criterion)
    if missing := [str(name) for name in corpus_names(spec) if name not in profiles]:
        raise SpecError(f"no profile for {', '.join(missing)}: run the profile stage first")
    widths = resolve_budget(spec.budget, base)
    shape = base.layers[0]
    cut = {
        Structure.FFN: widths.ffn < shape.ffn,
        Structure.KV_GROUPS: widths.kv_groups < shape.kv_heads,
        Structure.QUERY_HEADS: widths.heads_per_group < shape.heads_per_group,
    }
    wanted = {name: profiles[name] for name in corpus_names(spec)}
    scores = {s: score_structure(spec, wanted, s, len(base.layers)) for s, needed in cut.items() if needed}
    layers = []
    for index, shape in enumerate(base.layers):
        here = {structure: fused[index] for structure, fused in scores.items()}
        kept = select_layer(shape, widths, here)
        layers.append(LayerPlan(kept, explain(kept, here, list(spec.dimensions.chosen))))
    before = base.checkpoint.parameters
    return Plan(
        name=spec.name,
        base={"model": base.name, "digest": base.digest},
        spec=spec.document(),
        profiles={str(name): profile.digest for name, profile in wanted.items()},
        shapes=list(base.layers),
        layers=layers,
        budget=widths.summary(shape),
        parameters={"before": before, "after": before - removed_parameters(base, widths)},
    )
