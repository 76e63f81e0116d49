"""What a corpus asks of the vocabulary: against the whole model, one document at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from expertprune.models import passes
from expertprune.profiling import rows as predictions
from expertprune.profiling.rows import FOLDS, folds_of_similar
from tests.masks import LENGTHS, measured, tiny, token_lists


@pytest.mark.parametrize(
    ("family", "tokens_per_batch", "logits"),
    [("llama", 1, 2**25), ("gemma3_text", 16, 1), ("llama", 1000, 64 * 7)],
)
def test_counts_and_mass_are_the_models_own(
    family: str, tokens_per_batch: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However documents are cut into batches and positions into steps, padding left out."""
    monkeypatch.setattr(passes, "LOGITS", logits)
    of, documents = tiny(family, **({"final_logit_softcapping": 3.0} if "gemma" in family else {})), token_lists()
    steps: list[int] = []
    text = of.text(documents, tokens_per_batch)
    found = measured(text, "vocabulary", progress=lambda: steps.append(1))
    mass, entries = torch.zeros(FOLDS, 64, dtype=torch.float64), {}
    folds = found["fold"].tolist()
    assert sorted(folds) == [0, 1, 2, 4, 5, 6]  # six documents over eight folds
    for number, ids in enumerate(documents):
        with torch.no_grad():
            mass[folds[number]] += torch.softmax(of.model(torch.tensor([ids])).logits[0].double(), -1).sum(0)
        entries |= {(number, index): ids.count(index) for index in ids}
    stored = zip(*(found[name].tolist() for name in ("document", "row", "occurrences")), strict=True)
    assert {(document, row): count for document, row, count in stored} == entries
    torch.testing.assert_close(found["mass"], mass.float(), rtol=1e-5, atol=1e-6)
    assert float(found["mass"].sum()) == pytest.approx(sum(LENGTHS), rel=1e-5)
    assert len(steps) == 3 + len(text.batches)


def articles(seed: int) -> csr_array:
    """Sixteen articles of four paragraphs each, in a random order: common words, and a few of each article's own."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((64, 400), dtype=np.int64)
    for paragraph in range(64):
        words = [*generator.integers(0, 80, 30), *(80 + 20 * (paragraph // 4) + generator.integers(0, 20, 15))]
        np.add.at(counts[paragraph], words, 1)
    return csr_array(counts[generator.permutation(64)])


@pytest.mark.parametrize(("clustered", "least"), [(4096, 13), (48, 8)])
def test_paragraphs_of_an_article_share_a_fold(clustered: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folds_of_similar(csr_array(np.ones((1, 5), dtype=np.int64))).tolist() == [0]
    monkeypatch.setattr(predictions, "_CLUSTERED", clustered)
    for seed in range(3):
        counts = articles(seed)
        fold = folds_of_similar(counts)
        own = (counts.toarray()[:, 80:].reshape(64, 16, 20).sum(2)).argmax(1)  # the article of each paragraph
        together = sum(len(set(fold[own == article].tolist())) == 1 for article in range(16))
        assert together >= least, "few articles lie on the border of two folds"
        assert set(fold.tolist()) == set(range(FOLDS))
