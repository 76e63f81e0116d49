"""How many parameters leave a checkpoint with one unit, or with a whole layer."""

from __future__ import annotations

from expertprune.arch import ExpertTensor, Family
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.tensorfile import TensorInfo
from expertprune.units import LayerShape, Segment, Structure


def row_parameters(checkpoint: Checkpoint, family: Family) -> int:
    """Parameters of one vocabulary row: of the embedding, and of the head where it is stored."""
    stored = [checkpoint.tensors[name] for name in family.vocabulary if name in checkpoint.tensors]
    return sum(info.parameters // info.shape[0] for info in stored)


def looked_up(checkpoint: Checkpoint, family: Family, rows: int | None = None) -> int:
    """Parameters of which a generated token reads one row: those of an embedding that is not the head as well.

    Args:
        rows: of the embedding; default: all that the checkpoint has.
    """
    embedding, head, *_ = family.vocabulary
    info = checkpoint.tensors[embedding]
    if head not in checkpoint.tensors:
        return 0
    return info.parameters // info.shape[0] * (info.shape[0] if rows is None else rows)


def layer_parameters(checkpoint: Checkpoint, family: Family, layer: int) -> int:
    """Parameters of a whole layer, its norms included."""
    prefix = family.layer_prefix(layer)
    return sum(info.parameters for name, info in checkpoint.tensors.items() if name.startswith(prefix))


def unit_parameters(checkpoint: Checkpoint, family: Family, shape: LayerShape, layer: int, structure: Structure) -> int:
    """Parameters of one unit of a structure in a layer: its rows and columns of all coupled tensors."""
    if structure is Structure.EXPERTS:
        return _routed_expert(checkpoint, family, shape, layer)
    if structure is Structure.FFN and family.experts is not None:
        return _neuron_of_routed_expert(checkpoint, family, shape, layer)
    total = 0
    for coupled in family.block(structure).tensors:
        info = checkpoint.tensors.get(family.layer_prefix(layer) + coupled.name)
        if info is None:
            continue
        per_row = info.parameters // info.shape[coupled.axis]
        for segment in coupled.segments:
            rows = shape.segment_rows(segment)
            if structure is Structure.QUERY_HEADS:
                own = segment in (Segment.QUERY, Segment.QUERY_HEAD)
                total += per_row * rows // shape.query_heads if own else 0
            else:
                total += per_row * rows // shape.units(structure)
    return total


def _routed_expert(checkpoint: Checkpoint, family: Family, shape: LayerShape, layer: int) -> int:
    """A routed expert's own tensors, its share of those that hold all of them, and its row of the router."""
    if family.experts is None or not shape.experts:
        return 0
    own, shared = _of_routed_experts(checkpoint, family, layer)
    return sum(info.parameters for info, _ in own) + sum(info.parameters // shape.experts for info, _ in shared)


def _neuron_of_routed_expert(checkpoint: Checkpoint, family: Family, shape: LayerShape, layer: int) -> int:
    """A neuron's rows and columns of one routed expert's tensors."""
    own, shared = _of_routed_experts(checkpoint, family, layer)
    sizes = [(info.parameters, tensor) for info, tensor in own]
    sizes += [(info.parameters // shape.experts, tensor) for info, tensor in shared]
    return sum(size // shape.ffn for size, tensor in sizes if tensor is not None and tensor.axis is not None)


_Described = list[tuple[TensorInfo, ExpertTensor | None]]


def _of_routed_experts(checkpoint: Checkpoint, family: Family, layer: int) -> tuple[_Described, _Described]:
    """What the first routed expert owns alone, and what all own together; each with its description if it has one."""
    assert family.experts is not None
    prefix, run = family.layer_prefix(layer), {tensor.name: tensor for tensor in family.experts.run}
    own = [(checkpoint.tensors.get(prefix + each.name), each) for each in family.experts.of_one(0)]
    shared = [(checkpoint.tensors.get(prefix + each.name), run.get(each.name)) for each in family.experts.tensors]
    return [(a, b) for a, b in own if a is not None], [(a, b) for a, b in shared if a is not None]
