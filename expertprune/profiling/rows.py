"""How much a corpus needs each vocabulary row: how often its token occurs, and how probable the model finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.models import layers as layerwise
from expertprune.progress import Progress

PART = "vocabulary"  # of a profile


_LOGITS = 2**25  # held at a time


@torch.inference_mode()
def vocabulary_pass(
    model: Any, family: Family, batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Occurrences and mean probability of every vocabulary row over a corpus (see `artifacts.Profile`).

    The probability is the model's softmax over all rows, averaged over the positions of real tokens, a document's last
    included. A few positions at a time, so that logits over a large vocabulary need no room.

    Args:
        progress: called after each layer and after each batch of predictions.

    Returns:
        `count`, int64, and `mass`, float32, both `[rows]`.
    """
    stream = layerwise.start(model, family, batches)
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        for number in range(len(batches)):
            stream.hidden[number] = stream.run(layer, index, number)
        if progress is not None:
            progress()
    rows = model.get_output_embeddings().weight.shape[0]
    count = torch.zeros(rows, dtype=torch.int64)
    mass = torch.zeros(rows, dtype=torch.float64)
    for number, batch in enumerate(batches):
        ids = stream.real(number, batch.ids[..., None])[:, 0]
        count += torch.bincount(ids, minlength=rows)
        _add_mass(model, family, batch, stream.hidden[number], mass)
        if progress is not None:
            progress()
    return {"count": count, "mass": (mass / int(count.sum())).float()}


def _add_mass(model: Any, family: Family, batch: Batch, hidden: Tensor, mass: Tensor) -> None:
    ids = batch.ids.to(hidden.device)
    step = max(1, _LOGITS // (mass.numel() * ids.shape[0]))
    for first in range(0, ids.shape[1], step):
        positions = torch.arange(first, min(first + step, ids.shape[1]), device=ids.device)
        with layerwise.head_only(model, family, hidden):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits.float()
        for row, length in enumerate(batch.lengths):
            here = max(0, min(length - first, len(positions)))
            mass += torch.softmax(logits[row, :here], -1).sum(0).double().cpu()
