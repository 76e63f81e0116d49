"""How often each token occurs in a corpus, and how probable the model finds it."""

from __future__ import annotations

import torch
from torch import Tensor

from expertprune.models.passes import TextRun, real_tokens
from expertprune.progress import Progress


@torch.inference_mode()
def vocabulary_pass(text: TextRun, progress: Progress | None = None) -> dict[str, Tensor]:
    """Occurrences and mean probability of every vocabulary row over a corpus (see `Profile`).

    The probability is the model's softmax over all rows, averaged over the positions of all real
    tokens, the last of each document included.

    Args:
        progress: called after each layer and after each batch of predictions.

    Returns:
        `count`, int64, and `mass`, float32, both `[rows]`.
    """
    stream = text.finish(progress)
    rows = text.model.get_output_embeddings().weight.shape[0]
    count = torch.zeros(rows, dtype=torch.int64)
    mass = torch.zeros(rows, dtype=torch.float64)
    for batch, hidden in zip(text.batches, stream.hidden, strict=True):
        count += torch.bincount(real_tokens(batch, batch.ids[..., None])[:, 0], minlength=rows)
        for first, logits in text.logits(batch, hidden):
            for row, length in enumerate(batch.lengths):
                real = logits[row, : max(0, length - first)]
                mass += torch.softmax(real, -1).sum(0).double().cpu()
        if progress is not None:
            progress()
    return {"count": count, "mass": (mass / int(count.sum())).float()}
