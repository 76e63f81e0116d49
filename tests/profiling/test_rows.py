"""What a corpus asks of the vocabulary: against the whole model, one document at a time."""

from __future__ import annotations

import pytest
import torch

from expertprune.arch import family_of
from expertprune.corpora.batches import make_batches
from expertprune.corpora.documents import Document
from expertprune.profiling import rows as predictions
from expertprune.profiling.rows import FOLDS, fold_of, vocabulary_pass
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
    folds = [2, 0, 2, 1, 7, 7, 0, 5, 3][: len(documents)]
    found = vocabulary_pass(model, family_of(family), batches, folds, lambda: steps.append(1))
    mass, entries = torch.zeros(FOLDS, 64, dtype=torch.float64), {}
    for number, ids in enumerate(documents):
        with torch.no_grad():
            mass[folds[number]] += torch.softmax(model(torch.tensor([ids])).logits[0].double(), -1).sum(0)
        entries |= {(number, index): ids.count(index) for index in ids}
    stored = zip(*(found[name].tolist() for name in ("document", "row", "occurrences")), strict=True)
    assert {(document, row): count for document, row, count in stored} == entries
    assert found["fold"].tolist() == folds
    torch.testing.assert_close(found["mass"], mass.float(), rtol=1e-5, atol=1e-6)
    assert float(found["mass"].sum()) == pytest.approx(sum(LENGTHS), rel=1e-5)
    assert len(steps) == 3 + len(batches)


def test_a_document_is_in_the_same_fold_in_every_corpus() -> None:
    folds = [fold_of(Document(f"text {number}")) for number in range(400)]
    assert folds == [fold_of(Document(f"text  {number}")) for number in range(400)]
    assert set(folds) == set(range(FOLDS))
    assert max(map(folds.count, range(FOLDS))) < 2 * 400 / FOLDS
