"""The sections of a family's file: the tensors of a layer, and the config's keys for its widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from expertprune.errors import PlanError
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
    with one position per neuron. The segments alternate, neuron by neuron, if `interleaved`.
    `expert_axis` is the axis of a tensor of all routed experts that has one position for each.
    """

    name: str
    axis: Literal[0, 1] | None = None
    segments: tuple[Segment, ...] = ()
    interleaved: bool = False
    expert_axis: Literal[0, 1] = 0

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
        one, parts = torch.tensor(neurons, dtype=torch.int64), len(self.segments)
        if self.interleaved:
            return (one[:, None] * parts + torch.arange(parts)).flatten()
        return torch.cat([one + place * width for place in range(parts)])

    def by_neuron(self, values: Tensor, width: int) -> Tensor:
        """Sum values of positions along `axis` over each neuron's: `[..., axis]` to `[..., width]`."""
        if self.interleaved:
            return values.unflatten(-1, (width, -1)).sum(-1)
        return values.unflatten(-1, (-1, width)).sum(-2)


class ExpertLayers(Data):
    """The config's keys that say which layers have routed experts; the others have one FFN.

    Attributes:
        first, last: the first and the last such layer, counted from 0; -1 is the model's last.
        every: of so many layers in a row, the last one is such a layer.
        without: a list of layers that are none.
    """

    first: str | None = None
    last: str | None = None
    every: str | None = None
    without: str | None = None

    def has(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether a layer has routed experts. Keys that the config leaves out exclude none."""

        def said(key: str | None, default: Any) -> Any:
            value = config.get(key) if key is not None else None
            return default if value is None else value

        last = said(self.last, -1)
        return (
            layer >= said(self.first, 0)
            and (last == -1 or layer <= last)
            and (layer + 1) % said(self.every, 1) == 0
            and layer not in said(self.without, ())
        )

    def moved(self, config: Mapping[str, Any], staying: Sequence[int]) -> dict[str, Any]:
        """The keys' values once only some layers stay, each of which is as it was.

        Args:
            staying: their positions, ascending, in the present numbering.

        Raises:
            PlanError: these keys cannot say it, or no layer with routed experts would stay.
        """
        wanted = [self.has(config, layer) for layer in staying]
        dense = [position for position, has in enumerate(wanted) if not has]
        values: dict[str, Any] = {}
        if config.get(self.first or "") is not None:
            values[self.first or ""] = sum(layer < config[self.first or ""] for layer in staying)
        if config.get(self.last or "", -1) != -1:
            values[self.last or ""] = sum(layer <= config[self.last or ""] for layer in staying) - 1
        if self.without is not None and (self.without in config or dense):
            values[self.without] = dense
            if self.every is not None and self.every in config:
                values[self.every] = 1
        moved = {**config, **values}
        if not any(wanted) or [self.has(moved, position) for position in range(len(staying))] != wanted:
            keys = [key for key in (self.first, self.last, self.every, self.without) if key is not None]
            raise PlanError(
                f"layers {', '.join(map(str, staying))} cannot stay alone: the config could not say which of them have "
                f"routed experts ({', '.join(keys) or 'all layers have some'})"
            )
        return values


class ExpertGroups(Data):
    """The config's keys of a router that first chooses some groups of routed experts.

    A group is a run of routed experts, all groups are equally large.

    Attributes:
        count: the number of groups.
        chosen: the number of groups that the router chooses for a token.
        least: the fewest routed experts of a group; the router sums so many scores to rank it.
    """

    count: str
    chosen: str
    least: int = 1


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
        layers: which layers have them.
        groups: of a router that first chooses among groups.
        router: the running module that gives logits, weights and the chosen ones.
        module: the running module that is called with hidden states, the chosen ones and weights.
        run: the tensors of the running layer that have one position for each routed expert.
        input, output: those of them that read the hidden states and write to them, `[experts, rows,
            columns]`.
        input_bias, output_bias: their biases, where they have some.
        transposed: whether `input` and `output` have their inputs as rows.
        stored: other names on disk of tensors in `run` that are stored as they run.
        each: the tensors that one routed expert owns on disk, with `{expert}` for its number. Empty
            where they are only stored as they run.
    """

    count: tuple[str, ...]
    per_token: str
    width: str
    layers: ExpertLayers = ExpertLayers()
    groups: ExpertGroups | None = None
    router: str
    module: str
    run: tuple[ExpertTensor, ...]
    input: str
    output: str
    input_bias: str | None = None
    output_bias: str | None = None
    transposed: bool = False
    stored: Mapping[str, str] = Field(default_factory=dict)
    each: tuple[ExpertTensor, ...] = ()

    @model_validator(mode="after")
    def _read_and_written(self) -> Self:
        named = {tensor.name: tensor for tensor in self.run}
        for name, axis in ((self.input, self._rows), (self.output, 1 - self._rows)):
            if name not in named or named[name].axis != axis:
                raise ValueError(f"experts.run: needs {name} with neurons on axis {axis}")
        if missing := {self.input_bias, self.output_bias} - {None, *named}:
            raise ValueError(f"experts.run: needs {', '.join(sorted(map(str, missing)))}")
        if self.each and [tensor.axis for tensor in self.each].count(1) != 1:
            raise ValueError("experts.each: needs one tensor whose columns are neurons")
        return self

    @property
    def _rows(self) -> int:
        """The axis of `input` that has the neurons."""
        return 1 if self.transposed else 0

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        """The tensors in `run`, under their running and their stored names."""
        axes = {tensor.name: tensor.expert_axis for tensor in self.run}
        axes |= {stored: axes[run] for run, stored in self.stored.items()}
        return tuple(
            CoupledTensor(name=name, axis=axis, segments=(Segment.EXPERT,), optional=True)
            for name, axis in axes.items()
        )

    def of_one(self, expert: int) -> tuple[ExpertTensor, ...]:
        """The tensors that one routed expert owns, by their names on disk."""
        return tuple(each.model_copy(update={"name": each.name.replace("{expert}", str(expert))}) for each in self.each)

    def output_of(self, expert: int) -> str:
        """What a repair calls one routed expert's output projection, `[hidden, ffn]`.

        It is the name on disk where routed experts are stored one by one.
        """
        return next((each.name for each in self.of_one(expert) if each.axis == 1), f"{self.output}.{expert}")

    def on_disk(self, run: str, experts: int) -> tuple[str, ...]:
        """The names on disk of a running tensor that is not stored as it runs."""
        if not run.startswith(f"{self.module}.") or not self.each:
            return (self.stored.get(run, run),)
        return tuple(tensor.name for expert in range(experts) for tensor in self.of_one(expert))

    def are_in(self, layer: nn.Module) -> bool:
        """Whether a running layer has routed experts."""
        return any(name == self.module for name, _ in layer.named_modules())

    def read(self, layer: nn.Module) -> Tensor:
        """A running layer's input projections, `[experts, rows, hidden]`, a view."""
        weight = layer.get_parameter(self.input)
        return weight.transpose(1, 2) if self.transposed else weight

    def written(self, layer: nn.Module) -> Tensor:
        """A running layer's output projections, `[experts, hidden, ffn]`, a view."""
        weight = layer.get_parameter(self.output)
        return weight.transpose(1, 2) if self.transposed else weight

    def cut(self, name: str, tensor: Tensor, shape: LayerShape, kept: KeptUnits) -> Tensor:
        """The share of a running tensor that the kept routed experts and their kept neurons own.

        Args:
            name: the tensor's running or stored name within the layer, such as
                `mlp.experts.down_proj`.
        """
        names = {stored: run for run, stored in self.stored.items()}
        whole = next(each for each in self.run if each.name == names.get(name, name))
        if len(kept.experts) < shape.experts:
            tensor = tensor.index_select(whole.expert_axis, torch.tensor(kept.experts, device=tensor.device))
        if whole.axis is None or kept.shape(shape).ffn == shape.ffn:
            return tensor
        parts = [
            part.index_select(whole.axis, whole.rows(kept.neurons_of(expert, shape), shape.ffn).to(part.device))
            for expert, part in zip(kept.experts, tensor, strict=True)
        ]
        return torch.stack(parts)


class Predictors(Data):
    """Layers for multi-token prediction. Only speculative decoding runs them, so experts are
    written without them.

    Attributes:
        count: the config's keys for their number. Those that a config has are written.
        tensors: how the names of their tensors begin. Empty where they are numbered on after the
            decoder layers.
    """

    count: tuple[str, ...]
    tensors: tuple[str, ...] = ()

    def among(self, names: Iterable[str], config: Mapping[str, Any], layers: str, decoders: int) -> list[str]:
        """Those names of tensors that are theirs.

        Args:
            layers: where the decoder layers are, such as `model.layers`.
            decoders: how many of them there are.
        """
        if self.tensors:
            return [name for name in names if name.startswith(self.tensors)]
        counts = [config[key] for key in self.count if isinstance(config.get(key), int)]
        numbers = re.compile(re.escape(layers) + r"\.(\d+)\.")
        found = {name: int(match.group(1)) for name in names if (match := numbers.match(name))}
        return [name for name, layer in found.items() if decoders <= layer < decoders + max(counts, default=1)]

    def none_left(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The config's keys of a model without them."""
        return dict.fromkeys([key for key in self.count if key in config] or self.count[:1], 0)


NO_BLOCK = Block(output="", tensors=())


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
