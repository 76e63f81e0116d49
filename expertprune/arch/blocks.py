"""The parts of a family's file: what a layer is made of, and where its config says its widths."""

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

    `axis` of the tensor is the concatenation of `segments`. A tensor with `optional` may be absent, as biases are.
    """

    name: str
    axis: Literal[0, 1]
    segments: tuple[Segment, ...]
    optional: bool = False


class Block(Data):
    """The FFN or the attention of a layer: its output module, whose input channels are the units, and its tensors.

    `output_norm` is the module that the output passes before it is added to the residual stream, where there is one.
    """

    output: str
    tensors: tuple[CoupledTensor, ...]
    output_norm: str | None = None

    @property
    def output_weight(self) -> str:
        return f"{self.output}.weight"


class ExpertTensor(Data):
    """One tensor of a layer that belongs to experts; written as its name alone where it has no axis of neurons.

    `axis`, of one expert's part of it (0 rows, 1 columns), is the concatenation of `segments`, each one position per neuron.
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
        """Positions along `axis` of some neurons of an expert of `width`, int64."""
        one = torch.tensor(neurons, dtype=torch.int64)
        return torch.cat([one + place * width for place in range(len(self.segments))])


class Experts(Data):
    """The experts of a layer and the router in front of them: whole experts are units, and neurons inside them.

    What transformers holds in one tensor at run time may be stored one by one, and under other names: `run` are the
    tensors of the running layer, one row of their first axis for each expert; `stored` are those of them that are stored
    so under another name, and `each` the names of one expert's own, with `{expert}` for its number. A checkpoint may also
    hold the tensors as they run.

    `count` are the config's keys for how many there are: what a config has of them is written. A neuron is `activation`,
    within `module`, of its first row, times its others.
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
        """The running tensor whose rows, of each expert, make its neurons."""
        return next(tensor.name for tensor in self.run if tensor.axis == 0)

    @property
    def output(self) -> str:
        """The running tensor whose columns, of each expert, are read by its neurons."""
        return next(tensor.name for tensor in self.run if tensor.axis == 1)

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        """The running layer's, and those that are stored so under another name."""
        names = dict.fromkeys([*(tensor.name for tensor in self.run), *self.stored.values()])
        return tuple(CoupledTensor(name=name, axis=0, segments=(Segment.EXPERT,), optional=True) for name in names)

    def of_one(self, expert: int) -> tuple[ExpertTensor, ...]:
        """What one expert owns, by its name on disk."""
        return tuple(each.model_copy(update={"name": each.name.replace("{expert}", str(expert))}) for each in self.each)

    def on_disk(self, run: str, experts: int) -> tuple[str, ...]:
        """How a tensor of the running layer is stored where it is not stored as it runs."""
        if not run.startswith(f"{self.module}."):
            return (self.stored.get(run, run),)
        return tuple(tensor.name for expert in range(experts) for tensor in self.of_one(expert))

    def cut(self, name: str, tensor: Tensor, shape: LayerShape, kept: KeptUnits) -> Tensor:
        """What of a running tensor, all experts in one, the kept experts and their kept neurons own.

        Args:
            name: within the layer, such as `mlp.experts.down_proj`; `tensor` has a row of its first axis for each expert.
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
    """Another config that expresses the same network, for head counts which the family's own cannot."""

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
