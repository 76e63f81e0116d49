"""Mask units of a running model in place, and take the mask off again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.models.layers import decoder_layers
from expertprune.models.routed import routed_to
from expertprune.models.sources import Change, source_of
from expertprune.units import KeptUnits, LayerShape, Segment, Structure


@contextlib.contextmanager
def masked(model: Any, family: Family, shapes: Sequence[LayerShape], kept: Sequence[KeptUnits]) -> Iterator[None]:
    """While open, dropped units write nothing: their columns of output projections are zero.

    The router does not choose dropped routed experts. A layer that is gone passes its input on. A
    layer that is streamed is masked whenever it is opened.
    """
    source = source_of(model)
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model, family)):
            change: Change = _skipped
            if not kept[index].gone:
                change = functools.partial(_masked_layer, family=family, shape=shapes[index], units=kept[index])
            stack.enter_context(source.amended(layer, index, change))
        yield


@contextlib.contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """While open, the layer gives its input back."""
    layer.forward = lambda hidden, **_: hidden
    try:
        yield
    finally:
        del layer.forward


@contextlib.contextmanager
def _masked_layer(layer: nn.Module, family: Family, shape: LayerShape, units: KeptUnits) -> Iterator[None]:
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
            if family.experts is not None and len(units.experts) < shape.experts:
                routers.enter_context(routed_to(layer, family.experts, torch.tensor(units.experts)))
            if family.experts is not None and units.shape(shape).ffn < shape.ffn:
                output = family.experts.written(layer).data
                for expert in units.experts:
                    silence(output[expert], torch.tensor(units.neurons_of(expert, shape)))
            for structure, block in family.blocks().items():
                segment = Segment.FFN if structure is Structure.FFN else Segment.QUERY
                silence(layer.get_parameter(block.output_weight).data, units.rows(segment, shape))
        yield
    finally:
        routers.close()
        for weight, columns, values in stashed:
            weight[:, columns] = values
