"""A model whose decoder layers are read from its checkpoint one at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from expertprune.arch import Family, attention_of
from expertprune.errors import CheckpointError, refused
from expertprune.models.checkpoint import Checkpoint, Deferred
from expertprune.models.layers import decoder_layers
from expertprune.models.loading import load_config, model_class, without_threads
from expertprune.models.sources import LayerState, StreamedLayers, attach, release
from expertprune.models.spool import Limits, Room


def load_streamed(
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A `transformers` causal language model that has all but its decoder layers on the device.

    The layers are on the device `meta`. `TextRun.opened` gives each its weights for as long as it
    runs. Embeddings, rotary embedding, final norm and head work as in any other model.

    Raises:
        CheckpointError: the folder cannot be loaded.
    """
    with refused(f"{checkpoint.folder}: cannot be loaded"):
        model, twin = (empty_model(checkpoint.folder, dtype, trust_remote_code) for _ in range(2))
        prefix = f"{family.layers}."
        skeleton = [name for name in checkpoint.tensors if not name.startswith(prefix)]
        lacking = _fill(model, checkpoint, skeleton, dtype, device)
        model.tie_weights(missing_keys=lacking, recompute_mapping=False)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        layers = decoder_layers(twin, family)
    read = functools.partial(_read_layer, twin, layers, checkpoint, family, dtype, device)
    largest = max(sum(value.nbytes for value in layer.parameters()) for layer in layers)
    taken = sum(value.nbytes for value in model.parameters() if not value.is_meta) + 2 * largest
    attach(model, StreamedLayers(device, Room(device, limits, taken), read))
    return model.eval().requires_grad_(False)


def empty_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The folder's model with parameters on the device `meta`; buffers hold what the model computes for them."""
    from transformers.initialization import no_init_weights

    config = load_config(folder, trust_remote_code)
    made = model_class(folder)
    settings = {"dtype": dtype, "attn_implementation": attention_of(config.to_dict())}
    with init_empty_weights(include_buffers=False), no_init_weights():
        if hasattr(made, "from_config"):
            model = made.from_config(config, trust_remote_code=trust_remote_code, **settings)
        else:
            model = made._from_config(config, **settings)
    return model.eval().requires_grad_(False)


def _fill(
    model: Any, checkpoint: Checkpoint, names: Collection[str], dtype: torch.dtype, device: torch.device
) -> set[str]:
    """Give a model on `meta` some stored tensors, converted as transformers does; what it still lacks is returned."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    stored = {name: Deferred(checkpoint, name) for name in names}
    # A stream of a GPU belongs to a thread (see `StreamedLayers`).
    with without_threads() if device.type == "cuda" else contextlib.nullcontext():
        done, _ = convert_and_load_state_dict_in_model(model, stored, config)
    problems = [*done.conversion_errors, *(name for name, *_ in done.mismatched_keys), *done.error_msgs]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: {problems[0]} cannot be loaded")
    return set(done.missing_keys)


def _read_layer(
    twin: Any,
    layers: nn.ModuleList,
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    index: int,
) -> LayerState:
    """The weights of one layer, read and converted in a twin of the model, which stays empty."""
    prefix = family.layer_prefix(index)
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    _fill(twin, checkpoint, names, dtype, device)
    state: LayerState = layers[index].state_dict()
    release(layers[index])
    lacking = [name for name, value in state.items() if value.is_meta]
    if lacking:
        raise CheckpointError(f"{checkpoint.folder}: no file holds {prefix}{lacking[0]}")
    # A tensor that runs as it is stored may be a view of the mapped file, which may be read again and
    # again: copy it.
    return {name: value.clone() if checkpoint.maps(prefix + name, value) else value for name, value in state.items()}
