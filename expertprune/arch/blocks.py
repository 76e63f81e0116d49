"""The parts of a family's file: what a layer is made of, and where its config says its widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expertprune.units import Segment


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


class Experts(Data):
    """The experts of a layer and the router in front of them: whole experts are the units.

    What transformers holds in one tensor at run time may be stored one by one, and under other names: `run` are the
    tensors of the running layer, one row of their first axis for each expert; `stored` are those of them that are stored
    so under another name, and `each` the names of one expert's own, with `{expert}` for its number. A checkpoint may also
    hold the tensors as they run.

    `count` are the config's keys for how many there are: what a config has of them is written.
    """

    count: tuple[str, ...]
    per_token: str
    width: str
    router: str
    module: str
    run: tuple[str, ...]
    stored: Mapping[str, str] = Field(default_factory=dict)
    each: tuple[str, ...]

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        """The running layer's, and those that are stored so under another name."""
        names = dict.fromkeys([*self.run, *self.stored.values()])
        return tuple(CoupledTensor(name=name, axis=0, segments=(Segment.EXPERT,), optional=True) for name in names)

    def of_one(self, expert: int) -> tuple[str, ...]:
        """The names on disk of what one expert owns."""
        return tuple(name.replace("{expert}", str(expert)) for name in self.each)

    def on_disk(self, run: str, experts: int) -> tuple[str, ...]:
        """How a tensor of the running layer is stored where it is not stored as it runs."""
        if not run.startswith(f"{self.module}."):
            return (self.stored.get(run, run),)
        return tuple(name for expert in range(experts) for name in self.of_one(expert))


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
