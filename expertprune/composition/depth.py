"""Which whole decoder layers go: the first decision, before any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from expertprune.artifacts.plan import DepthReasons
from expertprune.artifacts.profile import Profile
from expertprune.composition.reasons import reasons
from expertprune.composition.scoring import CorpusScores, Fused, fused, over_documents, percentile, standard
from expertprune.composition.widths import least, removal, rounded_down, said
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.depth import check_kinds
from expertprune.spec.schema import Budget, Spec
from expertprune.units import GONE


def choose_layers(
    spec: Spec, base: ResolvedBase, profiles: Mapping[CorpusName, Profile]
) -> tuple[tuple[int, ...], DepthReasons | None]:
    """The layers that go, ascending, and why: those of the least fused influence.

    Raises:
        PlanError: so many cannot go, or the layers that stay would not be what they are.
    """
    count = layers_to_go(spec.budget, base)
    if not count:
        return (), None
    scores = layer_scores(spec, profiles)
    gone = _least_relevant(scores.score, count, base)
    check_kinds(base.checkpoint, base.family, base.layers, gone, base.trust_remote_code)
    staying = [layer for layer in range(len(base.layers)) if layer not in gone]
    names = [*spec.dimensions.chosen, "general"]
    why = DepthReasons(
        relevance=scores.score.tolist(),
        source=[names[index] for index in scores.source.tolist()],
        why=reasons(staying, scores, list(spec.dimensions.chosen)),
    )
    return gone, why


def foreseen_layers(budget: Budget, base: ResolvedBase) -> tuple[int, ...]:
    """Some layers that may go, as many as the budget says; for errors see `choose_layers`."""
    count = layers_to_go(budget, base)
    return _least_relevant(-torch.arange(len(base.layers)), count, base) if count else ()


def layers_to_go(budget: Budget, base: ResolvedBase) -> int:
    """How many whole layers go: a count, or the whole number nearest to a fraction.

    Raises:
        PlanError: a fraction below half a layer, or fewer layers would stay than `budget.floor` allows.
    """
    of = len(base.layers)
    removed = removal(budget.layers, of, "layers")
    if not removed:
        return 0
    count, largest = removed if isinstance(removed, int) else round(removed * of), of - max(1, least(of, budget.floor))
    if not count:
        raise PlanError(
            f"budget.layers: {said(budget.layers)} of {of} layers is less than half a layer and removes nothing; the "
            f"smallest legal one is {1 / of:.4g}"
        )
    if count > largest:
        raise PlanError(
            f"budget.layers: at most {largest} of {of} layers can be removed ({rounded_down(largest / of)}; "
            f"budget.floor is {budget.floor:g})"
        )
    return count


def layer_scores(spec: Spec, profiles: Mapping[CorpusName, Profile]) -> Fused:
    """The fused influence of every layer, `[layers]`: composed as other units are, and fused by weight.

    The influence of a layer on a corpus is that on its documents, aggregated. A layer has no
    activation beside its influence, so none is exclusive.
    """
    found = {name: _of_corpus(profile, spec) for name, profile in profiles.items()}
    fusion = spec.compose.fusion.model_copy(update={"method": "weighted"})
    weighted = spec.model_copy(update={"compose": spec.compose.model_copy(update={"fusion": fusion})})
    (result,) = fused(found, weighted)
    return result


def _of_corpus(profile: Profile, spec: Spec) -> CorpusScores:
    by_document = torch.stack([profile.read(f"stream.{layer}.influence") for layer in range(len(profile.layers))], 1)
    influence = over_documents(by_document, spec.compose.aggregate).double()
    total = influence.sum().clamp_min(1e-30)
    scale = {"share": lambda each: each / total, "percentile": percentile, "standard": standard}[spec.compose.scale]
    return CorpusScores([scale(influence)], [torch.ones_like(influence)])


def _least_relevant(scores: Tensor, count: int, base: ResolvedBase) -> tuple[int, ...]:
    """The layers of the smallest scores, ascending; never the first one, which no layer before could replace.

    A layer that the config cannot do without, such as the only one of its kind, is passed over.
    """
    gone: list[int] = []
    problem = "the first layer stays"
    for layer in (scores[1:].argsort(stable=True) + 1).tolist():
        if len(gone) == count:
            break
        try:
            _check_sayable(base, [*gone, layer])
        except PlanError as error:
            problem = str(error)
        else:
            gone.append(layer)
    if len(gone) < count:
        raise PlanError(f"budget.layers: only {len(gone)} of {len(base.layers)} layers can be removed: {problem}")
    return tuple(sorted(gone))


def _check_sayable(base: ResolvedBase, gone: Sequence[int]) -> None:
    """Raises `PlanError` where the base's config cannot say that these layers go."""
    kept = [GONE if layer in gone else shape.all_kept for layer, shape in enumerate(base.layers)]
    base.family.pruned_config(base.checkpoint.config, kept)
