"""Relevance to one fused score per unit: aggregate, scale, compose over dimensions, fuse with general. No model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.corpora.documents import CorpusName
from expertprune.errors import SpecError
from expertprune.registry import Registry
from expertprune.relevance import Criterion, Pass, UnitStatistics, criteria
from expertprune.spec.schema import Fusion, Relevance, Spec
from expertprune.units import Structure

_PREFIX = {
    Structure.FFN: "ffn",
    Structure.QUERY_HEADS: "heads",
    Structure.KV_GROUPS: "groups",
    Structure.EXPERTS: "experts",
}


Rule = Callable[[Tensor], Tensor]


rules: Registry[Rule] = Registry("composition rule", group="expertprune.rules")


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
    return criteria.named(name, "relevance.criterion")


def criterion_name(relevance: Relevance, structure: Structure) -> str:
    """The name of the criterion that scores a structure."""
    return relevance.experts or relevance.criterion if structure is Structure.EXPERTS else relevance.criterion


def check_scored(relevance: Relevance, structures: Sequence[Structure], has_ffn: bool = True) -> None:
    """Raises `SpecError` where a criterion does not score a structure, or needs a pass that a model has not."""
    for structure in structures:
        key = "experts" if structure is Structure.EXPERTS and relevance.experts != relevance.criterion else "criterion"
        name = criterion_name(relevance, structure)
        criterion = check_criterion(name)
        if structure not in criterion.structures:
            others = ", ".join(other for other in sorted(criteria) if structure in criteria[other].structures)
            own = "; relevance.experts can name one for whole routed experts alone" if not has_ffn else ""
            raise SpecError(
                f"relevance.{key}: {name} does not score {structure.value}; criteria that do: {others}{own}"
            )
    named = {"criterion": relevance.criterion, "experts": relevance.experts}
    for key, each in named.items():  # the pass that one needs is made, whether or not its scores choose
        needs = None if has_ffn or each is None else check_criterion(each).needs
        if needs not in (None, Pass.GRADIENT):
            raise SpecError(
                f"relevance.{key}: {each} needs the {needs} pass, which is not made through routed experts; take "
                "fisher, or impact, which needs none"
            )


def needed_part(relevance: Relevance) -> ProfilePart | None:
    """The part of a profile that the spec's criteria need beyond the forward pass, if any."""
    names = [relevance.criterion, *([relevance.experts] if relevance.experts else [])]
    needs = next((found for name in names if (found := check_criterion(name).needs) is not None), None)
    if needs is None:
        return None
    return ProfilePart(needs, relevance.loss if needs is Pass.GRADIENT else "")


def unit_statistics(
    profile: Profile, structure: Structure, layer: int, seed: int, part: ProfilePart | None = None
) -> UnitStatistics:
    """What a criterion sees of one structure in one layer of a profile.

    Args:
        part: the part of the profile to read too (see `needed_part`).

    Raises:
        SpecError: the part was never made; the message says which pass is missing.
    """
    number = (seed * 1009 + list(Structure).index(structure)) * 10007 + layer
    if structure is Structure.EXPERTS:
        return _expert_statistics(profile, layer, number, part)
    channels = "ffn" if structure is Structure.FFN else "heads"
    prefix = _PREFIX[structure]
    weight = profile.read("weights").double().sum()
    mean = profile.read(f"{channels}.{layer}.sum") / weight
    variance = profile.read(f"{channels}.{layer}.square_sum") / weight - mean.square()
    return UnitStatistics(
        rms=profile.read_half(f"{channels}.{layer}.rms"),
        impact=None if structure is Structure.FFN else profile.read(f"{prefix}.{layer}.impact"),
        output_l1=profile.read(f"{channels}.{layer}.output_l1"),
        output_l2=profile.read(f"{channels}.{layer}.output_l2"),
        weight_norm=profile.read(f"{prefix}.{layer}.weight_norm"),
        layer=layer,
        seed=number,
        variance=variance.clamp_min(0).float(),
        tokens=profile.read("tokens"),
        **_from_part(profile, structure, layer, part),
    )


def _expert_statistics(profile: Profile, layer: int, seed: int, part: ProfilePart | None) -> UnitStatistics:
    """A routed expert is one channel: its activation is the norm of what it writes, its column has norm 1."""
    impact = profile.read(f"experts.{layer}.impact")
    routed = profile.read(f"experts.{layer}.routed")
    ones = torch.ones(impact.shape[1])
    return UnitStatistics(
        rms=impact.sqrt(),
        impact=impact,
        output_l1=ones,
        output_l2=ones,
        weight_norm=profile.read(f"experts.{layer}.weight_norm"),
        layer=layer,
        seed=seed,
        tokens=profile.read("tokens"),
        frequency=profile.read(f"experts.{layer}.frequency"),
        routed=routed,
        routed_norm=profile.read(f"experts.{layer}.norm_sum") / routed.clamp_min(torch.finfo(torch.float32).tiny),
        **_from_part(profile, Structure.EXPERTS, layer, part),
    )


def _from_part(profile: Profile, structure: Structure, layer: int, part: ProfilePart | None) -> dict[str, Tensor]:
    if part is None:
        return {}
    stored = profile.part(part)
    if stored is None:
        raise SpecError(
            f"the profile of {profile.corpus} lacks the {part} pass that this criterion needs: run the profile stage"
        )
    groups = structure is Structure.KV_GROUPS
    value = stored.read_half(f"{'heads' if groups else _PREFIX[structure]}.{layer}.value")
    if groups:  # the group's mask multiplies all its heads
        value = value.unflatten(1, (profile.layers[layer].kv_heads, -1)).sum(2)
    if part.made_by is not Pass.GRADIENT:
        return {part.made_by.value: value}
    return {"gradient": value, "gradient_norm": stored.read_half(f"{_PREFIX[structure]}.{layer}.norm")}


def corpus_score(criterion: Criterion, statistics: UnitStatistics, how: str | float) -> Tensor:
    """The criterion's score of a whole corpus, `[units]`: the mean, the maximum or a quantile over its documents.

    In the mean, documents count by the criterion's `weight`, where it has one.
    """
    weight = criterion.weight(statistics).float() if criterion.weight is not None else None
    return over_documents(criterion.score(statistics).float(), how, weight)


def over_documents(scores: Tensor, how: str | float, weight: Tensor | None = None) -> Tensor:
    """`[documents, units]` to `[units]`: the mean, the maximum or a quantile.

    Args:
        weight: `[documents, units]`, at least 0: what each document counts in the mean. A unit that no document counts
            for has the mean 0.
    """
    if how == "mean" and weight is not None:
        return (scores * weight).sum(0) / weight.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
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


def corpus_scores(profile: Profile, structures: Sequence[Structure], spec: Spec) -> dict[Structure, CorpusScores]:
    """Score, aggregate over documents, and put on the scale that corpora share.

    `share`: part of the corpus' total over the whole model, all the given structures together, which compete for one
    budget. `percentile`: rank within the layer and structure, in [0, 1]. `standard`: `(s − mean) / standard deviation`
    within the layer and structure (FLAP, arXiv:2312.11983).
    """
    part = needed_part(spec.relevance)
    result = {}
    for structure in structures:
        criterion = check_criterion(criterion_name(spec.relevance, structure))
        raw, activation = [], []
        for layer, shape in enumerate(profile.layers):
            if not shape.units(structure):  # nothing of this layer is cut
                raw.append(torch.zeros(0, dtype=torch.float64))
                activation.append(raw[-1])
                continue
            statistics = unit_statistics(profile, structure, layer, spec.relevance.seed, part)
            raw.append(corpus_score(criterion, statistics, spec.compose.aggregate).double())
            square = torch.linalg.vector_norm(statistics.rms, dim=0).square() / statistics.documents
            rms = statistics.per_unit(square).sqrt()
            activation.append((rms / rms.mean().clamp_min(1e-30)).double())
        result[structure] = CorpusScores(raw, activation)
    if spec.compose.scale == "share":
        total = sum(float(layer.sum()) for scores in result.values() for layer in scores.scaled) or 1.0
        return {s: CorpusScores([layer / total for layer in r.scaled], r.activation) for s, r in result.items()}
    put = percentile if spec.compose.scale == "percentile" else standard
    return {s: CorpusScores([put(layer) for layer in r.scaled], r.activation) for s, r in result.items()}


def standard(scores: Tensor) -> Tensor:
    """Distance from the mean in standard deviations, `[units]`; zero where all are equal."""
    if not scores.numel() or bool(scores.min() == scores.max()):  # the mean may differ by a rounding error
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-30)


def percentile(scores: Tensor) -> Tensor:
    """Rank in [0, 1], ties sharing the mean of their ranks, `[units]`."""
    ordered = scores.sort().values
    low = torch.searchsorted(ordered, scores, side="left")
    high = torch.searchsorted(ordered, scores, side="right") - 1
    return (low + high).double() / 2 / max(1, scores.numel() - 1)


class UnitKind(IntEnum):
    """Whether a unit serves the expert and general text alike, or one of them only (see `fuse`)."""

    SHARED = 0
    EXPERT = 1
    GENERAL = 2


@dataclass
class Fused:
    """One score per unit of a layer, who gave it, and which kind of unit it is (all `[units]`)."""

    score: Tensor
    source: Tensor  # index into the dimensions, or their number for `general`
    kind: Tensor | None  # a `UnitKind`; None without general corpora


def fuse(
    expert: Tensor, general: Tensor, expert_rms: Tensor, general_rms: Tensor, fusion: Fusion
) -> tuple[Tensor, Tensor]:
    """General and expert relevance as one score, and which units are shared.

    With `δ = |n_G − n_T| / (n_G + n_T)` of the normalized activations `n`: where `δ ≤ τ` a unit is shared, otherwise it is
    exclusive to the expert (`n_T > n_G`) or to general. `weighted`: every unit scores `λ s_G + (1 − λ) s_T`.
    `shared_exclusive`, after arXiv:2510.22489: shared units alone score so, the expert's `s_T`, general's `max(β s_G, s_T)`.

    Args:
        expert, general: scores `s_T`, `s_G`, `[units]`.
        expert_rms, general_rms: RMS activation over its layer mean, `[units]`.

    Returns:
        The fused score and the kind of each unit, `[units]` each.
    """
    delta = (general_rms - expert_rms).abs() / (general_rms + expert_rms).clamp_min(1e-30)
    exclusive_to = torch.where(expert_rms > general_rms, UnitKind.EXPERT, UnitKind.GENERAL)
    kind = torch.where(delta <= fusion.tau, UnitKind.SHARED, exclusive_to)
    weighted = fusion.lambda_ * general + (1 - fusion.lambda_) * expert
    if fusion.method == "weighted":
        return weighted, kind
    exclusive = torch.where(kind == UnitKind.EXPERT, expert, torch.maximum(fusion.beta * general, expert))
    return torch.where(kind == UnitKind.SHARED, weighted, exclusive), kind


def score_units(
    spec: Spec, profiles: Mapping[CorpusName, Profile], structures: Sequence[Structure], together: bool = False
) -> dict[Structure, list[Fused]]:
    """The fused score of every unit of some structures, layer by layer.

    Args:
        together: the structures compete for one budget, so their scores share one scale.
    """
    groups = [list(structures)] if together else [[structure] for structure in structures]
    result: dict[Structure, list[Fused]] = {}
    for group in groups:
        scores = {name: corpus_scores(profile, group, spec) for name, profile in profiles.items()}
        for structure in group:
            result[structure] = fused({name: each[structure] for name, each in scores.items()}, spec)
    return result


def givers(per_dimension: Tensor, composed: Tensor) -> Tensor:
    """Which dimension a composed score is due to: the smallest where no more is left of all, and else the largest.

    So a mean, which is no dimension's score, is due to the one that raises it most.

    Args:
        per_dimension: `[dimensions, units]`.
        composed: `[units]`, by a rule.

    Returns:
        Indices of dimensions, `[units]`.
    """
    return torch.where(composed <= per_dimension.amin(0), per_dimension.argmin(0), per_dimension.argmax(0))


def fused(scores: Mapping[CorpusName, CorpusScores], spec: Spec) -> list[Fused]:
    """The scores of all corpora as one for each unit: composed over dimensions, fused with general, layer by layer."""
    chosen = spec.dimensions.chosen
    general = [scores[CorpusName("general", value)] for value in spec.general]
    rule = rules.named(spec.compose.rule, "compose.rule")
    result = []
    for layer in range(len(next(iter(scores.values())).scaled)):
        # Several values of one dimension: the expert serves all of them, so the largest counts.
        of = [[scores[CorpusName(dimension, value)] for value in values] for dimension, values in chosen.items()]
        per_dimension = torch.stack([torch.stack([each.scaled[layer] for each in values]).amax(0) for values in of])
        rms = torch.stack([torch.stack([each.activation[layer] for each in values]).amax(0) for values in of])
        expert = rule(per_dimension)
        source = givers(per_dimension, expert)
        if not general:
            result.append(Fused(expert, source, None))
            continue
        general_score = torch.stack([corpus.scaled[layer] for corpus in general]).amax(0)
        general_rms = torch.stack([corpus.activation[layer] for corpus in general]).amax(0)
        score, kind = fuse(expert, general_score, rule(rms), general_rms, spec.compose.fusion)
        result.append(Fused(score, torch.where(score > expert, len(chosen), source), kind))
    return result
