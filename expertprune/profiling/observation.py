"""What passes the prunable units of a layer while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.models.layers import Routed


@dataclass
class Observation:
    """The last call of a layer.

    Attributes:
        inputs: what masks of units would multiply, by name, part of the graph where gradients are
            on. These are the inputs of both output projections, `heads` and `ffn`,
            `[rows, tokens, channels]`. A layer with routed experts has their summed output,
            `written`, in place of `ffn`.
        routed: the inputs of routed experts.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    routed: Routed | None = None

    def values(self) -> dict[str, Tensor]:
        """The inputs without their graph."""
        return {name: value.detach() for name, value in self.inputs.items()}

    def taken(self) -> Observation:
        """This call, which the next one does not overwrite."""
        return Observation(dict(self.inputs), self.routed)


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

    def note_routed(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        seen.inputs["written"] = output
        seen.routed = Routed(*(value.detach() for value in (*arguments, *keywords.values())[:3]))

    blocks = [("heads", family.attention), *([("ffn", family.ffn)] if family.has_ffn else [])]
    handles = [layer.get_submodule(block.output).register_forward_pre_hook(note_input(name)) for name, block in blocks]
    if family.experts is not None:
        module = layer.get_submodule(family.experts.module)
        handles.append(module.register_forward_hook(note_routed, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
