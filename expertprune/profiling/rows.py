"""How often each token occurs in a corpus, and how probable the model finds it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array, diags_array
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from expertprune.corpora.batches import Batch
from expertprune.models.passes import TextRun

FOLDS = 8  # groups of documents; what is chosen without one is tested on it
_CLUSTERED = 4096  # documents whose distances from each other are held at a time


class RowMass:
    """Occurrences and probability of every vocabulary row over a corpus (see `Profile`).

    The probability is the model's softmax over all rows, summed over the positions that count: of a
    text all real tokens, the last of each document included; of a conversation those that predict
    an answer's tokens (see `Batch.asked`).
    """

    def __init__(self, text: TextRun) -> None:
        self._counts = _counts(text, text.rows)
        self._fold = folds_of_similar(self._counts)
        self._folds = nn.functional.one_hot(torch.from_numpy(self._fold), FOLDS).float().to(text.device)
        self.mass = torch.zeros(FOLDS, self._counts.shape[1], dtype=torch.float64, device=text.device)

    def add(self, batch: Batch, first: int, chances: Tensor) -> None:
        """Add the softmax of some positions, `[rows, positions, vocabulary]`, of which `first` is the first."""
        placed = batch.on(chances.device)
        of_fold = self._folds.index_select(0, placed.documents)  # [rows, folds]
        asked = placed.asked[:, first : first + chances.shape[1]]
        weights = of_fold.T[:, :, None] * asked
        self.mass += (weights.flatten(1) @ chances.flatten(0, 1)).double()

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place."""
        return {"mass": self.mass}

    def tensors(self) -> dict[str, Tensor]:
        """What is stored.

        `mass` `[folds, rows]`, float32; `fold` `[documents]`; and `document`, `row` and
        `occurrences`, `[entries]`: one entry for each row in each document that has its token.
        """
        entries = self._counts.tocoo()
        return {
            "mass": self.mass.float().cpu(),
            "fold": torch.from_numpy(self._fold),
            "document": torch.from_numpy(entries.row.astype(np.int64)),
            "row": torch.from_numpy(entries.col.astype(np.int64)),
            "occurrences": torch.from_numpy(entries.data),
        }


def _counts(text: TextRun, rows: int) -> csr_array:
    """How often each document has each row's token, `[documents, rows]`, int64."""
    found = [
        (np.full(length, document), ids[:length].cpu().numpy())
        for batch in text.everything
        for document, ids, length in zip(batch.documents, batch.ids, batch.lengths, strict=True)
    ]
    document, row = (np.concatenate(each) for each in zip(*found, strict=True))
    shape = (1 + int(document.max()), rows)
    return csr_array((np.ones(len(row), dtype=np.int64), (document, row)), shape=shape)


def folds_of_similar(counts: csr_array) -> NDArray[np.int64]:
    """The fold of each document, `[documents]`; documents that are alike share one.

    Paragraphs of one article repeat its rare words. If they lay in different folds, each would be
    tested on what its neighbours chose, and text of another article would seem to be covered as well
    as they are. Documents are therefore put in the order of an average linkage by the cosine of
    their inverse document frequencies, and cut into folds of equal size. Documents beyond the first
    4,096 join the one that they are most like.

    Args:
        counts: how often each document has each row's token, `[documents, rows]`.
    """
    present = (counts > 0).astype(np.float64)
    weights = present @ diags_array(np.log(present.shape[0] / np.maximum(1, present.sum(0))))
    norms = np.sqrt(weights.multiply(weights).sum(1))
    weights = csr_array(diags_array(1 / np.maximum(norms, 1e-30)) @ weights)
    first, others = weights[:_CLUSTERED], weights[_CLUSTERED:]
    number = first.shape[0]
    if number == 1:
        return np.zeros(1, dtype=np.int64)
    distance = np.clip(1 - (first @ first.T).toarray(), 0, None)
    np.fill_diagonal(distance, 0)
    fold = np.empty(number, dtype=np.int64)
    fold[leaves_list(linkage(squareform(distance, checks=False), method="average"))] = (
        np.arange(number) * FOLDS // number
    )
    return np.concatenate(
        [fold, fold[[int((first @ other.T).toarray().argmax()) for other in others]].astype(np.int64)]
    )
