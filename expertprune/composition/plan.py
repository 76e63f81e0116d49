"""Make a plan from profiles: choose the units that stay by their scores. No model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expertprune.arch.single_layers import PER_LAYER
from expertprune.artifacts.plan import BaseReference, LayerPlan, Parameters, Plan, UnitReasons, VocabularyPlan
from expertprune.artifacts.profile import Profile
from expertprune.composition.depth import choose_layers, foreseen_layers
from expertprune.composition.parameters import removed_parameters, removed_with_rows
from expertprune.composition.ranking import FusedScores, global_widths
from expertprune.composition.reasons import reasons
from expertprune.composition.rows import choose_rows
from expertprune.composition.scoring import Fused, check_scored, score_units
from expertprune.composition.uniform import uniform_widths
from expertprune.composition.widths import (
    FIELDS,
    GONE_WIDTHS,
    LayerWidths,
    check_structures,
    legal_widths,
    narrowed,
    own_widths,
    summary,
)
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.errors import PlanError, SpecError
from expertprune.models.base import ResolvedBase
from expertprune.models.depth import check_kinds
from expertprune.spec.schema import Budget, Spec
from expertprune.units import GONE, KeptUnits, LayerShape, Structure


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; among equals the lower index stays,
    `[count]`.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def select_layer(shape: LayerShape, widths: LayerWidths, scores: Mapping[Structure, Fused]) -> KeptUnits:
    """Keep the highest-scoring units of one layer.

    Groups first, then the same number of heads in each kept group; routed experts first, then as
    many neurons in each kept one.
    """
    if widths.gone:
        return GONE
    everything = shape.all_kept
    experts = everything.experts
    if widths.experts < shape.experts:
        experts = _experts(shape, widths.experts, scores[Structure.EXPERTS].score)
    ffn, groups, heads = everything.ffn, everything.kv_groups, everything.query_heads
    if shape.experts:
        ffn = _neurons(shape, widths, scores, experts)
    elif widths.ffn < shape.ffn:
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
    return KeptUnits(ffn, heads, groups, experts)


def _experts(shape: LayerShape, count: int, score: Tensor) -> tuple[int, ...]:
    """The routed experts that a layer keeps: the highest-scoring ones, as many of each group."""
    per_group, groups = shape.experts_per_group, shape.expert_groups
    return tuple(
        group * per_group + int(expert)
        for group, own in enumerate(score.split(per_group))
        for expert in keep_largest(own, count // groups)
    )


def _neurons(
    shape: LayerShape, widths: LayerWidths, scores: Mapping[Structure, Fused], experts: Sequence[int]
) -> tuple[int, ...]:
    """The neurons that kept experts keep, each its own highest-scoring ones."""
    if widths.ffn == shape.ffn:
        return tuple(unit for unit in range(shape.neurons) if unit // shape.ffn in experts)
    score = scores[Structure.FFN].score.unflatten(0, (shape.experts, -1))
    return tuple(
        expert * shape.ffn + int(neuron) for expert in experts for neuron in keep_largest(score[expert], widths.ffn)
    )


def explain(kept: KeptUnits, scores: Mapping[Structure, Fused], dimensions: list[str]) -> dict[str, UnitReasons]:
    """Why a layer keeps what it keeps, by structure that was scored."""
    return {structure.value: reasons(kept.of(structure), fused, dimensions) for structure, fused in scores.items()}


def foreseen_widths(spec: Spec, base: ResolvedBase) -> Sequence[LayerWidths] | None:
    """The widths that the budget comes to, as far as they are known without profiles.

    Where layers get different widths, their sum is right (but for the mix of structures), and each
    one alone need not be. `None` for a retention floor.

    Args:
        spec: with what it leaves open decided (see `defaults.resolved`).

    Raises:
        PlanError: the budget is not reachable, or the family has no layers of different widths.
    """
    check_structures(spec.budget, base)
    tried = [] if spec.budget.retention is None else _tried(spec, base)
    check_scored(spec.relevance, [*_competing(spec, base)[0], *tried], base.family.has_ffn)
    if spec.budget.retention is None:
        return _reached(spec, base)
    first, *narrower = widths_to_try(spec, base)
    if not narrower and list(first) == own_widths(base, ()):
        raise PlanError("budget.retention: there is no smaller width to try; lower budget.multiple_of or budget.floor")
    return None


def widths_to_try(spec: Spec, base: ResolvedBase) -> list[Sequence[LayerWidths]]:
    """What all layers keep under a retention floor, from the widest cut to the narrowest.

    First, what the cut of heads leaves, as far as it is known without profiles. Then each layer goes down its own
    legal FFN widths, one at a time, and behind them its numbers of KV groups, if these compete for the budget.

    Raises:
        PlanError: the heads cannot go, or the family has no layers of different widths.
    """
    budget, tried = spec.budget, [_reached(spec, base)]
    for structure in _tried(spec, base):
        before = tried[-1]
        legal = [legal_widths(base, budget, layer, structure) for layer in range(len(base.layers))]
        for step in range(1, max(map(len, legal))):
            own = [each[min(step, len(each) - 1)] for each in legal]
            tried.append(
                [
                    narrowed(base, budget, layer, present, structure, width) or present
                    for layer, (present, width) in enumerate(zip(before, own, strict=True))
                ]
            )
    return tried


def _tried(spec: Spec, base: ResolvedBase) -> list[Structure]:
    """The structures whose widths a retention floor tries."""
    budget = spec.budget.model_copy(update={"retention": None, "parameters": 0.5})  # of any size
    together = _competing(spec.model_copy(update={"budget": budget}), base)[1]
    groups = together and Structure.KV_GROUPS in base.family.structures
    return [Structure.FFN, *([Structure.KV_GROUPS] if groups else [])]


def _reached(spec: Spec, base: ResolvedBase) -> Sequence[LayerWidths]:
    """The widths that a budget comes to where all units are alike; a retention floor itself cuts nothing."""
    gone, uniform = foreseen_layers(spec.budget, base), spec.compose.allocation == "uniform"
    if not uniform or PER_LAYER in base.checkpoint.config:
        base.family.check_single_layers(base.checkpoint.config, spec.serve_with)
    if uniform:
        return uniform_widths(spec.budget, base, gone)
    try:
        return global_widths(spec.budget, base, _flat_scores(base), gone)
    except PlanError:  # where KV groups go from few layers, these may have no query heads to lose, and others enough
        with contextlib.suppress(PlanError):
            return global_widths(spec.budget, base, _flat_scores(base, heads_in_turn=True), gone)
        raise


def _flat_scores(base: ResolvedBase, heads_in_turn: bool = False) -> FusedScores:
    """All units alike: enough to ask which widths can be reached.

    Args:
        heads_in_turn: all layers lose heads and KV groups by turns, in place of one layer after the other.
    """

    def scores(structure: Structure, units: int) -> Tensor:
        in_turn = heads_in_turn and structure in (Structure.KV_GROUPS, Structure.QUERY_HEADS)
        return torch.arange(units, dtype=torch.float32) if in_turn else torch.zeros(units)

    return {
        structure: [
            Fused(scores(structure, units), torch.zeros(units), None)
            for units in (shape.units(structure) for shape in base.layers)
        ]
        for structure in Structure
    }


def _competing(spec: Spec, base: ResolvedBase) -> tuple[list[Structure], bool]:
    """The structures to score, and whether they compete for one budget."""
    budget, uniform = spec.budget, spec.compose.allocation == "uniform"
    named = [structure for structure in Structure if getattr(budget, structure.value)]
    if not budget.overall:
        return named, False
    if not base.family.has_ffn:  # whole routed experts make up what is wanted, or neurons where those are named
        return [*named, Structure.FFN if budget.experts else Structure.EXPERTS], False
    if uniform or budget.kv_groups:
        return [*named, Structure.FFN], False
    return [*named, Structure.FFN, Structure.KV_GROUPS], True


def _narrower(widths: Sequence[LayerWidths], base: ResolvedBase) -> list[Structure]:
    """The structures of which such layers choose units."""
    own = own_widths(base, ())
    fields = {**FIELDS, Structure.EXPERTS: "experts"}
    pairs = list(zip(widths, own, strict=False))
    return [each for each, field in fields.items() if any(getattr(a, field) < getattr(b, field) for a, b in pairs)]


def _by_layer(
    base: ResolvedBase, widths: Sequence[LayerWidths], scores: FusedScores
) -> list[tuple[LayerShape, LayerWidths, dict[Structure, Fused]]]:
    return [
        (shape, layer, {structure: fused[index] for structure, fused in scores.items()})
        for index, (shape, layer) in enumerate(zip(base.layers, widths, strict=True))
    ]


def widths_of(plan: Plan, base: ResolvedBase) -> list[LayerWidths]:
    """What each layer of the base keeps by a plan, which may have been edited."""
    return [
        GONE_WIDTHS if units.gone else LayerWidths.own(units.shape(shape))
        for shape, units in zip(base.layers, plan.kept, strict=True)
    ]


def as_kept(plan: Plan, base: ResolvedBase, budget: Budget) -> Plan:
    """The plan with the sizes of the units that it keeps, which may have been edited."""
    widths = widths_of(plan, base)
    before, rows = base.checkpoint.parameters, plan.vocabulary.rows.rows if plan.vocabulary else None
    parameters = Parameters(
        before=before, after=before - removed_parameters(base, widths) - removed_with_rows(base, rows)
    )
    counted = summary(budget, base.layers, widths)
    if parameters == plan.parameters and all(
        name in plan.budget and plan.budget[name].kept == entry.kept for name, entry in counted.items()
    ):
        return plan
    return replace(plan, parameters=parameters, budget=counted)


def check_kept(plan: Plan, base: ResolvedBase, loaders: Collection[str]) -> None:
    """Raises `PlanError` where layers that stay would not be what they were, or one of `loaders` does not read them.

    A plan may have been edited: what chose its units is not asked again.
    """
    if plan.gone:
        check_kinds(base.checkpoint, base.family, base.layers, plan.gone, base.trust_remote_code)
    if PER_LAYER in base.family.pruned_config(base.checkpoint.config, plan.kept):
        base.family.check_single_layers(base.checkpoint.config, loaders)


@dataclass(frozen=True)
class Scored:
    """What plans of the same profiles share, where their specs differ in sizes alone; `compose` fills it."""

    scores: dict[tuple[tuple[Structure, ...], bool], FusedScores] = field(default_factory=dict)
    rows: dict[Any, VocabularyPlan] = field(default_factory=dict)


def compose(
    spec: Spec,
    base: ResolvedBase,
    profiles: Mapping[CorpusName, Profile],
    budget: Budget | None = None,
    known: Scored | None = None,
    widths: Sequence[LayerWidths] | None = None,
) -> Plan:
    """Decide which units are kept.

    Args:
        spec: with what it leaves open decided (see `defaults.resolved`), and its budget checked (see
            `foreseen_widths`). The plan records it.
        profiles: one for each corpus that the spec names.
        budget: what decides in place of the spec's budget, where that is a retention floor.
        known: of earlier plans of these profiles.
        widths: what layers keep in place of what the budget comes to.

    Raises:
        SpecError: a corpus without a profile, or without the pass that the criterion needs.
        PlanError: the budget cannot be met, or the family's config cannot say the widths.
    """
    recorded = spec
    spec = spec if budget is None else spec.model_copy(update={"budget": budget})
    if missing := [str(name) for name in corpus_names(spec) if name not in profiles]:
        raise SpecError(f"no profile for {', '.join(missing)}: run the profile stage first")
    wanted = {name: profiles[name] for name in corpus_names(spec)}
    known = known if known is not None else Scored()
    rows, vocabulary = spec.budget.vocabulary, None
    if rows is not None:
        if rows not in known.rows:
            known.rows[rows] = choose_rows(spec, base, wanted)
        vocabulary = known.rows[rows]
    structures, together = _competing(spec, base)
    structures += [each for each in _narrower(widths or (), base) if each not in structures]
    asked = tuple(structures), together
    if asked not in known.scores:
        known.scores[asked] = score_units(spec, wanted, structures, together)
    scores = known.scores[asked]
    uniform = spec.compose.allocation == "uniform"
    gone, depth = choose_layers(spec, base, wanted)
    if widths is None:
        widths = uniform_widths(spec.budget, base, gone) if uniform else global_widths(spec.budget, base, scores, gone)
    layers = []
    for shape, layer, here in _by_layer(base, widths, scores):
        kept = select_layer(shape, layer, here)
        cut = {structure: fused for structure, fused in here.items() if layer.of(structure) < shape.units(structure)}
        cut = {} if layer.gone else cut
        layers.append(LayerPlan(kept, explain(kept, cut, list(spec.dimensions.chosen))))
    before = base.checkpoint.parameters
    removed = removed_parameters(base, widths) + removed_with_rows(base, vocabulary.rows.rows if vocabulary else None)
    return Plan(
        name=spec.name,
        base=BaseReference(model=base.name, digest=base.digest),
        spec=recorded.document(),
        profiles={str(name): profile.digest for name, profile in wanted.items()},
        shapes=list(base.layers),
        layers=layers,
        budget=summary(spec.budget, base.layers, widths),
        parameters=Parameters(before=before, after=before - removed),
        vocabulary=vocabulary,
        depth=depth,
    )
