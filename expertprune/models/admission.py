"""What a folder must be so that its model can be cut: of a known kind, not quantized, complete."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expertprune.arch import GROUPS, PER_LAYER, Family, families, recognized, stock_architectures
from expertprune.arch.per_layer import with_layer_widths
from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import Checkpoint
from expertprune.registry import nearest
from expertprune.units import LayerShape

log = logging.getLogger(__name__)


_ORDER = "prune the unquantized model first, then quantize the expert"


# Config keys of unlisted families that say how many experts there are.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


# Buffers that older checkpoints stored and newer models compute.
_COMPUTED = r"rotary_emb\.inv_freq$"


def causal_family(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Family:
    """The family of a folder's model: listed, or recognized by its shapes, in which case the log says so.

    Raises:
        CheckpointError: the model is quantized, no causal language model, of no known kind, or comes with code of its own
            that nobody allowed.
    """
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    _refuse_quantized(checkpoint)
    _refuse_other_kinds(config, where)
    model_type = config.get("model_type")
    if model_type in families():
        return families()[model_type]
    own_code = bool(config.get("auto_map")) and not _in_transformers(model_type)
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} comes with Python code of its own (auto_map), which is not run unless the "
            "spec says base.trust_remote_code: true"
        )
    _refuse_unknown_experts(config, where)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    family = recognized(config, shapes) if own_code or _in_transformers(model_type) else None
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported{nearest(str(model_type), families())}"
        )
    log.warning(
        "%s: model_type %r is not listed; its tensors look like a gated FFN (%s) and an attention of heads (%s), so it is "
        "taken for one and checked on a tiny random copy",
        where, model_type, family.ffn.output, family.attention.output,
    )  # fmt: skip
    return family


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    for key in ("quantization_config", "compression_config"):
        if quantization := config.get(key):
            named = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{where}: the model is quantized ({named or 'unknown'}); {_ORDER}")
    for name, info in checkpoint.tensors.items():
        if len(info.shape) > 1 and info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} and others are stored as {info.dtype}, so they are quantized; {_ORDER}"
            )


def _refuse_other_kinds(config: dict[str, Any], where: Path) -> None:
    architectures = config.get("architectures") or []
    names = ", ".join(architectures) or str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{where}: {names} is an encoder-decoder, no causal language model")
    if parts := [key for key in ("vision_config", "audio_config") if config.get(key)]:
        raise CheckpointError(
            f"{where}: {names} reads more than text ({', '.join(parts)}), so it is no causal language model; save its text "
            "model as a folder of its own"
        )
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise CheckpointError(f"{where}: {names} is no causal language model")


def _refuse_unknown_experts(config: dict[str, Any], where: Path) -> None:
    """A mixture of experts is cut only by a family's file: the shapes of its weights do not say how its router chooses."""
    count = next((key for key in _EXPERTS if isinstance(config.get(key), int) and config[key] > 1), None)
    if count is None:
        return
    groups = next((f", in groups ({key}: {config[key]})" for key in GROUPS if (config.get(key) or 0) > 1), "")
    known = ", ".join(sorted(name for name, family in families().items() if family.experts is not None))
    raise CheckpointError(
        f"{where}: model_type {config.get('model_type')!r} routes tokens to experts ({count}: {config[count]}){groups}, and "
        f"no file says how; those that can be cut: {known}; docs/families.md in the source says how to describe one"
    )


def _in_transformers(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_inventory(
    checkpoint: Checkpoint, family: Family, shapes: Sequence[LayerShape], trust_remote_code: bool = False
) -> None:
    """Hold a folder's tensors against those of the model that its config describes, which is built without memory.

    Raises:
        CheckpointError: tensors are missing, unknown to the model, or of other shapes; the message names them.
    """
    config = checkpoint.folder / "config.json"
    try:
        with torch.device("meta"):
            model = build(checkpoint.folder, trust_remote_code)
    except (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{config}: transformers builds no model from it: {_first_line(error)}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = "|".join([_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])])
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = _stored_otherwise(family, shapes)
    for run, names in stored.items():  # experts that are stored one by one; `check_widths` has looked for them
        if run not in found:
            expected.pop(run, None)
            expected |= {name: found[name] for name in names if name in found}
    problems = [f"{name} is missing" for name in expected if name not in found and name not in tied]
    problems += [
        f"{name} belongs to no part of the model"
        for name in found
        if name not in expected and not re.search(ignored, name)
    ]
    problems += [
        f"{name} is {list(shape)}, the config makes it {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.folder}: config.json disagrees with the weights: {'; '.join(problems[:5])}{rest}"
        )


def _stored_otherwise(family: Family, shapes: Sequence[LayerShape]) -> dict[str, tuple[str, ...]]:
    """Names of tensors of the running model that may be stored under others, and those."""
    if family.experts is None:
        return {}
    return {
        family.layer_prefix(layer) + run.name: tuple(
            family.layer_prefix(layer) + name for name in family.experts.on_disk(run.name, shape.experts)
        )
        for layer, shape in enumerate(shapes)
        for run in family.experts.run
    }


def build(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's model with whatever weights its class begins with, on torch's current default device."""
    transformers = quiet_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    made = model_class(folder)
    if hasattr(made, "from_config"):
        return made.from_config(config, trust_remote_code=trust_remote_code)
    return made(config)


def model_class(folder: Path) -> Any:
    """What builds a folder's model; one whose layers have widths of their own is built by this package's code."""
    transformers = quiet_transformers()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get(PER_LAYER):
        return transformers.AutoModelForCausalLM
    family = families().get(config["model_type"])
    return with_layer_widths(class_of(config), family.layers if family else "")


def class_of(config: dict[str, Any]) -> Any:
    """The class in transformers, or registered with it, that builds a config's model."""
    transformers = quiet_transformers()
    (name, *_) = stock_architectures(config)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    return transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[config["model_type"]]]


@functools.cache
def quiet_transformers() -> Any:
    """transformers, with its progress bars and advice off unless the user asked for logs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if not log.isEnabledFor(logging.INFO):
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
