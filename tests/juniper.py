"""The invented family of `docs/families.md`, as transformers would have it, for following that page."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

FAMILY = """\
family: juniper
model_types: [juniper]
layers: trunk.blocks
residual: additive
vocabulary: [trunk.words.weight, lm_head.weight]
config:
  hidden: width
  layers: depth
  ffn: inner
  query_heads: heads
  kv_heads: groups
  head_dim: head_size
ffn:
  output: feed.fall
  tensors:
    - {name: feed.rise.weight, axis: 0, segments: [ffn, ffn]}
    - {name: feed.fall.weight, axis: 1, segments: [ffn]}
attention:
  output: mix.write
  tensors:
    - {name: mix.read.weight, axis: 0, segments: [query, key_value, key_value]}
    - {name: mix.read.bias, axis: 0, segments: [query, key_value, key_value]}
    - {name: mix.write.weight, axis: 1, segments: [query]}
"""


class JuniperConfig(PreTrainedConfig):
    model_type = "juniper"
    attribute_map: ClassVar[dict[str, str]] = {  # what transformers itself asks a config for
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "inner",
        "num_attention_heads": "heads",
        "num_key_value_heads": "groups",
        "head_dim": "head_size",
    }

    def __init__(
        self,
        width: int = 24,
        depth: int = 2,
        inner: int = 32,
        heads: int = 6,
        groups: int = 3,
        head_size: int = 4,
        vocab_size: int = 64,
        **others: Any,
    ) -> None:
        self.width, self.depth, self.inner = width, depth, inner
        self.heads, self.groups, self.head_size, self.vocab_size = heads, groups, head_size, vocab_size
        super().__init__(**others)


class Mix(nn.Module):
    def __init__(self, config: JuniperConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.size = config.heads, config.groups, config.head_size
        self.read = nn.Linear(config.width, (self.heads + 2 * self.groups) * self.size)
        self.write = nn.Linear(self.heads * self.size, config.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        rows, tokens, _ = states.shape
        parts = self.read(states).view(rows, tokens, -1, self.size).transpose(1, 2)
        queries, keys, values = parts.split([self.heads, self.groups, self.groups], 1)
        keys, values = (each.repeat_interleave(self.heads // self.groups, 1) for each in (keys, values))
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.write(mixed.transpose(1, 2).reshape(rows, tokens, -1))


class Feed(nn.Module):
    def __init__(self, config: JuniperConfig) -> None:
        super().__init__()
        self.rise = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.fall = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        values, gates = self.rise(states).chunk(2, -1)
        return self.fall(values * torch.sigmoid(gates))


class Layer(nn.Module):
    def __init__(self, config: JuniperConfig, index: int) -> None:
        super().__init__()
        self.before_mix, self.mix = nn.RMSNorm(config.width), Mix(config)
        self.before_feed, self.feed = nn.RMSNorm(config.width), Feed(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.mix(self.before_mix(hidden_states))
        return hidden_states + self.feed(self.before_feed(hidden_states))


class Juniper(PreTrainedModel):
    config_class = JuniperConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True


class Trunk(Juniper):
    def __init__(self, config: JuniperConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Layer(config, index) for index in range(config.depth))
        self.last = nn.RMSNorm(config.width)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        states = self.words(input_ids)
        for layer in self.blocks:
            states = layer(states)
        return self.last(states)


class JuniperForCausalLM(Juniper, GenerationMixin):
    def __init__(self, config: JuniperConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **others: Any) -> CausalLMOutputWithPast:
        states = self.trunk(input_ids)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(states[:, kept]))


def register() -> None:
    AutoConfig.register("juniper", JuniperConfig, exist_ok=True)
    AutoModelForCausalLM.register(JuniperConfig, JuniperForCausalLM, exist_ok=True)
