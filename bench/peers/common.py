"""What the peer methods share: layer-by-layer passes, choosing FFN neurons, cutting in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Family, family_of
from expertprune.corpora.batches import Batch
from expertprune.models.layers import decoder_layers, observed
from expertprune.models.passes import Stream, TextRun, real_tokens
from expertprune.pruning.slicing import cut_tensor
from expertprune.units import LayerShape, Segment

Pruned = tuple[Any, int]


@dataclass(frozen=True)
class Network:
    """A running model with what its family says about it."""

    model: Any
    family: Family
    layers: Sequence[nn.Module]
    shapes: tuple[LayerShape, ...]

    @classmethod
    def of(cls, model: Any) -> Network:
        family = family_of(model.config.model_type)
        layers = list(decoder_layers(model, family))
        return cls(model, family, layers, family.layer_shapes(model.config.to_dict()))

    def start(self, batches: Sequence[Batch]) -> Stream:
        """The hidden states of some text before the first layer."""
        return TextRun(self.model, self.family, self.shapes, batches).start()

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def wanted(self, fraction: float) -> int:
        """How many FFN neurons of each layer are to go."""
        return round(fraction * self.shapes[0].ffn)

    def wanted_parameters(self, fraction: float) -> int:
        """How many parameters every method is asked to remove: those of the FFN neurons."""
        return self.wanted(fraction) * sum(self.unit_parameters(index) for index in range(len(self.layers)))

    def unit_parameters(self, index: int, segment: Segment = Segment.FFN) -> int:
        """Parameters of one FFN neuron of a layer (or of one query or KV head)."""
        shape = self.shapes[index]
        units = {Segment.FFN: shape.ffn, Segment.QUERY: shape.query_heads, Segment.KEY_VALUE: shape.kv_heads}[segment]
        state = dict(self.layers[index].named_parameters())
        total = 0
        for coupled in self.family.tensors:
            if coupled.name in state and segment in coupled.segments:
                rows = coupled.segments.count(segment) * shape.segment_rows(segment)
                total += state[coupled.name].numel() // state[coupled.name].shape[coupled.axis] * rows
        return total // units

    def unit_sums(self, index: int, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over every weight that leaves with an FFN neuron of `values(weight)`, `[ffn]`."""
        shape, state = self.shapes[index], dict(self.layers[index].named_parameters())
        total = torch.zeros(shape.ffn, device=self.model.device)
        for coupled in self.family.ffn.tensors:
            if coupled.name in state:
                rows = values(state[coupled.name]).movedim(coupled.axis, 0)
                summed = rows.reshape(len(rows), -1).sum(1)
                total += summed.unflatten(0, (len(coupled.segments), shape.ffn)).sum(0)
        return total

    @torch.no_grad()
    def cut_ffn(self, index: int, kept: Tensor) -> None:
        """Keep only the marked FFN neurons of a layer; `kept` is `[ffn]`, bool."""
        shape, layer = self.shapes[index], self.layers[index]
        units = dataclasses.replace(shape.all_kept, ffn=tuple(kept.nonzero()[:, 0].tolist()))
        for coupled in self.family.ffn.tensors:
            path, _, name = coupled.name.rpartition(".")
            module = layer.get_submodule(path)
            tensor = getattr(module, name, None)
            if tensor is None:
                continue
            small = cut_tensor(coupled.name, tensor, self.family, shape, units)
            setattr(module, name, nn.Parameter(small, requires_grad=False))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape

    def cut_each(self, kept: Sequence[Tensor]) -> Pruned:
        """Cut the FFN of every layer; the model and how many parameters it lost."""
        before = self.parameters
        for index, mask in enumerate(kept):
            self.cut_ffn(index, mask)
        return self.model, before - self.parameters


def without_lowest(scores: Tensor, count: int) -> Tensor:
    """What stays when the `count` lowest scores go (the first of equals), as bool."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[torch.argsort(scores.flatten(), stable=True)[:count]] = False
    return kept.view_as(scores)


def whole(values: Tensor, total: int) -> list[int]:
    """Values `[layers]`, which add up to `total`, as whole numbers that do: rounded down, the largest remainders up."""
    counts = values.long()
    counts[torch.argsort(counts - values, stable=True)[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


@dataclass
class Moments:
    """Sums over the real tokens of a module's input channels, `[channels]`, float64."""

    tokens: int
    total: Tensor
    square: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """The variance over tokens, about the mean of all of them."""
        return (self.square / self.tokens - self.mean.square()).clamp_min(0)


@torch.inference_mode()
def observe(network: Network, stream: Stream, index: int, paths: Sequence[str]) -> tuple[list[Moments], list[Tensor]]:
    """Run a layer over every batch.

    Returns:
        Moments of the inputs of its submodules at `paths`, and its output per batch.
    """
    layer, moments, outputs = network.layers[index], [], []
    for path in paths:
        channels = layer.get_parameter(f"{path}.weight").shape[1]
        zeros = [torch.zeros(channels, dtype=torch.float64, device=network.model.device) for _ in range(2)]
        moments.append(Moments(0, *zeros))
    with observed(layer, *paths) as calls:
        for number, batch in enumerate(stream.batches):
            outputs.append(stream.run(layer, index, number))
            for entry, path in zip(moments, paths, strict=True):
                values = real_tokens(batch, calls[path].input).double()
                entry.tokens += len(values)
                entry.total += values.sum(0)
                entry.square += values.square().sum(0)
    return moments, outputs
