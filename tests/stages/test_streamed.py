"""A base whose layers are read one at a time gives the same expert and the same evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.errors import UsageError
from expertprune.models.sources import is_streamed
from expertprune.spec.reading import parse_spec
from expertprune.stages import evaluate as evaluating
from tests.oracle import stored_tensors


def test_an_expert_of_a_streamed_base_is_the_same(
    tmp_path: Path, spec_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec_data["budget"] |= {"kv_groups": 1}
    spec = parse_spec(spec_data, "spec", tmp_path)
    resident, streamed = (
        expertprune.build(spec, tmp_path / layers, {"base.layers": layers}, store=tmp_path / f"{layers}-store")
        for layers in ("resident", "streamed")
    )
    one, other = stored_tensors(resident), stored_tensors(streamed)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    found = Expert.load(streamed).evaluation
    assert found is not None
    assert found == Expert.load(resident).evaluation

    ran: list[Any] = []
    against = evaluating.Measuring.against
    monkeypatch.setattr(evaluating.Measuring, "against", lambda measuring, expert, *rest: (
        ran.extend((measuring.base.model, expert.model)), against(measuring, expert, *rest))[1])  # fmt: skip
    again = expertprune.evaluate(streamed, store=tmp_path / "streamed-store")
    assert [is_streamed(model) for model in ran] == [True, True], "neither model is whole in memory"
    assert again.corpora.keys() == found.corpora.keys()
    for name, corpus in again.corpora.items():
        for mine, theirs in zip(corpus.per_document, found.corpora[name].per_document, strict=True):
            assert (mine.base_bits, mine.expert_bits) == pytest.approx((theirs.base_bits, theirs.expert_bits), rel=1e-6)
    with pytest.raises(UsageError, match=r"layers are streamed \(base\.layers\): give --backend vllm"):
        expertprune.evaluate_suites(streamed, tasks=["piqa"], store=tmp_path / "streamed-store")
