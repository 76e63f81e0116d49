"""Every statistic of a layer that needs no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.models.passes import TextRun
from expertprune.profiling.channels import ChannelStatistics, second_moments
from expertprune.profiling.observation import Observation, observed_blocks
from expertprune.profiling.routing import RoutingStatistics
from expertprune.units import LayerShape, Segment


class LayerCollector:
    """The statistics of one layer, summed batch by batch on its device."""

    def __init__(self, layer: nn.Module, family: Family, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        experts, parameter = family.experts_of(shape), next(layer.parameters())
        self.routed = RoutingStatistics(layer, experts, documents, shape) if experts is not None else None
        self._weights = _weight_statistics(layer, family, shape)
        self.device, self.dtype = parameter.device, parameter.dtype
        self.ffn = ChannelStatistics(documents, shape.ffn if family.has_ffn else 0, self.device)
        self.heads = ChannelStatistics(documents, shape.query_heads * shape.head_dim, self.device)
        self.head_impact = torch.zeros(documents, shape.query_heads, device=self.device)
        self.group_impact = torch.zeros(documents, shape.kv_heads, device=self.device)
        self.stream = torch.zeros(documents, device=self.device)
        self.influence = torch.zeros(documents, device=self.device)
        if not family.has_attention:
            return
        # Gram matrices of the output projection's columns, [kv_heads, group_dim, group_dim]
        columns = layer.get_parameter(family.attention.output_weight).float()
        columns = columns.unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0)
        self._gram = columns @ columns.transpose(1, 2)

    def add(self, batch: Batch, seen: Observation, before: Tensor, after: Tensor) -> None:
        """Add one batch; `before` and `after` are the layer's input and output, `[rows, tokens, hidden]`."""
        values = seen.values()
        if self.routed is not None and seen.routed is not None:
            self.routed.add(batch, seen.routed)
        none = after[..., :0]
        self.update(batch, values.get("ffn", none), values.get("heads", none), after)
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            turn = 1 - nn.functional.cosine_similarity(before[row, :length].float(), after[row, :length].float(), dim=1)
            weights = batch.weights[row, :length].to(turn.device)
            self.influence[document] = (turn * weights).sum() / weights.sum()

    def update(self, batch: Batch, ffn: Tensor, heads: Tensor, stream: Tensor) -> None:
        """Add one batch; padding is left out.

        Args:
            ffn: the input of the FFN's output projection, `[rows, tokens, ffn]`.
            heads: that of the attention's, `[rows, tokens, query_heads * head_dim]`.
            stream: the layer's output, `[rows, tokens, hidden]`.
        """
        shape, all_weights = self.shape, None if batch.answers is None else batch.weights.to(stream.device)
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            squares, weights, total = stream[row, :length].float().square().mean(1), None, torch.tensor(length)
            if all_weights is not None:
                weights = all_weights[row, :length]
                squares, total = squares * weights, weights.sum()
            self.stream[document] = squares.sum() / total
            self.ffn.add(document, ffn[row, :length].float(), weights)
            if not shape.query_heads:
                continue
            own = heads[row, :length]
            self.heads.add(document, own.float(), weights)
            if weights is not None:
                own = own * weights.sqrt()[:, None].to(own.dtype)
            grouped = own.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1)  # [kv_heads, tokens, _]
            # mean_t ‖W o_t‖² = ⟨WᵀW, mean_t o_t o_tᵀ⟩: of the whole block for the group, of its
            # diagonal blocks for the heads
            change = second_moments(grouped) * self._gram / total
            self.group_impact[document] = change.sum((1, 2))
            blocks = change.unflatten(1, (-1, shape.head_dim)).unflatten(3, (-1, shape.head_dim))
            self.head_impact[document] = blocks.sum((2, 4)).diagonal(dim1=1, dim2=2).flatten()

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place. A document is with one member only."""
        own = {"head_impact": self.head_impact, "group_impact": self.group_impact, "stream": self.stream}
        own["influence"] = self.influence
        routed = {} if self.routed is None else self.routed.sums()
        return {**self.ffn.sums("ffn"), **self.heads.sums("heads"), **own, **routed}

    def check(self, index: int) -> None:
        """Raises `CheckpointError` where activations were not finite."""
        finite = all(bool(each.square_sum.isfinite().all()) for each in (self.ffn, self.heads))
        if not finite or (self.routed is not None and not self.routed.finite):
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
            f"stream.{index}.influence": self.influence.cpu(),
            **{name.format(layer=index): tensor for name, tensor in self._weights.items()},
        }


def _weight_statistics(layer: nn.Module, family: Family, shape: LayerShape) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for name, block in observed_blocks(family).items():
        weight = layer.get_parameter(block.output_weight).float()
        statistics[f"{name}.{{layer}}.output_l1"] = weight.abs().sum(0).cpu()
        statistics[f"{name}.{{layer}}.output_l2"] = torch.linalg.vector_norm(weight, dim=0).cpu()
    state = dict(layer.named_parameters())
    squares = {segment: torch.zeros(shape.segment_rows(segment)) for segment in Segment}
    for coupled in family.ffn.tensors + family.attention.tensors:
        if coupled.name not in state:
            continue
        values = state[coupled.name].float().square()
        rows = values.flatten(1).sum(1) if coupled.axis == 0 and values.dim() > 1 else values
        rows = rows.sum(0) if coupled.axis == 1 else rows
        owned = rows.cpu().split([shape.segment_rows(segment) for segment in coupled.segments])
        for segment, values in zip(coupled.segments, owned, strict=True):
            squares[segment] += values
    if family.has_ffn:
        statistics["ffn.{layer}.weight_norm"] = squares[Segment.FFN].sqrt()
    if not family.has_attention:
        return statistics
    queries = squares[Segment.QUERY].unflatten(0, (shape.query_heads, -1)).sum(1) + squares[Segment.QUERY_HEAD]
    keys = squares[Segment.KEY_VALUE].unflatten(0, (shape.kv_heads, -1)).sum(1)
    statistics["heads.{layer}.weight_norm"] = queries.sqrt()
    statistics["groups.{layer}.weight_norm"] = (queries.unflatten(0, (shape.kv_heads, -1)).sum(1) + keys).sqrt()
    return statistics


def predicted_tokens(text: TextRun) -> Tensor:
    """How many tokens of each document the loss counts on, `[documents]`, float32."""
    tokens = torch.zeros(text.documents)
    for batch in text.everything:
        for document, predicted in zip(batch.documents, batch.predicted, strict=True):
            tokens[document] = predicted
    return tokens
