"""The sections of a family's file: the tensors of a layer, and the config's keys for its widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from expertprune.units import KeptUnits, LayerShape, Segment


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CoupledTensor(Data):
    """One tensor of a layer that shrinks with its units.

    `axis` (0 rows, 1 columns) of the tensor is the concatenation of `segments`. An `optional`
    tensor, such as a bias, may be absent.
    """

    name: str
    axis: Literal[0, 1]
    segments: tuple[Segment, ...]
    optional: bool = False


class Block(Data):
    """The FFN or the attention of a layer.

    Attributes:
        output: the module whose input channels are the units.
        tensors: all tensors that shrink with the units.
        output_norm: the norm between `output` and the residual stream, where there is one.
    """

    output: str
    tensors: tuple[CoupledTensor, ...]
    output_norm: str | None = None

    @property
    def output_weight(self) -> str:
        return f"{self.output}.weight"


class ExpertTensor(Data):
    """One tensor of routed experts. The file may give its name alone where no axis has neurons.

    `axis` (0 rows, 1 columns) of one routed expert's share is the concatenation of `segments`, each
    with one position per neuron.
    """

    name: str
    axis: Literal[0, 1] | None = None
    segments: tuple[Segment, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _neurons_on_an_axis(self) -> Self:
        if (self.axis is None) == bool(self.segments) or set(self.segments) - {Segment.FFN}:
            raise ValueError(f"{self.name}: axis goes with segments, which can only be ffn")
        return self

    def rows(self, neurons: Sequence[int], width: int) -> Tensor:
        """Positions along `axis` of some neurons of a routed expert of `width`, int64."""
        one = torch.tensor(neurons, dtype=torch.int64)
        return torch.cat([one + place * width for place in range(len(self.segments))])


class Experts(Data):
    """The routed experts of a layer and their router. Whole routed experts are units, and so are
    neurons inside them.

    transformers runs all routed experts of a layer as one tensor. A checkpoint may store them as
    they run, or one by one under other names.

    Attributes:
        count: the config's keys for the number of routed experts. Those that a config has are
            written.
        per_token: the config's key for how many of them the router chooses for a token.
        width: the config's key for the neurons of one of them.
        router: the running module that gives logits, weights and the chosen ones.
        module: the running module that is called with hidden states, the chosen ones and weights.
        activation: the activation function inside `module`. A neuron is that of its first row,
            times its other rows.
        run: the tensors of the running layer. Row `e` of their first axis belongs to routed expert
            `e`.
        stored: other names on disk of tensors in `run` that are stored as they run.
        each: the tensors that one routed expert owns on disk, with `{expert}` for its number.
    """

    count: tuple[str, ...]
    per_token: str
    width: str
    router: str
    module: str
    activation: str = "act_fn"
    run: tuple[ExpertTensor, ...]
    stored: Mapping[str, str] = Field(default_factory=dict)
    each: tuple[ExpertTensor, ...]

    @model_validator(mode="after")
    def _read_and_written(self) -> Self:
        for key, tensors in (("run", self.run), ("each", self.each)):
            if [tensor.axis for tensor in tensors].count(1) != 1 or not any(tensor.axis == 0 for tensor in tensors):
                raise ValueError(f"experts.{key}: needs tensors whose rows are neurons, and one whose columns are")
        return self

    @property
    def input(self) -> str:
        """The running tensor with rows for the neurons of each routed expert."""
        return next(tensor.name for tensor in self.run if tensor.axis == 0)

    @property
    def output(self) -> str:
        """The running tensor with one column for each neuron of a routed expert."""
        return next(tensor.name for tensor in self.run if tensor.axis == 1)

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        """The tensors in `run`, under their running and their stored names."""
        names = dict.fromkeys([*(tensor.name for tensor in self.run), *self.stored.values()])
        return tuple(CoupledTensor(name=name, axis=0, segments=(Segment.EXPERT,), optional=True) for name in names)

    def of_one(self, expert: int) -> tuple[ExpertTensor, ...]:
        """The tensors that one routed expert owns, by their names on disk."""
        return tuple(each.model_copy(update={"name": each.name.replace("{expert}", str(expert))}) for each in self.each)

    def on_disk(self, run: str, experts: int) -> tuple[str, ...]:
        """The names on disk of a running tensor that is not stored as it runs."""
        if not run.startswith(f"{self.module}."):
            return (self.stored.get(run, run),)
        return tuple(tensor.name for expert in range(experts) for tensor in self.of_one(expert))

    def cut(self, name: str, tensor: Tensor, shape: LayerShape, kept: KeptUnits) -> Tensor:
        """The share of a running tensor that the kept routed experts and their kept neurons own.

        Args:
            name: the tensor's name within the layer, such as `mlp.experts.down_proj`.
            tensor: `[routed experts, ...]`.
        """
        whole = next((each for each in self.run if each.name == name), None)
        tensor = tensor if len(kept.experts) == shape.experts else tensor[list(kept.experts)]
        if whole is None or whole.axis is None or kept.shape(shape).ffn == shape.ffn:
            return tensor
        parts = [
            part.index_select(whole.axis, whole.rows(kept.neurons_of(expert, shape), shape.ffn).to(part.device))
            for expert, part in zip(kept.experts, tensor, strict=True)
        ]
        return torch.stack(parts)


NO_FFN = Block(output="", tensors=())


class Rewrite(Data):
    """Another config for the same network, for head counts that the family's own cannot say."""

    model_type: str
    architectures: tuple[str, ...]
    set: Mapping[str, Any] = Field(default_factory=dict)
    remove: tuple[str, ...] = ()
    requires: Mapping[str, Any] = Field(default_factory=dict)
    zero_tensors: tuple[str, ...] = ()


class ConfigKeys(Data):
    """The config's keys for the widths of a layer."""

    hidden: str
    layers: str
    ffn: str | None = None
    query_heads: str
    kv_heads: str
    head_dim: str
