"""What a corpus asks of the vocabulary: against the whole model, one document at a time."""

from __future__ import annotations

import pytest
import torch

from expertprune.models import passes
from expertprune.profiling.rows import vocabulary_pass
from tests.masks import LENGTHS, tiny, token_lists


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("tokens_per_batch", "logits"), [(1, 2**25), (16, 1), (1000, 64 * 7), (1000, 2**25)])
def test_counts_and_mass_are_the_models_own(
    family: str, tokens_per_batch: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However documents are cut into batches and positions into steps, padding left out."""
    monkeypatch.setattr(passes, "LOGITS", logits)
    of, documents = tiny(family, **({"final_logit_softcapping": 3.0} if "gemma" in family else {})), token_lists()
    steps: list[int] = []
    text = of.text(documents, tokens_per_batch)
    found = vocabulary_pass(text, lambda: steps.append(1))
    count, mass = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64)
    for ids in documents:
        with torch.no_grad():
            mass += torch.softmax(of.model(torch.tensor([ids])).logits[0].double(), -1).sum(0)
        for index in ids:
            count[index] += 1
    assert torch.equal(found["count"], count)
    torch.testing.assert_close(found["mass"], (mass / sum(LENGTHS)).float(), rtol=1e-5, atol=1e-8)
    assert float(found["mass"].sum()) == pytest.approx(1, rel=1e-5)
    assert len(steps) == 3 + len(text.batches)
