"""A base that runs: its model and tokenizer, and other folders run as the base is."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.inventory import checked_layers
from expertprune.models.loading import load_model
from expertprune.models.spool import Limits
from expertprune.models.states import KeptStates
from expertprune.models.streaming import load_streamed

MARGIN = 0.7  # of what is free; the rest is for hidden states and the work on one batch


class RunningBase:
    """The model of a base, which is loaded at its first use and kept.

    The model's layers are resident or streamed, as the base says and memory allows. Run it with
    `TextRun`; only where `is_streamed(model)` is false can it be called as a whole.

    Attributes:
        weights: statistics of the weights of each layer, by name; the profiles of all corpora share them.
        states: where passes over calibration text leave hidden states for repairs; `None`: they leave none.
    """

    def __init__(self, base: ResolvedBase) -> None:
        self.base = base
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.states: KeptStates | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in vars(self)

    def keep_states(self, lasting: bool = False) -> None:
        """From now on, passes over calibration text leave hidden states for repairs, where there is room.

        Args:
            lasting: there will be several repairs.
        """
        self.states = KeptStates(lasting)

    @cached_property
    def model(self) -> Any:
        return run_checkpoint(self.base.checkpoint, self.base)


def run_folder(folder: Path, base: ResolvedBase) -> Any:
    """A folder's model, run as the base is: dtype, device, source of layers, trust."""
    return run_checkpoint(_checked(folder, base), base)


def stream_folder(folder: Path, base: ResolvedBase) -> Any:
    """The same, but its layers are always streamed, so it is never whole in memory beside the base.

    A quantized model is the exception: only transformers' whole model dequantizes it.
    """
    checkpoint, limits = _checked(folder, base), Limits.of_environment()
    if checkpoint.quantization:
        return run_checkpoint(checkpoint, base)
    return load_streamed(checkpoint, base.family, base.dtype, base.device, limits, base.trust_remote_code)


def _checked(folder: Path, base: ResolvedBase) -> Checkpoint:
    """The checkpoint of a folder whose sizes and widths are those of its weights, as those of a base are."""
    checkpoint = Checkpoint(folder)
    checked_layers(checkpoint, base.family)
    return checkpoint


def run_checkpoint(checkpoint: Checkpoint, base: ResolvedBase) -> Any:
    """A checkpoint's model, run as the base is."""
    checkpoint.fetch()
    limits, trust = Limits.of_environment(), base.trust_remote_code
    if to_stream(checkpoint, base, limits):
        return load_streamed(checkpoint, base.family, base.dtype, base.device, limits, trust)
    return load_model(checkpoint.folder, base.dtype, base.device, trust)


def to_stream(checkpoint: Checkpoint, base: ResolvedBase, limits: Limits) -> bool:
    """Whether layers are streamed: as the base says, or because the weights do not fit the device's memory."""
    if checkpoint.quantization:
        return False
    if base.source == "auto":
        return weight_bytes(checkpoint, base.dtype) > MARGIN * limits.free(base.device)
    return base.source == "streamed"


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The memory of a resident model's weights."""
    return checkpoint.parameters * torch.empty(0, dtype=dtype).element_size()
