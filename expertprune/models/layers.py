"""Look into decoder layers while they run: arguments, inputs and outputs of modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertprune.arch import Family


def decoder_layers(model: Any, family: Family) -> nn.ModuleList:
    """The model's decoder layers."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


@contextlib.contextmanager
def layers_replaced(model: Any, family: Family, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """While open, `stand_ins` take the place of the model's decoder layers."""
    layers = decoder_layers(model, family)
    parent_path, _, name = family.layers.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(parent, name, layers)


class LayerRecorder(nn.Module):
    """Takes the place of a decoder layer: notes its arguments and passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stands_for = [layer]  # in a list, so that it is no submodule
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # decoders read attributes such as attention_type off their layers
            return getattr(self._stands_for[0], name)

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


class _Handover(LayerRecorder):
    """Takes the place of all decoder layers: ignores its input and returns `result`."""

    def __init__(self, layer: nn.Module, result: Tensor) -> None:
        super().__init__(layer)
        self.result = result

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.result


@contextlib.contextmanager
def head_only(model: Any, family: Family, hidden: Tensor) -> Iterator[None]:
    """While open, the model skips its decoder layers: `hidden` goes straight into its output head.

    Final norm, output projection, caps and scales are the model's own. Call the model with any
    token ids of the right shape.
    """
    with layers_replaced(model, family, [_Handover(decoder_layers(model, family)[0], hidden)]):
        yield


class Call(NamedTuple):
    """One call of a module: its arguments, positional ones before keywords, and its output."""

    inputs: tuple[Any, ...]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The first argument."""
        first: Tensor = self.inputs[0]
        return first


@contextlib.contextmanager
def observed(layer: nn.Module, *paths: str) -> Iterator[dict[str, Call]]:
    """While open, keeps the last call of each submodule at `paths`, by its path."""
    calls: dict[str, Call] = {}

    def watch(path: str) -> Any:
        def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            calls[path] = Call((*arguments, *keywords.values()), output)

        return layer.get_submodule(path).register_forward_hook(note, with_kwargs=True)

    handles = [watch(path) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
