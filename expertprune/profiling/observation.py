"""Record the activations of a layer's prunable units while the layer runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from expertprune.arch import Block, Family
from expertprune.models.routed import RoutedCall, routing_observed
from expertprune.units import Structure


@dataclass
class Observation:
    """The last call of a layer.

    Attributes:
        inputs: what masks of units would multiply, by name, part of the graph where gradients are
            on. These are the inputs of both output projections, `heads` and `ffn`,
            `[rows, tokens, channels]`. A layer with routed experts has, in place of `ffn`, their
            neurons, `neurons`, `[pairs, ffn]`, and outputs, `written`, `[pairs, hidden]`.
        routed: what routed experts did, without the graph.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    routed: RoutedCall | None = None

    def values(self) -> dict[str, Tensor]:
        """The inputs without their graph."""
        return {name: value.detach() for name, value in self.inputs.items()}

    def taken(self) -> Observation:
        """This call, which the next one does not overwrite."""
        return Observation(dict(self.inputs), self.routed)


def observed_blocks(family: Family) -> dict[str, Block]:
    """The blocks whose output projection is observed, by the names of their statistics."""
    names = {Structure.QUERY_HEADS: "heads", Structure.FFN: "ffn"}
    return {names[structure]: block for structure, block in family.blocks().items()}


@contextlib.contextmanager
def units_observed(layer: nn.Module, family: Family, leaves: bool = False) -> Iterator[Observation]:
    """While open, keeps what passed the units of a layer in its last call.

    Args:
        leaves: start a graph at the inputs of output projections.
    """
    seen = Observation()

    def note_input(name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
            value = arguments[0]
            if leaves and not value.requires_grad:
                value = value.detach().requires_grad_()
            seen.inputs[name] = value
            return (value, *arguments[1:])

        return note

    def note_routed(call: RoutedCall) -> None:
        seen.inputs |= {"neurons": call.neurons, "written": call.written}
        seen.routed = RoutedCall(call.pairs, call.neurons.detach(), call.written.detach())

    blocks = observed_blocks(family).items()
    handles = [layer.get_submodule(block.output).register_forward_pre_hook(note_input(name)) for name, block in blocks]
    try:
        with routing_observed(layer, family.experts, note_routed):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
