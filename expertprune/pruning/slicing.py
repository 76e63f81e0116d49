"""Cut the rows and columns of kept units out of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import CoupledTensor, ExpertTensor, Family
from expertprune.artifacts.plan import Plan
from expertprune.units import KeptUnits, LayerShape, new_positions


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
            return select(tensor, coupled.axis, kept_positions(coupled, shape, kept))
    return tensor


def kept_positions(coupled: CoupledTensor, shape: LayerShape, kept: KeptUnits) -> Tensor:
    """Positions along a coupled tensor's axis that kept units own, `[kept positions]`, int64."""
    positions, offset = [], 0
    for segment in coupled.segments:
        positions.append(kept.rows(segment, shape) + offset)
        offset += shape.segment_rows(segment)
    return torch.cat(positions)


def select(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Some positions along an axis; the same object where all are kept."""
    if positions.numel() == tensor.shape[axis]:
        return tensor
    return tensor.index_select(axis, positions.to(tensor.device))


@dataclass(frozen=True)
class StoredExpert:
    """A tensor that one routed expert owns on disk: its new name, `None` where the routed expert
    goes, and the neurons that stay.
    """

    name: str | None
    tensor: ExpertTensor
    neurons: tuple[int, ...]
    width: int

    @property
    def positions(self) -> Tensor:
        """Positions along `tensor.axis` that stay, `[kept positions]`, int64."""
        return self.tensor.rows(self.neurons, self.width)

    def cut(self, values: Tensor) -> Tensor | None:
        """The kept neurons' share; `None` where nothing goes."""
        if self.tensor.axis is None or len(self.neurons) == self.width:
            return None
        return values.index_select(self.tensor.axis, self.positions)


def stored_experts(plan: Plan, family: Family) -> dict[str, StoredExpert]:
    """Routed experts that are stored one by one, in the layers that stay, by the names of what each owns."""
    experts, found = family.experts, {}
    for layer, position in new_positions(plan.kept).items():
        shape, kept = plan.shapes[layer], plan.kept[layer]
        prefix, moved = family.layer_prefix(layer), family.layer_prefix(position)
        for number in range(shape.experts if experts is not None else 0):
            assert experts is not None
            new = experts.of_one(kept.experts.index(number)) if number in kept.experts else None
            neurons = kept.neurons_of(number, shape)
            for place, tensor in enumerate(experts.of_one(number)):
                name = moved + new[place].name if new is not None else None
                found[prefix + tensor.name] = StoredExpert(name, tensor, neurons, shape.ffn)
    return found
