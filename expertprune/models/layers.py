"""Look into decoder layers while they run: arguments, inputs and outputs of modules, routing."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertprune.arch import Experts, Family
from expertprune.corpora.batches import Batch


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
    token ids of the right shape; `logits_to_keep` selects positions.
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


@dataclass(frozen=True)
class Routed:
    """The inputs of a layer's routed experts in one call.

    `hidden` is `[tokens, hidden]`; `chosen` and `weights` are `[tokens, per token]`.
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor

    @classmethod
    def of(cls, call: Call) -> Routed:
        """From a call of the module that holds the routed experts; without its graph."""
        return cls(*(value.detach() for value in call.inputs[:3]))


@dataclass(frozen=True)
class RoutedShare:
    """The real tokens of a batch that are routed to one routed expert of a layer.

    Attributes:
        expert: the routed expert's position in the layer.
        place: `[tokens]`, the tokens' positions in `Routed.hidden`.
        document: `[tokens]`, on the CPU, the document of each token.
        weight: `[tokens]`, float32, the router's weight.
        neurons: `[tokens, ffn]`, float32, the activations of its neurons.
        read: `[hidden, ffn]`, float32, its output projection.
    """

    expert: int
    place: Tensor
    document: Tensor
    weight: Tensor
    neurons: Tensor
    read: Tensor


def routed_shares(layer: nn.Module, experts: Experts, batch: Batch, call: Routed) -> Iterator[RoutedShare]:
    """Run each routed expert of a layer on the tokens that are routed to it, and on no others."""
    module, device = layer.get_submodule(experts.module), call.hidden.device
    into, out = layer.get_parameter(experts.input), layer.get_parameter(experts.output)
    rows, tokens = batch.ids.shape
    real = torch.tensor(batch.lengths, device=device)[:, None] > torch.arange(tokens, device=device)
    documents = torch.tensor(batch.documents)[:, None].expand(rows, tokens).flatten()
    hidden, chosen = call.hidden.reshape(rows * tokens, -1), call.chosen.reshape(rows * tokens, -1)
    weights = call.weights.reshape(rows * tokens, -1)
    for expert in range(into.shape[0]):
        place, column = ((chosen == expert) & real.flatten()[:, None]).nonzero(as_tuple=True)
        if place.numel():
            gate, *up = nn.functional.linear(hidden[place], into[expert]).split(out.shape[2], dim=-1)
            neurons = module.get_submodule(experts.activation)(gate)
            for each in up:
                neurons = neurons * each
            weight = weights[place, column].float()
            yield RoutedShare(expert, place, documents[place.cpu()], weight, neurons.float(), out[expert].float())


@contextlib.contextmanager
def routed_to(layer: nn.Module, experts: Experts, kept: Tensor) -> Iterator[None]:
    """While open, a layer's router chooses among the `kept` routed experts only.

    It is as if the others' logits were −∞. A copy of the router with the kept rows chooses; its
    choice is translated to the layer's own numbering.

    Args:
        kept: `[routed experts kept]`, int64, ascending.
    """
    router = layer.get_submodule(experts.router)
    small = copy.copy(router)
    small._parameters = dict(router._parameters)
    small._forward_hooks = OrderedDict()
    index = kept.to(next(router.parameters()).device)
    for name, parameter in router._parameters.items():
        if parameter is not None:
            small._parameters[name] = nn.Parameter(parameter[index], requires_grad=False)
    for name in ("num_experts", "n_routed_experts"):
        if hasattr(router, name):
            setattr(small, name, len(kept))

    def among_kept(_: nn.Module, arguments: tuple[Any, ...], __: Any) -> Any:
        logits, weights, chosen = small(*arguments)
        return logits, weights, index[chosen]

    handle = router.register_forward_hook(among_kept)
    try:
        yield
    finally:
        handle.remove()
