"""The base with units masked, in place and back again, and how far that is from its own predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.models import layers as layerwise
from expertprune.units import KeptUnits, LayerShape, Segment

POSITIONS = 512  # whose predictions are compared at a time


@contextlib.contextmanager
def masked(model: Any, family: Family, shapes: Sequence[LayerShape], kept: Sequence[KeptUnits]) -> Iterator[None]:
    """While open, the columns of output projections that dropped units own are zero, so the units write nothing.

    Dropped experts are not chosen by the router.
    """
    stashed: list[tuple[Tensor, Tensor, Tensor]] = []

    def silence(weight: Tensor, kept: Tensor) -> None:
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        columns = gone.nonzero()[:, 0].to(weight.device)
        if columns.numel():
            stashed.append((weight, columns, weight[:, columns].clone()))
            weight[:, columns] = 0

    routers = contextlib.ExitStack()
    try:
        with torch.no_grad():
            for layer, shape, units in zip(layerwise.decoder_layers(model, family), shapes, kept, strict=True):
                if family.experts is not None and len(units.experts) < shape.experts:
                    routers.enter_context(layerwise.routed_to(layer, family.experts, torch.tensor(units.experts)))
                if family.experts is not None and units.shape(shape).ffn < shape.ffn:
                    output = layer.get_parameter(family.experts.output).data
                    for expert in units.experts:
                        silence(output[expert], torch.tensor(units.neurons_of(expert, shape)))
                blocks = [(family.ffn, Segment.FFN)] if family.has_ffn else []
                for block, segment in (*blocks, (family.attention, Segment.QUERY)):
                    silence(layer.get_parameter(block.output_weight).data, units.rows(segment, shape))
        yield
    finally:
        routers.close()
        for weight, columns, values in stashed:
            weight[:, columns] = values


class Divergence:
    """KL divergence of the masked model's predictions from the base's on some text, in bits per token.

    The base's last hidden states are kept, not its predictions, which over a large vocabulary would need gigabytes.
    """

    def __init__(self, model: Any, family: Family, shapes: Sequence[LayerShape], batches: Sequence[Batch]) -> None:
        self.model, self.family, self.shapes, self.batches = model, family, shapes, batches
        self._dense = self._hidden()

    @torch.no_grad()
    def _hidden(self) -> list[Tensor]:
        stream = layerwise.start(self.model, self.family, self.batches)
        for index, layer in enumerate(layerwise.decoder_layers(self.model, self.family)):
            for number in range(len(self.batches)):
                stream.hidden[number] = stream.run(layer, index, number)
        return stream.hidden

    @torch.no_grad()
    def __call__(self, kept: Sequence[KeptUnits]) -> float:
        """With these units kept, and nothing repaired."""
        with masked(self.model, self.family, self.shapes, kept):
            hidden = self._hidden()
        total, count = 0.0, 0
        for batch, dense, mine in zip(self.batches, self._dense, hidden, strict=True):
            ids = batch.ids.to(dense.device)
            step = max(1, POSITIONS // ids.shape[0])
            for first in range(0, ids.shape[1], step):
                positions = torch.arange(first, min(first + step, ids.shape[1]), device=ids.device)
                p, q = (self._predictions(ids, states, positions) for states in (dense, mine))
                each = (p.exp() * (p - q)).sum(-1)
                for row, length in enumerate(batch.lengths):
                    part = each[row, : max(0, min(length - first, len(positions)))]
                    total, count = total + float(part.double().sum()), count + part.numel()
        return total / count / float(torch.log(torch.tensor(2.0)))

    def _predictions(self, ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        with layerwise.head_only(self.model, self.family, hidden):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        return torch.log_softmax(logits.float(), -1)
