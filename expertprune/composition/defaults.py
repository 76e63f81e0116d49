"""Decide what a spec leaves open: values of `auto`, and keys that only some families have."""

from __future__ import annotations

import contextlib

from expertprune.arch import Family, gguf_names
from expertprune.composition.widths import check_own_widths
from expertprune.errors import PlanError, SpecError
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Spec
from expertprune.units import Structure

AUTO = "auto"


def resolved(spec: Spec, base: ResolvedBase) -> Spec:
    """The spec with what it leaves open decided for a base; what it says itself stays, and a second
    time changes nothing.

    `relevance.criterion`: fisher, or reap where nothing but whole routed experts is cut.
    `relevance.experts`: reap where the criterion was left open, else the same as the criterion;
    `None` where there are none. `compose.allocation`: global where all of `serve_with` read layers
    of different widths of the family, else uniform.

    Raises:
        SpecError: a criterion of routed experts for a base that has none, or a format or an engine that cannot
            take the expert.
    """
    relevance, compose, routed = spec.relevance, spec.compose, not base.family.has_ffn
    if relevance.experts is not None and not routed:
        raise SpecError(
            f"relevance.experts: layers of family {base.family.family!r} have no routed experts; leave this key out"
        )
    if "gguf" in spec.serve_with:
        _check_gguf(spec, base.family)
    if "vllm" in spec.serve_with and spec.budget.vocabulary is not None and base.family.why_no_vocabulary_in_vllm:
        raise SpecError(
            f"budget.vocabulary: vLLM serves no cut vocabulary of family {base.family.family!r}: "
            f"{base.family.why_no_vocabulary_in_vllm}; leave vocabulary out, or vllm out of serve_with"
        )
    open_, criterion, experts = relevance.criterion == AUTO, relevance.criterion, relevance.experts
    if open_:
        criterion = "reap" if routed and _only_experts(spec) else "fisher"
    if routed and experts is None:
        experts = "reap" if open_ else criterion
    allocation = compose.allocation
    if allocation == AUTO:
        allocation = "uniform"
        with contextlib.suppress(PlanError):
            base.family.check_single_layers(base.checkpoint.config, spec.serve_with)
            check_own_widths(spec.budget, base)
            allocation = "global"
    return spec.model_copy(
        update={
            "relevance": relevance.model_copy(update={"criterion": criterion, "experts": experts}),
            "compose": compose.model_copy(update={"allocation": allocation}),
        }
    )


def _check_gguf(spec: Spec, family: Family) -> None:
    """Raises `SpecError` where no expert of the family can be written as GGUF, or none with fewer heads."""
    form = family.gguf
    if form is None:
        raise SpecError(f"serve_with: models of family {family.family!r} cannot be written as GGUF; leave gguf out")
    heads = next((key for key in ("kv_groups", "query_heads") if getattr(spec.budget, key)), None)
    if heads is not None and form.heads_fill_hidden:
        raise SpecError(
            f"budget.{heads}: {gguf_names().engine} reads no model of family {family.family!r} whose query heads are "
            f"together narrower than the hidden size; leave {heads} out, or gguf out of serve_with"
        )


def _only_experts(spec: Spec) -> bool:
    """Whether a budget cuts no other units of layers than whole routed experts."""
    budget = spec.budget
    others = [structure for structure in Structure if structure is not Structure.EXPERTS]
    return not any(getattr(budget, each.value) for each in others) and not (budget.overall and budget.experts)
