"""Bases without files: widths and sizes, and nothing that could be run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from expertprune.arch import family_of
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.tensorfile import TensorInfo


def config_of(
    family: str, ffn: int, groups: int, per_group: int, hidden: int, layers: int, rows: int, **changes: Any
) -> dict[str, Any]:
    heads = groups * per_group
    config = CONFIG_MAPPING[family](
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **changes,
    ).to_dict()
    return {**config, "head_dim": 2}


def tensors_of(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """What transformers stores of a model with this config; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    stored = dict(model.named_parameters())  # a tied head counts once
    return {name: TensorInfo("model.safetensors", tuple(value.shape), "F32") for name, value in stored.items()}


@functools.cache
def base_of(
    family: str = "llama",
    ffn: int = 256,
    groups: int = 4,
    per_group: int = 4,
    hidden: int = 48,
    layers: int = 2,
    rows: int = 16,
    **changes: Any,
) -> ResolvedBase:
    """A base without files: only widths and sizes matter to a budget."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.folder = Path("nowhere")
    checkpoint.config = config_of(family, ffn, groups, per_group, hidden, layers, rows, **changes)
    checkpoint.tensors = tensors_of(checkpoint.config)
    shapes = family_of(family).layer_shapes(checkpoint.config)
    base = ResolvedBase(
        "base", checkpoint.folder, checkpoint, family_of(family), shapes, Path("nowhere"), "t", torch.float32,
        torch.device("cpu"),
    )  # fmt: skip
    vars(base)["digest"] = "d"  # there are no weights that it could be of
    return base
