"""The GGUF format's names for a family's models, and the meaning of what its files leave out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from expertprune.arch.blocks import ConfigKeys, Data

_DEFAULT_THETA = 10000.0


class Window(Data):
    """Attention windows as the format has them.

    Attributes:
        key: the config's key for the number of tokens that a layer with a window looks back.
        period: of so many layers in a row, all but the last have a window.
        stated: whether a file may name another period.
        theta: the rotary base of layers with a window, where a file does not say it.
    """

    key: str
    period: int
    stated: bool = False
    theta: float | None = None

    def layer_types(self, layers: int, period: int) -> list[str]:
        return ["full_attention" if period and (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


class AttentionScale(Data):
    """The config's `key` for the width that attention logits are scaled by.

    The format does not store it. Its readers take the width of a head, or `hidden / query heads` in
    models of `by_hidden_at` layers.
    """

    key: str
    by_hidden_at: int

    def meant(self, layers: int, hidden: int, query_heads: int, head_dim: int) -> int:
        return hidden // query_heads if layers == self.by_hidden_at else head_dim


class GgufForm(Data):
    """How a family's models are written as GGUF.

    Attributes:
        architecture: the format's name for the family.
        readable: whether transformers reads such files.
        metadata: keys of the format beside those of every family, each with the config's key.
        implied: values of the config that a file cannot say. A model with other values cannot be
            written.
        interleaved: modules whose rows alternate, in each head, between the two rotary halves.
        vectors: matrices of one row that the format stores as vectors.
        norm_offset: what is added to the weights of norms.
        biases: biases that may be there, each with the config's switch for it, if there is one.
        frequencies: rope parameters that the format stores as factors of single frequencies.
        layered: another architecture for the same network, which allows layers of different widths.
        heads_fill_hidden: whether the query heads together must be as wide as the stream.
        heads_grouped: whether query heads may share a KV head.
        own_head: whether a file has an output matrix even where it is tied.
    """

    architecture: str
    readable: bool = True
    metadata: Mapping[str, str] = Field(default_factory=dict)
    implied: Mapping[str, Any] = Field(default_factory=dict)
    interleaved: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    norm_offset: float = 0.0
    window: Window | None = None
    attention_scale: AttentionScale | None = None
    biases: Mapping[str, str | None] = Field(default_factory=dict)
    frequencies: Mapping[str, Any] | None = None
    layered: str | None = None
    heads_fill_hidden: bool = False
    heads_grouped: bool = True
    own_head: bool = False

    def keys(self, config: ConfigKeys) -> dict[str, str]:
        """The format's keys for widths, counts and scales, each with the config's key."""
        found = {
            "block_count": config.layers,
            "embedding_length": config.hidden,
            "attention.head_count": config.query_heads,
            "attention.head_count_kv": config.kv_heads,
            "context_length": "max_position_embeddings",
            "vocab_size": "vocab_size",
        }
        return found | ({"feed_forward_length": config.ffn} if config.ffn is not None else {}) | dict(self.metadata)

    def stated(
        self, keys: ConfigKeys, metadata: Mapping[str, Any], tensors: set[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a file says of its model, as changes to the `config` that transformers read from it.

        Args:
            metadata: the file's values by the format's keys, without the architecture's prefix.
            tensors: the names of its tensors.
        """
        changes = {key: metadata[name] for name, key in self.keys(keys).items() if name in metadata}
        changes |= dict(self.implied)
        local = {name.split(".", 2)[-1] for name in tensors if name.startswith("blk.")}
        switches = {key: False for key in self.biases.values() if key is not None}
        changes |= switches | {key: True for bias, key in self.biases.items() if key is not None and bias in local}
        layers, hidden = int(metadata["block_count"]), int(metadata["embedding_length"])
        heads = int(metadata["attention.head_count"])
        head_dim = int(metadata.get("attention.key_length", hidden // heads))
        if head_dim * heads != hidden or config.get(keys.head_dim) is not None:
            changes[keys.head_dim] = head_dim
        if self.attention_scale is not None:
            changes[self.attention_scale.key] = self.attention_scale.meant(layers, hidden, heads, head_dim)
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": float(metadata.get("rope.freq_base", _DEFAULT_THETA)),
        }
        if (turning := int(metadata.get("rope.dimension_count", head_dim))) != head_dim:
            rope["partial_rotary_factor"] = turning / head_dim
        factor = float(metadata.get("rope.scaling.factor", 1.0))
        if factor != 1.0 and metadata.get("rope.scaling.type", "linear") == "linear":
            rope |= {"rope_type": "linear", "factor": factor}
        changes["rope_parameters"] = rope
        if self.window is None:
            windows = {"sliding_window": None, "use_sliding_window": False}
            return changes | {key: value for key, value in windows.items() if key in config}
        changes["layer_types"] = self._layer_types(layers, metadata)
        if self.window.theta is not None:
            near = float(metadata.get("rope.freq_base_swa", self.window.theta))
            changes["rope_parameters"] = {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": near},
            }
        return changes

    def _layer_types(self, layers: int, metadata: Mapping[str, Any]) -> list[str]:
        assert self.window is not None
        said = metadata.get("attention.sliding_window_pattern") if self.window.stated else None
        if isinstance(said, list):
            return ["sliding_attention" if near else "full_attention" for near in said]
        if not metadata.get("attention.sliding_window"):
            return ["full_attention"] * layers
        return self.window.layer_types(layers, int(said) if said is not None else self.window.period)


class PreTokenizer(Data):
    """A way to split text before byte-level merges, with the format's `name` for it.

    Attributes:
        split: the regular expression; default: GPT-2's.
        digits: whether each digit is split off first.
        whole_words: whether a word that is a token is found without merges.
    """

    name: str
    split: str | None = None
    digits: bool = False
    whole_words: bool = False


class GgufNames(Data):
    """The format's names for kinds of tokenizer. `engine` is the program that reads the files, `quantizer` its
    tool that stores them in fewer bits.
    """

    engine: str
    quantizer: str
    byte_level: str
    sentencepiece: str
    pre_tokenizers: tuple[PreTokenizer, ...]


@functools.cache
def gguf_names() -> GgufNames:
    return GgufNames.model_validate(yaml.safe_load((Path(__file__).parent / "gguf.yaml").read_text(encoding="utf-8")))
