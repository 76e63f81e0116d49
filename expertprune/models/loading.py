"""Load a model or a tokenizer from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from expertprune.arch import attention_of
from expertprune.errors import CheckpointError
from expertprune.models.admission import model_class, quiet_transformers


def run_dtype(wanted: str, stored: torch.dtype) -> torch.dtype:
    """As stored on a GPU. On a CPU float32: many run it faster than 16-bit products, and all run it more exactly."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    return stored if default_device().type == "cuda" else torch.float32


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device | None = None, trust_remote_code: bool = False
) -> Any:
    """A `transformers` causal language model in evaluation mode, without gradients.

    One whose layers have widths of their own is built by this package's code, not by the copy in its folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = model_class(folder).from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attention_of(config)
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device or default_device()).eval().requires_grad_(False)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer."""
    try:
        return quiet_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
