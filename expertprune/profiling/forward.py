"""The forward pass: every statistic of a corpus that needs no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertprune.arch import Block, Family
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.models.layers import Routed, observed
from expertprune.models.passes import TextRun
from expertprune.profiling.channels import ChannelStatistics
from expertprune.profiling.routing import RoutingStatistics
from expertprune.progress import Progress
from expertprune.units import LayerShape, Segment


class LayerCollector:
    """The statistics of one layer, summed batch by batch."""

    def __init__(self, layer: nn.Module, family: Family, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        self.routed = RoutingStatistics(layer, family, documents, shape) if family.experts else None
        self._weights = _weight_statistics(layer, family, shape)
        self.ffn = ChannelStatistics(documents, shape.ffn if family.has_ffn else 0)
        self.heads = ChannelStatistics(documents, shape.query_heads * shape.head_dim)
        self.head_impact = torch.zeros(documents, shape.query_heads)
        self.group_impact = torch.zeros(documents, shape.kv_heads)
        self.stream = torch.zeros(documents)
        # Gram matrices of the output projection's columns, [kv_heads, group_dim, group_dim]
        columns = layer.get_parameter(family.attention.output_weight).float()
        columns = columns.unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0)
        self._gram = columns @ columns.transpose(1, 2)

    def update(self, batch: Batch, ffn: Tensor, heads: Tensor, stream: Tensor) -> None:
        """Add one batch; padding is left out.

        Args:
            ffn: the input of the FFN's output projection, `[rows, tokens, ffn]`.
            heads: that of the attention's, `[rows, tokens, query_heads * head_dim]`.
            stream: the layer's output, `[rows, tokens, hidden]`.
        """
        shape, weights = self.shape, batch.weights.to(stream.device)
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            weight = weights[row, :length]
            total = weight.sum()
            self.stream[document] = (stream[row, :length].float().square().mean(1) @ weight / total).cpu()
            self.ffn.add(document, ffn[row, :length].float(), weight)
            values = heads[row, :length].float()
            self.heads.add(document, values, weight)
            values = values * weight.sqrt()[:, None]
            grouped = values.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1)  # [kv_heads, tokens, _]
            moment = grouped.transpose(1, 2) @ grouped  # [kv_heads, group_dim, group_dim]
            # mean_t ‖W o_t‖² = ⟨WᵀW, mean_t o_t o_tᵀ⟩: of the whole block for the group, of its
            # diagonal blocks for the heads
            change = moment * self._gram / total
            self.group_impact[document] = change.sum((1, 2)).cpu()
            blocks = change.unflatten(1, (-1, shape.head_dim)).unflatten(3, (-1, shape.head_dim))
            self.head_impact[document] = blocks.sum((2, 4)).diagonal(dim1=1, dim2=2).flatten().cpu()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        return {
            **(self.ffn.tensors(f"ffn.{index}") if self.routed is None else self.routed.tensors(index)),
            **self.heads.tensors(f"heads.{index}"),
            f"heads.{index}.impact": self.head_impact,
            f"groups.{index}.impact": self.group_impact,
            f"stream.{index}.square": self.stream,
            **{name.format(layer=index): tensor for name, tensor in self._weights.items()},
        }


def _blocks(family: Family) -> list[tuple[str, Block]]:
    """The blocks whose output projection is observed, by the names of their statistics."""
    return [("ffn", family.ffn), ("heads", family.attention)] if family.has_ffn else [("heads", family.attention)]


def _weight_statistics(layer: nn.Module, family: Family, shape: LayerShape) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for name, block in _blocks(family):
        weight = layer.get_parameter(block.output_weight).float()
        statistics[f"{name}.{{layer}}.output_l1"] = weight.abs().sum(0).cpu()
        statistics[f"{name}.{{layer}}.output_l2"] = torch.linalg.vector_norm(weight, dim=0).cpu()
    state = dict(layer.named_parameters())
    squares = {segment: torch.zeros(shape.segment_rows(segment)) for segment in Segment}
    for coupled in family.tensors:
        if coupled.name not in state:
            continue
        values = state[coupled.name].float().square()
        rows = values.flatten(1).sum(1) if coupled.axis == 0 and values.dim() > 1 else values
        rows = rows.sum(0) if coupled.axis == 1 else rows
        owned = rows.cpu().split([shape.segment_rows(segment) for segment in coupled.segments])
        for segment, values in zip(coupled.segments, owned, strict=True):
            squares[segment] += values
    queries = squares[Segment.QUERY].unflatten(0, (shape.query_heads, -1)).sum(1)
    keys = squares[Segment.KEY_VALUE].unflatten(0, (shape.kv_heads, -1)).sum(1)
    if family.has_ffn:
        statistics["ffn.{layer}.weight_norm"] = squares[Segment.FFN].sqrt()
    statistics["heads.{layer}.weight_norm"] = queries.sqrt()
    statistics["groups.{layer}.weight_norm"] = (queries.unflatten(0, (shape.kv_heads, -1)).sum(1) + keys).sqrt()
    return statistics


@torch.inference_mode()
def forward_pass(text: TextRun, progress: Progress | None = None) -> dict[str, Tensor]:
    """Every statistic of a corpus that needs no gradient, by stored name (see `Profile`).

    Args:
        text: its batches' `documents` are the rows of the statistics per document.
        progress: called after each layer.

    Raises:
        CheckpointError: the model gives activations that are not finite.
    """
    family, stream = text.family, text.start()
    paths = [block.output for _, block in _blocks(family)]
    if family.experts is not None:
        paths.append(family.experts.module)
    statistics: dict[str, Tensor] = {"tokens": torch.zeros(text.documents)}
    for batch in text.batches:
        for document, predicted in zip(batch.documents, batch.predicted, strict=True):
            statistics["tokens"][document] = predicted
    for index, layer in text.layers(progress):
        collector = LayerCollector(layer, family, text.shapes[index], text.documents)
        with observed(layer, *paths) as calls:
            for step in stream.advance(layer, index):
                heads = calls[family.attention.output].input
                if collector.routed is not None and family.experts is not None:
                    collector.routed.add(step.batch, Routed.of(calls[family.experts.module]))
                ffn = calls[family.ffn.output].input if family.has_ffn else heads[..., :0]
                collector.update(step.batch, ffn, heads, step.after)
        neurons = collector.ffn if collector.routed is None else collector.routed.neurons
        if not bool(neurons.square_sum.isfinite().all() and collector.heads.square_sum.isfinite().all()):
            raise CheckpointError(
                f"layer {index}: activations are not finite in {next(layer.parameters()).dtype}: damaged weights, or "
                "too narrow a base.dtype (float32 and bfloat16 are wide)"
            )
        statistics |= collector.tensors(index)
    return statistics
