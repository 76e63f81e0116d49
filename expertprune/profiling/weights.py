"""Norms of a layer's weights: what each unit owns, and the columns of output projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from expertprune.arch import Experts, Family
from expertprune.engine.memory import BLOCK
from expertprune.profiling.observation import observed_blocks
from expertprune.units import LayerShape, Segment


def weight_statistics(layer: nn.Module, family: Family, shape: LayerShape) -> dict[str, Tensor]:
    """Everything that a profile stores of a layer's weights, by name in it, with `{layer}` for the layer's index."""
    experts = family.experts_of(shape)
    statistics = _of_blocks(layer, family, shape)
    if experts is not None:
        statistics |= _of_routed_experts(layer, experts, shape)
    return statistics


def _of_blocks(layer: nn.Module, family: Family, shape: LayerShape) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for name, block in observed_blocks(family).items():
        absolute, squared = column_sums(layer.get_parameter(block.output_weight)[None])
        statistics[f"{name}.{{layer}}.output_l1"] = absolute[0].cpu()
        statistics[f"{name}.{{layer}}.output_l2"] = squared[0].sqrt().cpu()
    state = dict(layer.named_parameters())
    squares = {segment: torch.zeros(shape.segment_rows(segment)) for segment in Segment}
    for coupled in family.ffn.tensors + family.attention.tensors:
        if coupled.name not in state:
            continue
        weight = state[coupled.name]
        owned = column_sums(weight[None])[1][0] if coupled.axis == 1 else row_squares(weight)
        parts = owned.cpu().split([shape.segment_rows(segment) for segment in coupled.segments])
        for segment, values in zip(coupled.segments, parts, strict=True):
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


def _of_routed_experts(layer: nn.Module, experts: Experts, shape: LayerShape) -> dict[str, Tensor]:
    """What each routed expert and each neuron owns, and columns of outputs."""
    values = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    l1, squares = column_sums(experts.written(layer))
    owned, neurons = squares.sum(1), squares.clone()
    for tensor in experts.run:
        if tensor.name == experts.output:
            continue
        of_all = values[tensor.name].movedim(tensor.expert_axis, 0)
        if tensor.axis == 1:
            own = column_sums(of_all)[1]
        else:
            own = row_squares(of_all if of_all.dim() == 3 else of_all.reshape(shape.experts, -1, 1))
        owned += own.sum(1)
        if tensor.axis is not None:
            neurons += tensor.by_neuron(own, shape.ffn)
    return {
        "ffn.{layer}.output_l1": l1.flatten().cpu(),
        "ffn.{layer}.output_l2": squares.sqrt().flatten().cpu(),
        "ffn.{layer}.weight_norm": neurons.sqrt().flatten().cpu(),
        "experts.{layer}.weight_norm": owned.sqrt().cpu(),
    }


def column_sums(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of absolute values and of squares of columns, `[matrices, rows, columns]` to `[matrices, columns]`."""
    absolute = torch.zeros(matrices.shape[0], matrices.shape[2], device=matrices.device)
    squared = torch.zeros_like(absolute)
    for block in _blocks(matrices, 1):
        ones = torch.ones(block.shape[1], device=block.device)
        absolute += ones @ block.abs()
        squared += ones @ block.square()
    return absolute, squared


def row_squares(weight: Tensor) -> Tensor:
    """Sums of squares of rows, `[..., rows, columns]` to `[..., rows]`; a vector has rows of one value."""
    if weight.dim() == 1:
        return weight.float().square()
    if weight.dim() == 2:
        return row_squares(weight[None])[0]
    return torch.cat([torch.linalg.vector_norm(block, dim=2).square() for block in _blocks(weight, 1)], 1)


def _blocks(matrices: Tensor, axis: int) -> Iterator[Tensor]:
    """Some rows of all matrices at a time, in float32: a copy of all of them may take twice the layer's memory."""
    values = matrices.numel() // max(1, matrices.shape[axis])
    for block in matrices.split(max(1, BLOCK // max(1, values)), axis):
        yield block.float()
