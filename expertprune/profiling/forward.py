"""Every statistic of a layer that needs no gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError
from expertprune.models.passes import TextRun
from expertprune.models.precision import narrow_products
from expertprune.profiling.channels import ChannelStatistics, over_tokens
from expertprune.profiling.observation import Observation
from expertprune.profiling.routing import RoutingStatistics
from expertprune.units import LayerShape


class LayerCollector:
    """The statistics of one layer, summed batch by batch on its device.

    `add` waits for nothing, and it takes as many kernels for one document as for many.

    Args:
        weights: what `weight_statistics` gives of the layer.
    """

    def __init__(
        self, layer: nn.Module, family: Family, shape: LayerShape, documents: int, weights: Mapping[str, Tensor]
    ) -> None:
        self.shape = shape
        experts, parameter = family.experts_of(shape), next(layer.parameters())
        self.routed = RoutingStatistics(layer, experts, documents, shape) if experts is not None else None
        self._weights = weights
        self.device, self.dtype = parameter.device, parameter.dtype
        self.ffn = ChannelStatistics(documents, shape.ffn if family.has_ffn else 0, self.device)
        self.heads = ChannelStatistics(documents, shape.query_heads * shape.head_dim, self.device)
        self.head_impact = torch.zeros(documents, shape.query_heads, device=self.device)
        self.group_impact = torch.zeros(documents, shape.kv_heads, device=self.device)
        self.stream = torch.zeros(documents, device=self.device)
        self.influence = torch.zeros(documents, device=self.device)
        if not family.has_attention:
            return
        # Gram matrices of the output projection's columns: of groups, `[kv_heads, group_dim, group_dim]`, and of heads,
        # `[query_heads, head_dim, head_dim]`
        columns = layer.get_parameter(family.attention.output_weight).float()
        columns = columns.unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0)
        self._group_gram = columns @ columns.transpose(1, 2)
        blocks = self._group_gram.unflatten(1, (-1, shape.head_dim)).unflatten(3, (-1, shape.head_dim))
        self._head_gram = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1).contiguous()

    def add(self, batch: Batch, seen: Observation, before: Tensor, after: Tensor) -> None:
        """Add one batch; `before` and `after` are the layer's input and output, `[rows, tokens, hidden]`."""
        values = seen.values()
        if self.routed is not None and seen.routed is not None:
            self.routed.add(batch, seen.routed)
        none = after[..., :0]
        self.update(batch, values.get("ffn", none), values.get("heads", none), after)
        placed, turned = (
            batch.on(after.device),
            1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=2),
        )
        self.influence.index_copy_(0, placed.documents, (turned * placed.weights).sum(1) / placed.totals)

    def update(self, batch: Batch, ffn: Tensor, heads: Tensor, stream: Tensor) -> None:
        """Add one batch; padding is left out.

        Args:
            ffn: the input of the FFN's output projection, `[rows, tokens, ffn]`.
            heads: that of the attention's, `[rows, tokens, query_heads * head_dim]`.
            stream: the layer's output, `[rows, tokens, hidden]`.
        """
        placed = batch.on(stream.device)
        squares = torch.linalg.vector_norm(stream, dim=2, dtype=torch.float32).square() / stream.shape[2]
        self.stream.index_copy_(0, placed.documents, (squares * placed.weights).sum(1) / placed.totals)
        self.ffn.add(placed, ffn)
        if not self.shape.query_heads:
            return
        heads = heads.float()
        self.heads.add(placed, heads)
        for impact, gram in ((self.group_impact, self._group_gram), (self.head_impact, self._head_gram)):
            change = over_tokens(placed.weights, squared_outputs(heads, gram)) / placed.totals[:, None]
            impact.index_copy_(0, placed.documents, change)

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


def squared_outputs(values: Tensor, gram: Tensor) -> Tensor:
    """`‖W x‖² = xᵀ (WᵀW) x` of each token and block of channels, float32.

    Args:
        values: `[rows, tokens, blocks * n]`.
        gram: `WᵀW` of each block, `[blocks, n, n]`.

    Returns:
        `[rows, tokens, blocks]`.
    """
    blocks = values.flatten(0, 1).unflatten(1, (gram.shape[0], -1)).transpose(0, 1)  # [blocks, tokens, n]
    with narrow_products(values.device):
        products = blocks @ gram
    return (products * blocks).sum(2).T.unflatten(0, values.shape[:2])


def predicted_tokens(text: TextRun) -> Tensor:
    """How many tokens of each document the loss counts on, `[documents]`, float32."""
    tokens = torch.zeros(text.documents)
    for batch in text.everything:
        for document, predicted in zip(batch.documents, batch.predicted, strict=True):
            tokens[document] = predicted
    return tokens


def token_weights(text: TextRun) -> Tensor:
    """The sum of the weights of each document's tokens, `[documents]`, float32."""
    weights = torch.zeros(text.documents)
    for batch in text.everything:
        weights[list(batch.documents)] = batch.weights.sum(1)
    return weights
