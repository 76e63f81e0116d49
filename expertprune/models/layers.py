"""Run a decoder one layer at a time over all batches.

Both passes over calibration text, profiling and repair, go this way: layer by layer, every batch through each. Only the
hidden states of the batches and one layer's inputs are held beside the weights, and a layer is needed only while its
turn lasts, so a model larger than memory needs another source of layers and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Experts, Family
from expertprune.corpora.batches import Batch

Observer = Callable[[int, Tensor], None]


@dataclass
class Stream:
    """The hidden states of every batch before one layer, and what the decoder hands each layer beside them.

    `hidden[b]` is `[rows, tokens, hidden]`; `arguments[b][l]` are the keyword arguments of layer `l` (position
    embeddings, masks), shared between layers where the decoder shares them.
    """

    batches: Sequence[Batch]
    hidden: list[Tensor]
    arguments: list[list[dict[str, Any]]]

    def copy(self) -> Stream:
        """Another stream with the same inputs; hidden states are replaced, never changed in place, so none is copied."""
        return Stream(self.batches, list(self.hidden), self.arguments)

    def run(self, layer: nn.Module, index: int, batch: int) -> Tensor:
        """One batch through one layer: the layer's output, `[rows, tokens, hidden]`; the stream is left as it was."""
        output = layer(self.hidden[batch], **self.arguments[batch][index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def real(self, batch: int, states: Tensor) -> Tensor:
        """The states of real tokens, `[tokens, channels]`, padding left out."""
        return real_tokens(self.batches[batch], states)


def real_tokens(batch: Batch, states: Tensor) -> Tensor:
    """`[rows, tokens, channels]` to `[real tokens, channels]`."""
    if all(length == states.shape[1] for length in batch.lengths):
        return states.flatten(0, 1)
    return torch.cat([states[row, :length] for row, length in enumerate(batch.lengths)])


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes its arguments and hands the hidden states on."""

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


def decoder_layers(model: Any, family: Family) -> nn.ModuleList:
    """The model's decoder layers."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.no_grad()  # not inference mode: a backward pass may go through what comes out
def start(model: Any, family: Family, batches: Sequence[Batch]) -> Stream:
    """The stream before the first layer: embeddings, and each layer's arguments as the decoder itself makes them."""
    layers = decoder_layers(model, family)
    parent_path, _, name = family.layers.rpartition(".")
    parent = model.get_submodule(parent_path)
    recorders = [_Recorder(layer) for layer in layers]
    decoder, device = model.get_decoder(), next(model.parameters()).device
    stream = Stream(batches, [], [])
    setattr(parent, name, nn.ModuleList(recorders))
    try:
        for batch in batches:
            decoder(input_ids=batch.ids.to(device), use_cache=False)
            stream.hidden.append(recorders[0].hidden)
            stream.arguments.append([recorder.arguments for recorder in recorders])
    finally:
        setattr(parent, name, layers)
    return stream


@contextlib.contextmanager
def head_only(model: Any, family: Family, hidden: Tensor) -> Iterator[None]:
    """While open, the model's layers are left out: whatever it is called with, `hidden` goes into its output head.

    So final norm, output projection, caps and scales are the model's own, and `logits_to_keep` cuts the positions.
    """
    parent_path, _, name = family.layers.rpartition(".")
    parent, layers = model.get_submodule(parent_path), decoder_layers(model, family)
    setattr(parent, name, nn.ModuleList([_Handover(layers[0], hidden)]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


class _Handover(_Recorder):
    """Stands in for all decoder layers: whatever comes in, the given hidden states go out."""

    def __init__(self, layer: nn.Module, result: Tensor) -> None:
        super().__init__(layer)
        self.result = result

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.result


@contextlib.contextmanager
def observed(layer: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> Iterator[None]:
    """While open, the input (and output) of the submodule at `path` are appended to the lists at each call."""

    def note(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs.append(arguments[0])
        if outputs is not None:
            outputs.append(output)

    handle = layer.get_submodule(path).register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Routed:
    """What one call hands a layer's experts: `hidden` `[tokens, hidden]`, `chosen` and `weights` `[tokens, per token]`."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


@contextlib.contextmanager
def observed_routing(
    layer: nn.Module, experts: Experts, calls: list[Routed], outputs: list[Tensor] | None = None
) -> Iterator[None]:
    """While open, what the router hands the experts of a layer (and what they write) is appended to the lists."""

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        calls.append(Routed(*[*arguments, *keywords.values()][:3]))
        if outputs is not None:
            outputs.append(output)

    handle = layer.get_submodule(experts.module).register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class ExpertShare:
    """The tokens of a batch that one expert of a layer is chosen for, padding left out.

    `place` `[tokens]` is where they stand in what the layer's experts were handed, `document` `[tokens]` (on the CPU) which
    document each is of, `weight` `[tokens]` the router's weight, `neurons` `[tokens, ffn]` the activations of the expert's
    neurons and `read` `[hidden, ffn]` the weights that read them; float32.
    """

    expert: int
    place: Tensor
    document: Tensor
    weight: Tensor
    neurons: Tensor
    read: Tensor


def shares(layer: nn.Module, experts: Experts, batch: Batch, call: Routed) -> Iterator[ExpertShare]:
    """Each expert of a layer run on the tokens that are routed to it, and on no others."""
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
            yield ExpertShare(expert, place, documents[place.cpu()], weight, neurons.float(), out[expert].float())


@contextlib.contextmanager
def routed_to(layer: nn.Module, experts: Experts, kept: Tensor) -> Iterator[None]:
    """While open, the router of a layer chooses among the `kept` experts only, as if the others' logits were −∞.

    A router with the kept rows alone chooses; what it chose is handed on in the layer's own numbering.

    Args:
        kept: `[experts kept]`, int64, ascending.
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
