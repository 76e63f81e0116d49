"""Which models can be cut: causal language models of a known kind, not quantized."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from expertprune.arch import Family, families, grouped, recognized
from expertprune.errors import CheckpointError
from expertprune.files import ADAPTER_CONFIG, read_object
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.encodings import READ
from expertprune.registry import nearest

log = logging.getLogger(__name__)


_ORDER = f"of quantized models, {READ} are read; of others, prune the unquantized model first, then quantize the expert"


# Config keys of unlisted families that give the number of routed experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def causal_family(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Family:
    """The family of a folder's model: a listed one, or one recognized by its shapes (then the log says so).

    Raises:
        CheckpointError: the model is quantized, no causal language model, of no known kind, has an adapter beside its
            weights, or comes with code of its own that nobody allowed.
    """
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    if (checkpoint.folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{checkpoint.folder / ADAPTER_CONFIG}: an adapter lies beside the weights, which transformers would add to "
            "them; move it away"
        )
    _refuse_quantized(checkpoint)
    _refuse_other_kinds(config, where)
    model_type = config.get("model_type")
    if model_type in families():
        return families()[model_type]
    own_code = bool(config.get("auto_map")) and not _in_transformers(model_type)
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} comes with Python code of its own (auto_map: "
            f"{', '.join(code_files(checkpoint.folder))}), which is not run unless you give --trust-remote-code"
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


def code_files(folder: Path) -> list[str]:
    """The Python files that transformers would run to load a folder's model and tokenizer."""
    named: list[str] = []
    for file in ("config.json", "tokenizer_config.json"):
        listed = read_object(folder / file).get("auto_map")
        for entry in listed.values() if isinstance(listed, dict) else ():
            named += [each for each in (entry if isinstance(entry, list) else [entry]) if isinstance(each, str)]
    return sorted({f"{name.rpartition('.')[0].replace('--', ': ')}.py" for name in named})


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if quantization := checkpoint.quantization:
        named = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: the model is quantized ({named or 'unknown'}); {_ORDER}"
        )
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
    """Refuse mixtures of experts without a family file: shapes do not say how the router chooses."""
    count = next((key for key in _EXPERTS if isinstance(config.get(key), int) and config[key] > 1), None)
    if count is None:
        return
    groups = next((f", in groups ({key}: {config[key]})" for key in grouped(config)), "")
    known = ", ".join(sorted(name for name, family in families().items() if family.experts is not None))
    raise CheckpointError(
        f"{where}: model_type {config.get('model_type')!r} routes tokens to experts ({count}: {config[count]}){groups}, and "
        f"no file says how; those that can be cut: {known}; docs/families.md in the source says how to describe one"
    )


def _in_transformers(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
