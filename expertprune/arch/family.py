"""The schema of a family's file, and how it reads and writes a model's config."""

from __future__ import annotations

import copy
import functools
import importlib.resources
from collections.abc import Collection, Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from expertprune.arch.blocks import NO_BLOCK, Block, ConfigKeys, CoupledTensor, Data, Experts, Predictors, Rewrite
from expertprune.arch.depth import check_depth, with_fewer_layers
from expertprune.arch.gguf import GgufForm, gguf_names
from expertprune.arch.single_layers import PER_LAYER, stock_architectures, with_defaults, with_layers
from expertprune.arch.widths import (
    agreed,
    groups_of,
    heads_of,
    least_experts,
    positive,
    refuse_groups,
)
from expertprune.errors import CheckpointError, PlanError
from expertprune.files import problems_of
from expertprune.registry import loaded, nearest, plugins
from expertprune.units import DENSE, KeptUnits, LayerShape, Structure, new_positions

_HERE = Path(__file__).parent


class Family(Data):
    """A model family as data.

    Attributes:
        residual: `additive`: a layer's output is its input plus the outputs of the two blocks.
            `normed`: each output passes its block's `output_norm` first. The repair relies on it.
        defaults: the config's meaning of keys that it leaves out.
        attention: where heads are not cut, it may be left out. Nothing of it is measured then, and
            layers may have attentions of different kinds.
        structures: what can be cut. Where heads or neurons cannot, `why_no_heads` and
            `why_no_neurons` say why.
        heads_require: values of the config without which head counts cannot change. Dots lead into
            nested keys.
        predictors: layers for multi-token prediction that its checkpoints may hold.
        attention_implementation: the one of transformers that computes the network exactly.
        vllm_single_layers: vLLM's classes that read a layer's widths from the config while they
            build it, so that `serving.plugin` can give each layer its own widths.
        why_no_vocabulary_in_vllm: why vLLM cannot serve fewer vocabulary rows, where it cannot.
        gguf: how the family's models are written in that format.
    """

    family: str
    model_types: tuple[str, ...]
    layers: str
    residual: Literal["additive", "normed"]
    config: ConfigKeys
    attention: Block = NO_BLOCK
    ffn: Block = NO_BLOCK
    experts: Experts | None = None
    config_requires: Mapping[str, Any] = Field(default_factory=dict)
    defaults: Mapping[str, int] = Field(default_factory=dict)
    structures: tuple[Structure, ...] = DENSE
    why_no_heads: str = ""
    why_no_neurons: str = ""
    attention_implementation: Literal["sdpa", "eager"] = "sdpa"
    # By the oracle in the project's tests. The program sets it, and checks other families itself.
    tested: bool = True
    heads_divide_hidden: bool = False
    heads_require: Mapping[str, Any] = Field(default_factory=dict)
    when_heads_change: Rewrite | None = None
    vllm_single_layers: tuple[str, ...] = ()
    why_no_vocabulary_in_vllm: str = ""
    predictors: Predictors | None = None
    gguf: GgufForm | None = None
    vocabulary: tuple[str, ...] = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    """Tensors with one row per token: the embedding, then those that may be absent."""

    @property
    def heads_are_units(self) -> bool:
        return Structure.KV_GROUPS in self.structures

    @model_validator(mode="after")
    def _neurons_or_experts(self) -> Self:
        if len({self.ffn == NO_BLOCK, self.config.ffn is None, self.experts is not None}) > 1:
            raise ValueError("a family has either ffn, and its key in config, or experts")
        if (Structure.EXPERTS in self.structures) != (self.experts is not None):
            raise ValueError("structures: experts goes with experts")
        if bool(self.why_no_neurons) == (Structure.FFN in self.structures):
            raise ValueError("why_no_neurons goes with structures that name no ffn, and only with those")
        return self

    @model_validator(mode="after")
    def _heads_with_their_groups(self) -> Self:
        if (Structure.QUERY_HEADS in self.structures) != self.heads_are_units:
            raise ValueError("structures: query_heads and kv_groups are cut together or not at all")
        if self.heads_are_units and not self.has_attention:
            raise ValueError("structures: heads can be cut where attention is described")
        if bool(self.why_no_heads) == self.heads_are_units:
            raise ValueError("why_no_heads goes with structures that name no heads, and only with those")
        return self

    @model_validator(mode="after")
    def _norms_as_promised(self) -> Self:
        for name, block in (("ffn", self.ffn), ("attention", self.attention)):
            if block != NO_BLOCK and (block.output_norm is not None) != (self.residual == "normed"):
                raise ValueError(f"{name}.output_norm goes with residual: normed, and only with it")
        return self

    def block(self, structure: Structure) -> Block:
        return self.ffn if structure is Structure.FFN else self.attention

    @property
    def has_ffn(self) -> bool:
        """Whether every token passes the one FFN of a layer: there are no routed experts."""
        return self.experts is None

    @property
    def has_attention(self) -> bool:
        """Whether the attention is described, so that it can be measured."""
        return self.attention != NO_BLOCK

    def blocks(self) -> dict[Structure, Block]:
        """The described blocks, in the order in which a layer runs them."""
        named = {Structure.QUERY_HEADS: self.attention, Structure.FFN: self.ffn}
        return {structure: block for structure, block in named.items() if block != NO_BLOCK}

    def experts_of(self, shape: LayerShape) -> Experts | None:
        """The routed experts of a layer of this shape, if it has some."""
        return self.experts if shape.experts else None

    @property
    def width_key(self) -> str:
        """The config's key for the neurons of the FFN, or of each routed expert."""
        key = self.experts.width if self.experts is not None else self.config.ffn
        assert key is not None
        return key

    @property
    def tensors(self) -> tuple[CoupledTensor, ...]:
        """All tensors that shrink along an axis, but not those of single routed experts."""
        experts = self.experts.tensors if self.experts is not None else ()
        return self.ffn.tensors + self.attention.tensors + experts

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def of_predictors(self, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        """Those of a checkpoint's tensors that belong to its layers for multi-token prediction."""
        if self.predictors is None:
            return []
        return self.predictors.among(names, config, self.layers, positive(config, self.config.layers))

    @property
    def size_keys(self) -> list[str]:
        """The config's keys that say how many of something a layer or the vocabulary has."""
        keys = self.config
        counted = self.experts.count if self.experts is not None else ()
        return [keys.hidden, self.width_key, keys.query_heads, keys.kv_heads, keys.head_dim, "vocab_size", *counted]

    def layer_shapes(self, config: Mapping[str, Any]) -> tuple[LayerShape, ...]:
        """The shape of every layer, from the contents of `config.json`.

        Raises:
            CheckpointError: a key is missing, or the head counts make no legal grouped-query
                attention.
        """
        count = positive(config, self.config.layers)
        for key, wanted in self.config_requires.items():
            if config.get(key) not in (None, wanted):
                raise CheckpointError(f"config.json: {key!r} is {config[key]!r}, and only {wanted!r} can be cut")
        if self.experts is not None and self.experts.groups is None:
            refuse_groups(config)
        config, single = {**self.defaults, **config}, config.get(PER_LAYER) or {}
        if not isinstance(single, Mapping) or not all(isinstance(each, Mapping) for each in single.values()):
            raise CheckpointError(f"config.json: {PER_LAYER!r} must map layers to their keys")
        own = [single.get(str(i), single.get(str(i).zfill(len(str(count - 1))), {})) for i in range(count)]
        return tuple(self._layer_shape({**config, **each}, layer) for layer, each in enumerate(own))

    def _layer_shape(self, config: Mapping[str, Any], layer: int) -> LayerShape:
        hidden = positive(config, self.config.hidden)
        heads = heads_of(config, self.config) if self.has_attention else (0, 0, 0)
        if self.experts is None:
            return LayerShape(hidden, positive(config, self.width_key), *heads)
        if not self.experts.layers.has(config, layer):  # its one FFN stays whole
            return LayerShape(hidden, 0, *heads)
        count = agreed(config, self.experts.count)
        groups = groups_of(config, self.experts, count)
        return LayerShape(hidden, positive(config, self.width_key), *heads, count, groups)

    def least_experts(self, config: Mapping[str, Any]) -> int:
        """The fewest routed experts that a layer can have; 0 in a dense model."""
        return 0 if self.experts is None else least_experts({**self.defaults, **config}, self.experts)

    def experts_per_token(self, config: Mapping[str, Any]) -> int:
        """The number of routed experts that a token passes; 0 in a dense model."""
        return 0 if self.experts is None else positive({**self.defaults, **config}, self.experts.per_token)

    def pruned_config(self, config: Mapping[str, Any], kept: list[KeptUnits]) -> dict[str, Any]:
        """The expert's `config.json`: the base's, with the layers that stay and the new widths.

        Raises:
            PlanError: the family's config cannot express these layers or widths; the message says
                which widths are legal.
        """
        staying = list(new_positions(kept))
        base = [self.layer_shapes(config)[layer] for layer in staying]
        shapes = [kept[layer].shape(shape) for layer, shape in zip(staying, base, strict=True)]
        result = dict(config)
        if len(staying) < len(kept):
            check_depth(config, self.family)
            routed = {} if self.experts is None else self.experts.layers.moved({**self.defaults, **config}, staying)
            config = result = with_fewer_layers(config, self.config.layers, staying, routed)
        if shapes == base and (len(staying) == len(kept) or PER_LAYER not in config):
            return result
        changed = [new for new, old in zip(shapes, base, strict=True) if self.heads_changed(old, new)]
        for new in changed:
            self._check_heads(config, new)
        self._check_experts(config, shapes)
        result |= self._widths(max(shapes, key=lambda shape: shape.ffn), bool(changed))
        if self.experts is not None:
            keys = [key for key in self.experts.count if key in config] or [self.experts.count[0]]
            result |= dict.fromkeys(keys, max(shape.experts for shape in shapes))
        if changed:
            result[self.config.query_heads] = max(shape.query_heads for shape in shapes)
            result[self.config.kv_heads] = max(shape.kv_heads for shape in shapes)
        if changed and self.when_heads_change is not None:
            result = with_defaults(result, self.when_heads_change.model_type)
            result = {k: v for k, v in result.items() if k not in self.when_heads_change.remove}
            result |= {
                **self.when_heads_change.set,
                "model_type": self.when_heads_change.model_type,
                "architectures": list(self.when_heads_change.architectures),
            }
        return with_layers(result, [self._widths(shape, self.has_attention) for shape in shapes])

    def _widths(self, shape: LayerShape, heads: bool) -> dict[str, int]:
        """A layer's widths by the config's keys, without the number of routed experts.

        Args:
            heads: whether to say those of heads; a config may leave them to follow from others.
        """
        keys, widths = self.config, {self.width_key: shape.ffn} if shape.ffn else {}
        if heads:
            widths |= {
                keys.query_heads: shape.query_heads,
                keys.kv_heads: shape.kv_heads,
                keys.head_dim: shape.head_dim,
            }
        return widths

    def _check_experts(self, config: Mapping[str, Any], shapes: list[LayerShape]) -> None:
        routed = [shape for shape in shapes if shape.experts]
        if self.experts is None or not routed:
            return
        for what, numbers in (
            ("number of routed experts in", {shape.experts for shape in routed}),
            ("number of neurons in the routed experts of", {shape.ffn for shape in routed}),
        ):
            if len(numbers) > 1:
                raise PlanError(f"family {self.family!r} keeps the same {what} every layer")
        kept, groups = routed[0].experts, routed[0].expert_groups
        chosen, least = self.experts_per_token(config), self.least_experts(config)
        if kept < chosen:
            raise PlanError(
                f"{kept} routed experts are fewer than the {chosen} that the router chooses for each token "
                f"({self.experts.per_token})"
            )
        if kept < least or kept % groups:
            raise PlanError(
                f"{kept} routed experts do not fit a router that first chooses among groups: each of the {groups} groups "
                f"({self.experts.groups and self.experts.groups.count}) keeps as many, at least {least // groups}"
            )

    def layer_config(self, config: Any, index: int, shape: LayerShape) -> Any:
        """A running model's config with one layer's widths, to build that layer alone."""
        small = copy.copy(config.per_layer_config[index] if config.is_heterogeneous else config)
        for key, value in self._widths(shape, self.has_attention).items():
            setattr(small, key, value)
        for key in self.experts.count if self.experts is not None and shape.experts else ():
            if hasattr(small, key):
                setattr(small, key, shape.experts)
        return small

    @staticmethod
    def heads_changed(old: LayerShape, new: LayerShape) -> bool:
        return (old.query_heads, old.kv_heads) != (new.query_heads, new.kv_heads)

    def check_single_layers(self, config: Mapping[str, Any], loaders: Collection[str]) -> None:
        """Raises `PlanError` where layers of different widths cannot be built, or one of `loaders` does not read them.

        Args:
            loaders: of transformers, vllm and gguf.
        """
        instead = "; with compose.allocation: uniform all layers keep the same widths"
        if PER_LAYER in config:
            instead = ", and this base has such layers itself: leave this engine out of serve_with"
        if not stock_architectures(config):
            raise PlanError(
                "config.json of the base names no architectures, so there is no class to build layers of different "
                f"widths from{instead}"
            )
        if "vllm" in loaders and not self.vllm_single_layers:
            raise PlanError(f"vLLM serves no layers of different widths of family {self.family!r}{instead}")
        if "gguf" in loaders and (self.gguf is None or self.gguf.layered is None):
            engine = gguf_names().engine
            raise PlanError(f"{engine} reads no layers of different widths of family {self.family!r}{instead}")

    def _check_heads(self, config: Mapping[str, Any], new: LayerShape) -> None:
        rewrite = self.when_heads_change
        if not self.heads_are_units:
            raise PlanError(f"heads of family {self.family!r} cannot be cut: {self.why_no_heads}")
        for key, wanted in self.heads_require.items():
            if (found := _looked_up(config, key, wanted)) != wanted:
                raise PlanError(
                    f"heads of this base cannot be cut: its config says {key}: {found!r}, and only {wanted!r} goes with "
                    "other head counts"
                )
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


def _looked_up(config: Mapping[str, Any], dotted: str, default: Any) -> Any:
    """The value at a dotted key of a config, or `default`."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key, default) if isinstance(value, Mapping) else default
    return value


@functools.cache
def families() -> dict[str, Family]:
    """Every known family by `model_type`: those that ship, then those of installed plugins.

    A plugin's entry point in the group `expertprune.families` names a package. Every `.yaml` file
    in the package's folder is a family. The package is imported, so it can also register its
    classes with transformers.

    Raises:
        UsageError: a plugin cannot be imported, has no family's file, a wrong one, or a
            `model_type` that is taken.
    """
    known: dict[str, Family] = {}
    _read_families(known, _HERE / "families", tested=True)
    for plugin in plugins("expertprune.families"):
        with loaded(plugin) as package:
            if not hasattr(package, "__path__"):
                raise ValueError("is a module, not a package with a folder of YAML files")
            _read_families(known, importlib.resources.files(package), tested=False)
    return known


def _read_families(known: dict[str, Family], folder: Traversable, tested: bool) -> None:
    files = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=lambda path: path.name)
    if not files:
        raise ValueError(f"{folder} holds no family: no .yaml file")
    for path in files:
        try:
            family = Family.model_validate({**yaml.safe_load(path.read_text(encoding="utf-8")), "tested": tested})
        except ValidationError as error:
            raise ValueError(f"{path.name}: {'; '.join(problems_of(error, Family))}") from None
        for model_type in family.model_types:
            if model_type in known:
                raise ValueError(
                    f"{path.name}: model_type {model_type!r} belongs to family {known[model_type].family!r}"
                )
            known[model_type] = family


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; raises `CheckpointError` for an unknown one."""
    if model_type not in families():
        raise CheckpointError(f"model_type {model_type!r} is not supported{nearest(model_type, families())}")
    return families()[model_type]
