"""What the GGUF format calls the parts of a family's models, and what its files mean by what they leave unsaid."""

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
    """Attention windows as the format has them: of `period` layers all but the last look back `key` tokens.

    Where the period is `stated`, a file may name another. Layers with a window rotate by `theta` where files do not say.
    """

    key: str
    period: int
    stated: bool = False
    theta: float | None = None

    def layer_types(self, layers: int, period: int) -> list[str]:
        return ["full_attention" if period and (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


class AttentionScale(Data):
    """The config's `key` for the width that attention logits are scaled by.

    The format has no place for it: it is the width of a head, and `hidden / query heads` in models of `by_hidden_at` layers.
    """

    key: str
    by_hidden_at: int

    def meant(self, layers: int, hidden: int, query_heads: int, head_dim: int) -> int:
        return hidden // query_heads if layers == self.by_hidden_at else head_dim


class GgufForm(Data):
    """How a family's models are written as GGUF.

    `architecture` is the format's name; transformers reads such files where `readable`. `metadata` are the format's
    keys beside those that every family has, each with the config's key. `implied` are values of the config that a file
    cannot say, so that a model with others cannot be written. Of the `interleaved` modules each head's rows alternate
    between its two rotary halves; `vectors` are matrices of one row that the format has without it. `norm_offset` is
    added to the weights of norms. `biases` may be there, each with the config's switch for it. `frequencies` are rope
    parameters beside the factor that the format stores as factors of single frequencies. `layered` is another
    architecture for the same network, whose layers may have widths of their own. Where `heads_fill_hidden`, query
    heads are together as wide as the stream; unless `heads_grouped`, each has a KV head of its own. With `own_head` a
    file has an output matrix also where it is tied.
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
        """The format's keys of whole numbers and scales, each with the config's."""
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
        """What a file says about its model, as changes to the `config` that was read from it.

        Args:
            metadata: the file's values by the format's keys, without the architecture before them.
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
    """A way to part text before byte-level merges that the format has a `name` for.

    By the regular expression `split`, or where there is none, by GPT-2's; before that, `digits` one by one. `whole_words`
    that are tokens are found without merges.
    """

    name: str
    split: str | None = None
    digits: bool = False
    whole_words: bool = False


class GgufNames(Data):
    """What the format calls kinds of tokenizer; `engine` is what reads it."""

    engine: str
    byte_level: str
    sentencepiece: str
    pre_tokenizers: tuple[PreTokenizer, ...]


@functools.cache
def gguf_names() -> GgufNames:
    return GgufNames.model_validate(yaml.safe_load((Path(__file__).parent / "gguf.yaml").read_text(encoding="utf-8")))
