"""Conversations in the repair: tokens that are no answer's weigh as the spec says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertprune.corpora.batches import Tokens, make_batches
from expertprune.models.base import resolve_base
from expertprune.pruning.solve import Moments
from expertprune.spec.schema import Base
from tests.masks import assert_near
from tests.patching import everywhere
from tests.pruning.test_repair import CUTS, random_documents, random_plan, repaired_weights


def test_least_squares_weigh_tokens(tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of the first projection, before anything is repaired, are linear in the weight."""
    base = resolve_base(Base(model=str(tiny_llama)), store)
    kept, documents = random_plan(base, seed=4, **CUTS["both"]).kept, random_documents()
    seen: list[Moments] = []

    def noted(moments: Moments, ridge: float) -> torch.Tensor:
        seen.append(Moments(moments.gram.clone(), moments.cross.clone(), moments.weights.clone()))
        return solve(moments, ridge)

    solve = everywhere(monkeypatch, "expertprune.pruning.solve.least_squares", noted)

    def first(weight: float, masked: bool = True) -> Moments:
        seen.clear()
        answers = [tuple(place % 3 == 1 for place in range(len(ids))) if masked else None for ids in documents]
        tokens = [Tokens(tuple(ids), own) for ids, own in zip(documents, answers, strict=True)]
        repaired_weights(base, kept, make_batches(tokens, 60, prompt_weight=weight))
        return seen[0]

    none, part, whole, plain = first(0.0), first(0.25), first(1.0), first(1.0, masked=False)
    for name in ("gram", "cross"):
        at_none, at_part, at_whole, at_plain = (getattr(each, name) for each in (none, part, whole, plain))
        assert_near(at_part, 0.75 * at_none + 0.25 * at_whole, 1e-4, name)
        assert_near(at_whole, at_plain, 1e-4, name)
    assert float(none.gram.trace()) < 0.5 * float(whole.gram.trace())
