"""Random plans layer by layer, and cut models held against the base with the dropped units masked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expertprune.artifacts.plan import LayerPlan, Plan
from expertprune.models.base import ResolvedBase
from expertprune.units import GONE
from tests.oracle import assert_same, exact, generated, logits_of, masked, plan_of, pruned, random_units, resolved
from tests.tiny import save_tiny


def tiny_base(root: Path, family: str = "llama", **changes: Any) -> ResolvedBase:
    """A tiny model in `root / "base"`, resolved."""
    return resolved(save_tiny(root / "base", family, **changes), root / "store")


def plan_by_layer(base: ResolvedBase, widths: Sequence[Mapping[str, int] | None], seed: int = 3) -> Plan:
    """A plan of random units, of each layer so many; `None`: the layer goes."""
    generator = torch.Generator().manual_seed(seed)
    layers = zip(base.layers, widths, strict=True)
    return plan_of(base, [GONE if kept is None else random_units(shape, generator, **kept) for shape, kept in layers])


def without(base: ResolvedBase, gone: Sequence[int], seed: int = 3, **widths: int) -> Plan:
    """A plan that drops these layers, and keeps so many random units of all others."""
    return plan_by_layer(base, [None if layer in gone else widths for layer in range(len(base.layers))], seed)


@contextlib.contextmanager
def as_planned(model: Any, plan: Plan) -> Iterator[None]:
    """While open, layers of the base that the plan drops hand on what they get, and the others are masked."""
    whole = [shape.all_kept if units.gone else units for shape, units in zip(plan.shapes, plan.kept, strict=True)]
    layers = [model.model.layers[layer] for layer in plan.gone]
    handles = [layer.register_forward_hook(lambda _, given, __: given[0]) for layer in layers]
    try:
        with masked(model, replace(plan, layers=[LayerPlan(units) for units in whole])):
            yield
    finally:
        for handle in handles:
            handle.remove()


def assert_as_planned(expert: Any, model: Any, plan: Plan) -> None:
    """The expert computes, and generates through the cache, what the base does with the dropped units masked."""
    own, found = logits_of(model), logits_of(expert)
    with as_planned(model, plan):
        assert_same(found, logits_of(model))
        assert torch.equal(generated(expert), generated(model))
    assert (found - own).abs().max() > 0.1, "the plan must cut something that matters"


def assert_cut_as_planned(plan: Plan, base: ResolvedBase, folder: Path) -> Path:
    """Cut the base into `folder`, and compare in plain transformers."""
    assert_as_planned(exact(pruned(plan, base, folder)), exact(base.folder), plan)
    return folder
