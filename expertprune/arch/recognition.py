"""Recognize a family that no file describes, by the config and the shapes of the weights.

The model must have a gated FFN (`gate_proj`, `up_proj`, `down_proj`), an attention of `q_proj`,
`k_proj`, `v_proj` and `o_proj`, and the usual keys in its config. Shapes do not tell where norms
stand, or what depends on the number of heads. These are guesses until the oracle has checked them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from expertprune.arch.blocks import Block, ConfigKeys, CoupledTensor
from expertprune.arch.family import Family, families
from expertprune.units import Segment

_KEYS = ConfigKeys(
    hidden="hidden_size",
    layers="num_hidden_layers",
    ffn="intermediate_size",
    query_heads="num_attention_heads",
    kv_heads="num_key_value_heads",
    head_dim="head_dim",
)
# Keys of sizes in the configs of most families.
USUAL_LAYERS = _KEYS.layers
USUAL_SIZES = (_KEYS.hidden, _KEYS.ffn or "", _KEYS.query_heads, _KEYS.kv_heads, _KEYS.head_dim, "vocab_size")
_FFN = {"gate_proj": Segment.FFN, "up_proj": Segment.FFN}
_ATTENTION = {"q_proj": Segment.QUERY, "k_proj": Segment.KEY_VALUE, "v_proj": Segment.KEY_VALUE}
# A model that has both has them behind the blocks.
_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_CAP = "attn_logit_softcapping"


def recognized(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """The family that a checkpoint's tensors look like by their names and shapes, or `None`."""
    model_type, hidden = config.get("model_type"), config.get(_KEYS.hidden)
    gates = {
        match.groups() for name in shapes if (match := re.fullmatch(r"(.+)\.(\d+)\.(.+)\.gate_proj\.weight", name))
    }
    if not isinstance(model_type, str) or len({(layers, path) for layers, _, path in gates}) != 1:
        return None
    layers, first, mlp = min(gates, key=lambda gate: int(gate[1]))
    prefix = f"{layers}.{first}."
    local = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    attention = [name.removesuffix(".q_proj.weight") for name in local if name.endswith(".q_proj.weight")]
    if len(attention) != 1 or int(first) != 0:
        return None
    ffn_block = _block(local, mlp, _FFN, "down_proj", hidden)
    heads_block = _block(local, attention[0], _ATTENTION, "o_proj", hidden)
    if ffn_block is None or heads_block is None or any(not config.get(key) for key in _required()):
        return None
    normed = all(f"{norm}.weight" in local for norm in _NORMS)
    return Family(
        family=model_type,
        model_types=(model_type,),
        layers=layers,
        residual="normed" if normed else "additive",
        config=_KEYS,
        ffn=ffn_block.model_copy(update={"output_norm": _NORMS[1] if normed else None}),
        attention=heads_block.model_copy(update={"output_norm": _NORMS[0] if normed else None}),
        attention_implementation=attention_of(config),
        heads_divide_hidden=True,  # unknown, so only counts that every config can express
        tested=False,
    )


def _required() -> tuple[str, ...]:
    return (_KEYS.hidden, _KEYS.layers, _KEYS.ffn or "", _KEYS.query_heads)


def _block(
    local: Mapping[str, tuple[int, ...]], path: str, parts: Mapping[str, Segment], output: str, hidden: Any
) -> Block | None:
    """A block with its units as rows of `parts` and as columns of `output`, or `None`."""
    written = local.get(f"{path}.{output}.weight")
    if written is None or len(written) != 2 or written[0] != hidden:
        return None
    tensors = []
    for part, segment in parts.items():
        read = local.get(f"{path}.{part}.weight")
        if read is None or len(read) != 2 or read[1] != hidden:
            return None
        tensors.append(CoupledTensor(name=f"{path}.{part}.weight", axis=0, segments=(segment,)))
        tensors.append(CoupledTensor(name=f"{path}.{part}.bias", axis=0, segments=(segment,), optional=True))
    own = next(iter(parts.values()))
    tensors.append(CoupledTensor(name=f"{path}.{output}.weight", axis=1, segments=(own,)))
    return Block(output=f"{path}.{output}", tensors=tuple(tensors))


def attention_of(config: Mapping[str, Any]) -> Any:
    """The attention implementation of transformers that computes a config's network exactly."""
    family = families().get(str(config.get("model_type")))
    if family is not None:
        return family.attention_implementation
    return "eager" if config.get(_CAP) is not None else "sdpa"  # sdpa ignores the cap
