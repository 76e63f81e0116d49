"""How much a corpus needs each vocabulary row: how often its token occurs, and how probable the
model finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.corpora.documents import Document
from expertprune.models import layers as layerwise
from expertprune.progress import Progress

PART = "vocabulary"  # of a profile


FOLDS = 8  # groups of documents; what is chosen without one is tested on it


_LOGITS = 2**25  # held at a time


def fold_of(document: Document) -> int:
    """The fold of a document: the same one in every corpus that has the document."""
    return int(document.digest[:8], 16) % FOLDS


@torch.inference_mode()
def vocabulary_pass(
    model: Any, family: Family, batches: Sequence[Batch], folds: Sequence[int], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Occurrences and probability of every vocabulary row over a corpus (see `artifacts.Profile`).

    The probability is the model's softmax over all rows, added up over the positions of real
    tokens, a document's last included. A few positions at a time, so that logits over a large
    vocabulary need no room.

    Args:
        folds: of each document, `[documents]`.
        progress: called after each layer and after each batch of predictions.

    Returns:
        `mass` `[folds, rows]`, float32; `fold` `[documents]`; `document`, `row` and `occurrences`,
        `[entries]`: one entry for each row in each document that has its token.
    """
    stream = layerwise.start(model, family, batches)
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        for number in range(len(batches)):
            stream.hidden[number] = stream.run(layer, index, number)
        if progress is not None:
            progress()
    rows = model.get_output_embeddings().weight.shape[0]
    mass = torch.zeros(FOLDS, rows, dtype=torch.float64)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number, batch in enumerate(batches):
        for document, ids, length in zip(batch.documents, batch.ids, batch.lengths, strict=True):
            found[document] = ids[:length].unique(return_counts=True)
        _add_mass(model, family, batch, stream.hidden[number], mass, [folds[each] for each in batch.documents])
        if progress is not None:
            progress()
    documents = sorted(found)
    return {
        "mass": mass.float(),
        "fold": torch.tensor(folds),
        "document": torch.cat([torch.full_like(found[each][0], each) for each in documents]),
        "row": torch.cat([found[each][0] for each in documents]),
        "occurrences": torch.cat([found[each][1] for each in documents]),
    }


def _add_mass(model: Any, family: Family, batch: Batch, hidden: Tensor, mass: Tensor, folds: Sequence[int]) -> None:
    ids = batch.ids.to(hidden.device)
    step = max(1, _LOGITS // (mass.shape[1] * ids.shape[0]))
    for first in range(0, ids.shape[1], step):
        positions = torch.arange(first, min(first + step, ids.shape[1]), device=ids.device)
        with layerwise.head_only(model, family, hidden):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits.float()
        for row, (length, fold) in enumerate(zip(batch.lengths, folds, strict=True)):
            here = max(0, min(length - first, len(positions)))
            mass[fold] += torch.softmax(logits[row, :here], -1).sum(0).double().cpu()
