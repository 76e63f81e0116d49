"""What a corpus asks of the vocabulary: against the whole model, one document at a time."""

from __future__ import annotations

import pytest
import torch

from expertprune.arch import family_of
from expertprune.corpora.batches import make_batches
from expertprune.profiling import rows as predictions
from expertprune.profiling.rows import vocabulary_pass
from tests.masks import LENGTHS, token_lists
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tokens_per_batch", [1, 16, 1000])
@pytest.mark.parametrize("logits", [1, 64 * 7, 2**25])
def test_counts_and_mass_are_the_models_own(
    family: str, tokens_per_batch: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However documents are cut into batches and positions into steps, padding left out."""
    monkeypatch.setattr(predictions, "_LOGITS", logits)
    model, documents = (
        tiny_model(family, final_logit_softcapping=3.0) if "gemma" in family else tiny_model(family),
        token_lists(),
    )
    steps: list[int] = []
    batches = make_batches(documents, tokens_per_batch)
    found = vocabulary_pass(model, family_of(family), batches, lambda: steps.append(1))
    count, mass = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64)
    for ids in documents:
        with torch.no_grad():
            mass += torch.softmax(model(torch.tensor([ids])).logits[0].double(), -1).sum(0)
        for index in ids:
            count[index] += 1
    assert torch.equal(found["count"], count)
    torch.testing.assert_close(found["mass"], (mass / sum(LENGTHS)).float(), rtol=1e-5, atol=1e-8)
    assert float(found["mass"].sum()) == pytest.approx(1, rel=1e-5)
    assert len(steps) == 3 + len(batches)
