"""Every statistic of a layer that needs no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertprune.arch import Block, Family
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.models.passes import TextRun
from expertprune.profiling.channels import ChannelStatistics, second_moments
from expertprune.profiling.observation import Observation
from expertprune.profiling.routing import RoutingStatistics
from expertprune.units import LayerShape, Segment


class LayerCollector:
    """The statistics of one layer, summed batch by batch on its device."""

    def __init__(self, layer: nn.Module, family: Family, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        self.routed = RoutingStatistics(layer, family, documents, shape) if family.experts else None
        self._weights = _weight_statistics(layer, family, shape)
        columns = layer.get_parameter(family.attention.output_weight).float()
        self.device, self.dtype = columns.device, next(layer.parameters()).dtype
        self.ffn = ChannelStatistics(documents, shape.ffn if family.has_ffn else 0, self.device)
        self.heads = ChannelStatistics(documents, shape.query_heads * shape.head_dim, self.device)
        self.head_impact = torch.zeros(documents, shape.query_heads, device=self.device)
        self.group_impact = torch.zeros(documents, shape.kv_heads, device=self.device)
        self.stream = torch.zeros(documents, device=self.device)
        # Gram matrices of the output projection's columns, [kv_heads, group_dim, group_dim]
        columns = columns.unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0)
        self._gram = columns @ columns.transpose(1, 2)

    def add(self, batch: Batch, seen: Observation, after: Tensor) -> None:
        """Add one batch that has passed the layer; `after` is its output, `[rows, tokens, hidden]`."""
        values = seen.values()
        if self.routed is not None and seen.routed is not None:
            self.routed.add(batch, seen.routed)
        self.update(batch, values.get("ffn", after[..., :0]), values["heads"], after)

    def update(self, batch: Batch, ffn: Tensor, heads: Tensor, stream: Tensor) -> None:
        """Add one batch; padding is left out.

        Args:
            ffn: the input of the FFN's output projection, `[rows, tokens, ffn]`.
            heads: that of the attention's, `[rows, tokens, query_heads * head_dim]`.
            stream: the layer's output, `[rows, tokens, hidden]`.
        """
        shape = self.shape
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            self.stream[document] = stream[row, :length].float().square().mean()
            self.ffn.add(document, ffn[row, :length].float())
            self.heads.add(document, heads[row, :length].float())
            grouped = heads[row, :length].unflatten(1, (shape.kv_heads, -1)).transpose(0, 1)  # [kv_heads, tokens, _]
            # mean_t ‖W o_t‖² = ⟨WᵀW, mean_t o_t o_tᵀ⟩: of the whole block for the group, of its
            # diagonal blocks for the heads
            change = second_moments(grouped) * self._gram / length
            self.group_impact[document] = change.sum((1, 2))
            blocks = change.unflatten(1, (-1, shape.head_dim)).unflatten(3, (-1, shape.head_dim))
            self.head_impact[document] = blocks.sum((2, 4)).diagonal(dim1=1, dim2=2).flatten()

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place. A document is with one member only."""
        own = {"head_impact": self.head_impact, "group_impact": self.group_impact, "stream": self.stream}
        routed = {} if self.routed is None else self.routed.sums()
        return {**self.ffn.sums("ffn"), **self.heads.sums("heads"), **own, **routed}

    def check(self, index: int) -> None:
        """Raises `CheckpointError` where activations were not finite."""
        neurons = self.ffn if self.routed is None else self.routed.neurons
        if not bool(neurons.square_sum.isfinite().all() and self.heads.square_sum.isfinite().all()):
            raise CheckpointError(
                f"layer {index}: activations are not finite in {self.dtype}: damaged weights, or "
                "too narrow a base.dtype (float32 and bfloat16 are wide)"
            )

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names.

        Raises:
            CheckpointError: the model gives activations that are not finite.
        """
        self.check(index)
        return {
            **(self.ffn.tensors(f"ffn.{index}") if self.routed is None else self.routed.tensors(index)),
            **self.heads.tensors(f"heads.{index}"),
            f"heads.{index}.impact": self.head_impact.cpu(),
            f"groups.{index}.impact": self.group_impact.cpu(),
            f"stream.{index}.square": self.stream.cpu(),
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


def predicted_tokens(text: TextRun) -> Tensor:
    """How many tokens of each document the model predicts, `[documents]`, float32."""
    tokens = torch.zeros(text.documents)
    for batch in text.batches:
        for document, length in zip(batch.documents, batch.lengths, strict=True):
            tokens[document] = length - 1
    return tokens
