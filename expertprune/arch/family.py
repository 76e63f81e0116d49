"""The schema of a family's file, and what can be read off it together with a model's config."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from expertprune.errors import CheckpointError, PlanError
from expertprune.registry import nearest
from expertprune.units import KeptUnits, LayerShape, Segment, Structure

_HERE = Path(__file__).parent
PER_LAYER = "per_layer_config"  # transformers' name for widths of single layers
_PER_LAYER_KEYS = ("allow_global_per_layer_attribute_access", "auto_map")
MODELING = "modeling_expert"  # the module in an expert's folder that builds such layers


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CoupledTensor(_Data):
    """One tensor of a layer that shrinks with its units.

    `axis` of the tensor is the concatenation of `segments`. A tensor with `optional` may be absent, as biases are.
    """

    name: str
    axis: Literal[0, 1]
    segments: tuple[Segment, ...]
    optional: bool = False


class Block(_Data):
    """The FFN or the attention of a layer: its output module, whose input channels are the units, and its tensors.

    `output_norm` is the module that the output passes before it is added to the residual stream, where there is one.
    """

    output: str
    tensors: tuple[CoupledTensor, ...]
    output_norm: str | None = None

    @property
    def output_weight(self) -> str:
        return f"{self.output}.weight"


class Rewrite(_Data):
    """Another config that expresses the same network, for head counts which the family's own cannot."""

    model_type: str
    architectures: tuple[str, ...]
    set: Mapping[str, Any] = Field(default_factory=dict)
    remove: tuple[str, ...] = ()
    requires: Mapping[str, Any] = Field(default_factory=dict)
    zero_tensors: tuple[str, ...] = ()


class ConfigKeys(_Data):
    """The config's keys for the widths of a layer."""

    hidden: str
    layers: str
    ffn: str
    query_heads: str
    kv_heads: str
    head_dim: str


class Family(_Data):
    """A model family as data.

    `residual: additive` promises that a layer's output is its input plus the outputs of the two blocks, which the
    repair uses to aim at the residual stream; `residual: normed`, that each output passes its block's `output_norm`
    first.
    """

    family: str
    model_types: tuple[str, ...]
    layers: str
    residual: Literal["additive", "normed"]
    config: ConfigKeys
    ffn: Block
    attention: Block
    heads_divide_hidden: bool = False
    when_heads_change: Rewrite | None = None
    vocabulary: tuple[str, ...] = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    """Tensors with one row for each token; the first is the embedding, the others may be absent (tied, without bias)."""

    @model_validator(mode="after")
    def _norms_as_promised(self) -> Self:
        for name, block in (("ffn", self.ffn), ("attention", self.attention)):
            if (block.output_norm is not None) != (self.residual == "normed"):
                raise ValueError(f"{name}.output_norm goes with residual: normed, and only with it")
        return self

    def block(self, structure: Structure) -> Block:
        return self.ffn if structure is Structure.FFN else self.attention

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        return self.ffn.tensors + self.attention.tensors

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def layer_shapes(self, config: Mapping[str, Any]) -> tuple[LayerShape, ...]:
        """Shape of every layer from the contents of `config.json`, widths of single layers included.

        Raises:
            CheckpointError: a key is missing, or the head counts make no legal grouped-query attention.
        """
        count = _positive(config, self.config.layers)
        single = config.get(PER_LAYER) or {}
        return tuple(
            self._layer_shape({**config, **single.get(str(i), single.get(str(i).zfill(len(str(count - 1))), {}))})
            for i in range(count)
        )

    def _layer_shape(self, config: Mapping[str, Any]) -> LayerShape:
        keys = self.config
        hidden, query_heads = _positive(config, keys.hidden), _positive(config, keys.query_heads)
        kv_heads = _positive(config, keys.kv_heads) if config.get(keys.kv_heads) is not None else query_heads
        head_dim = _positive(config, keys.head_dim) if config.get(keys.head_dim) is not None else hidden // query_heads
        if query_heads % kv_heads:
            raise CheckpointError(
                f"config.json: {keys.query_heads} ({query_heads}) is no multiple of {keys.kv_heads} ({kv_heads})"
            )
        return LayerShape(hidden, _positive(config, keys.ffn), query_heads, kv_heads, head_dim)

    def pruned_config(self, config: Mapping[str, Any], kept: list[KeptUnits]) -> dict[str, Any]:
        """The expert's `config.json`: the base's, with the new widths.

        Raises:
            PlanError: the family's config cannot express these widths; the message says which are legal.
        """
        base = self.layer_shapes(config)
        shapes = [layer.shape(shape) for layer, shape in zip(kept, base, strict=True)]
        result = dict(config)
        if shapes == list(base):
            return result
        changed = [new for new, old in zip(shapes, base, strict=True) if self.heads_changed(old, new)]
        for new in changed:
            self._check_heads(config, new)
        result |= self._widths(max(shapes, key=lambda shape: shape.ffn))
        if changed:
            result[self.config.query_heads] = max(shape.query_heads for shape in shapes)
            result[self.config.kv_heads] = max(shape.kv_heads for shape in shapes)
        else:  # as it was, also where it was left to follow from the other keys
            del result[self.config.head_dim]
            result |= {key: value for key, value in config.items() if key == self.config.head_dim}
        if changed and self.when_heads_change is not None:
            result = _with_defaults(result, self.when_heads_change.model_type)
            result = {k: v for k, v in result.items() if k not in self.when_heads_change.remove}
            result |= {
                **self.when_heads_change.set,
                "model_type": self.when_heads_change.model_type,
                "architectures": list(self.when_heads_change.architectures),
            }
        return _with_layers(result, [self._widths(shape) for shape in shapes])

    def _widths(self, shape: LayerShape) -> dict[str, int]:
        """A layer's widths under the config's keys."""
        keys = self.config
        return {
            keys.ffn: shape.ffn,
            keys.query_heads: shape.query_heads,
            keys.kv_heads: shape.kv_heads,
            keys.head_dim: shape.head_dim,
        }

    def layer_config(self, config: Any, index: int, shape: LayerShape) -> Any:
        """A running model's `transformers` config with the widths of one layer, for building that layer alone."""
        small = copy.copy(config.per_layer_config[index] if config.is_heterogeneous else config)
        for key, value in self._widths(shape).items():
            setattr(small, key, value)
        return small

    @staticmethod
    def heads_changed(old: LayerShape, new: LayerShape) -> bool:
        return (old.query_heads, old.kv_heads) != (new.query_heads, new.kv_heads)

    def _check_heads(self, config: Mapping[str, Any], new: LayerShape) -> None:
        rewrite = self.when_heads_change
        divides = self.heads_divide_hidden or (
            rewrite is not None and family_of(rewrite.model_type).heads_divide_hidden
        )
        if divides and new.hidden % new.query_heads:
            legal = [n for n in range(1, new.hidden + 1) if new.hidden % n == 0 and n % new.kv_heads == 0]
            legal = [n for n in legal if n <= new.kv_heads * self.layer_shapes(config)[0].heads_per_group]
            raise PlanError(
                f"{new.query_heads} query heads do not divide the hidden size {new.hidden}, which the config of family "
                f"{self.family!r} requires; with {new.kv_heads} KV groups kept, legal counts are "
                f"{', '.join(map(str, legal)) or 'none'}"
            )
        if rewrite is not None:
            for key, wanted in rewrite.requires.items():
                if config.get(key, wanted) != wanted:
                    raise PlanError(
                        f"heads of this base cannot be cut: its config says {key}: {config[key]!r}, and only {wanted!r} "
                        "can be expressed with other head counts"
                    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key!r} must be a positive whole number, found {value!r}")
    return value


def _with_layers(config: dict[str, Any], widths: list[dict[str, int]]) -> dict[str, Any]:
    """The config with the widths of single layers where they are not the whole model's, and the code that reads them."""
    layers = {
        str(index): different
        for index, layer in enumerate(widths)
        if (different := {key: value for key, value in layer.items() if config.get(key, value) != value})
    }
    if config.pop(PER_LAYER, None) is not None:  # the base had such widths itself
        config = {key: value for key, value in config.items() if key not in _PER_LAYER_KEYS}
    if layers:
        config |= {
            PER_LAYER: layers,
            "allow_global_per_layer_attribute_access": True,
            "auto_map": {"AutoModelForCausalLM": f"{MODELING}.ExpertForCausalLM"},
        }
    return config


def _with_defaults(config: dict[str, Any], other: str) -> dict[str, Any]:
    """The config with what its own class means by the keys it leaves out, where another class would mean its own."""
    from transformers import CONFIG_MAPPING

    mine = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    theirs = CONFIG_MAPPING[other]().to_dict()
    return {key: value for key, value in mine.items() if key in theirs and key not in config} | config


@functools.cache
def families() -> dict[str, Family]:
    """Every known family by `model_type`."""
    known: dict[str, Family] = {}
    for path in sorted((_HERE / "families").glob("*.yaml")):
        family = Family.model_validate(yaml.safe_load(path.read_text()))
        for model_type in family.model_types:
            if model_type in known:
                raise ValueError(f"{path.name}: model_type {model_type!r} belongs to {known[model_type].family!r}")
            known[model_type] = family
    return known


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; raises `CheckpointError` for one that is not supported."""
    if model_type not in families():
        raise CheckpointError(f"model_type {model_type!r} is not supported{nearest(model_type, families())}")
    return families()[model_type]


class PackagedFile(_Data):
    """A file inside an installed package; the package is found by its `module`, and none of its code is run."""

    module: str
    file: str


class BundledModel(_Data):
    """A real model that comes as a package: GGUF `file` inside the installed `module`.

    One that is too large for a package comes in several, as `parts` whose bytes in this order are the file with digest
    `sha256`.
    """

    file: str
    module: str | None = None
    parts: tuple[PackagedFile, ...] = ()
    sha256: str | None = None
    install: str
    licence: str

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.module is None) == (not self.parts) or bool(self.parts) != (self.sha256 is not None):
            raise ValueError("a bundled model needs either a module, or parts and the sha256 of their whole")
        return self

    @property
    def packaged(self) -> tuple[PackagedFile, ...]:
        """Where its bytes lie, in order."""
        return self.parts if self.module is None else (PackagedFile(module=self.module, file=self.file),)


@functools.cache
def bundled_models() -> dict[str, BundledModel]:
    """Models that need no hub, by name."""
    data = yaml.safe_load((_HERE / "bundled.yaml").read_text())
    return {name: BundledModel.model_validate(entry) for name, entry in data.items()}
