"""Cut the rows and columns of kept units out of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.units import KeptUnits, LayerShape


def pruned_layer(
    layer: nn.Module, family: Family, index: int, shape: LayerShape, kept: KeptUnits, config: Any
) -> nn.Module:
    """A decoder layer with the kept units only, cut from `layer`.

    Args:
        config: the base's running `transformers` config.
    """
    parameter = next(layer.parameters())
    small_config = family.layer_config(config, index, kept.shape(shape))
    with torch.device("meta"):
        small = type(layer)(small_config, index)
    state = {name: cut_tensor(name, tensor, family, shape, kept) for name, tensor in layer.state_dict().items()}
    small.load_state_dict(state, assign=True)
    return small.to(parameter.device).eval().requires_grad_(False)


def cut_tensor(name: str, tensor: Tensor, family: Family, shape: LayerShape, kept: KeptUnits) -> Tensor:
    """The rows or columns of a layer's tensor that kept units own; others stay the same object.

    Args:
        name: within the layer, such as `mlp.down_proj.weight`.
    """
    if family.experts is not None and any(each.name == name for each in family.experts.tensors):
        return family.experts.cut(name, tensor, shape, kept)
    for coupled in family.tensors:
        if coupled.name == name:
            positions, offset = [], 0
            for segment in coupled.segments:
                positions.append(kept.rows(segment, shape) + offset)
                offset += shape.segment_rows(segment)
            rows = torch.cat(positions)
            if rows.numel() == tensor.shape[coupled.axis]:
                return tensor
            return tensor.index_select(coupled.axis, rows.to(tensor.device))
    return tensor
