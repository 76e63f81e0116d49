"""A PEFT LoRA adapter's folder: its config, and its tensors by their headers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, as_model, not_a_folder, read_object
from expertprune.models.checkpoint import headers, opened_weights
from expertprune.models.tensorfile import DTYPES, TensorInfo

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")

# Keys of PEFT under which the tensors mean something else than `scaling * B @ A` beside the base's weights.
_REFUSED = {
    "layer_replication": "layers of the base that stand several times",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal matrices (BD-LoRA)",
    "kasa_config": "a base without its smallest singular values (KaSA)",
    "monteclora_config": "sampled weights (MonteCLoRA)",
    "arrow_config": "routing between adapters (Arrow)",
}
# Ways to begin that leave the base as it is. Others change its weights: PiSSA whenever PEFT loads the adapter, LoRA-GA
# when it is trained.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")


class AdapterConfig(BaseModel):
    """What cutting needs of `adapter_config.json`; all other keys are carried over unread."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: str
    r: int = Field(default=8, ge=1)
    rank_pattern: dict[str, int] | None = None
    base_model_name_or_path: str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    alpha_pattern: dict[str, Any] | None = None
    trainable_token_indices: Any = None
    alora_invocation_tokens: Any = None

    @property
    def ranks(self) -> set[int]:
        return {self.r, *(self.rank_pattern or {}).values()}

    @property
    def names(self) -> list[str]:
        """All names and patterns of modules."""
        modules = self.target_modules or []
        listed = [modules] if isinstance(modules, str) else modules
        return [*listed, *(self.target_parameters or ()), *(self.rank_pattern or ()), *(self.alpha_pattern or ())]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        document: the contents of `adapter_config.json`.
    """

    folder: Path
    config: AdapterConfig
    document: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read and check the config of an adapter, and look for its weights.

        Raises:
            CheckpointError: the folder is no adapter, has pickled weights only, or is of a kind that cannot be cut.
        """
        if problem := not_a_folder(folder):
            raise CheckpointError(
                f"{folder}: {problem}; download an adapter of the hub first: "
                f"hf download OWNER/NAME --local-dir {folder.name or 'DIR'}"
            )
        path = folder / ADAPTER_CONFIG
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder}: is no PEFT adapter (it has no {ADAPTER_CONFIG})")
        document = read_object(path)
        config = as_model(document, AdapterConfig, str(path))
        _refuse_other_kinds(config, document, path)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            pickle = next((name for name in _PICKLES if (folder / name).is_file()), None)
            raise CheckpointError(
                f"{folder}: has no {ADAPTER_WEIGHTS}"
                if pickle is None
                else f"{folder}: holds only {pickle}, a pickle, which could run code when read; save the adapter as "
                f"{ADAPTER_WEIGHTS}"
            )
        return cls(folder, config, document)

    @property
    def weights(self) -> Path:
        return self.folder / ADAPTER_WEIGHTS

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The headers of all tensors; raises `CheckpointError` where the file is damaged or of other dtypes."""
        found = headers(self.weights)
        if not found:
            raise CheckpointError(f"{self.weights}: holds no tensors")
        for name, info in found.items():
            if info.dtype not in DTYPES or not DTYPES[info.dtype].is_floating_point:
                raise CheckpointError(f"{self.weights}: {name} is stored as {info.dtype}, which cannot be cut")
        return found

    def read(self, name: str) -> Tensor:
        """One tensor; raises `CheckpointError` where it holds values that are not finite."""
        with opened_weights(self.weights) as file:
            tensor: Tensor = file.get_tensor(name)
        if not bool(tensor.to(torch.float32).isfinite().all()):
            raise CheckpointError(f"{self.weights}: {name} holds values that are not finite; train or fetch it again")
        return tensor


def same_name(recorded: str, said: str) -> bool:
    """Whether two names are of one model: a hub id, a path, or the last part of one.

    Two hub ids must agree whole; other names in their last part. A snapshot in the hub's cache counts as its hub id.
    """
    first, second = (_plain(name).casefold() for name in (recorded, said))
    if first.count("/") == second.count("/") == 1:
        return first == second
    return bool(first and second) and first.rpartition("/")[2] == second.rpartition("/")[2]


def _plain(name: str) -> str:
    """A name without what says nothing of the model."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$", name)
    return f"{cached[1]}/{cached[2]}" if cached is not None else name.rstrip("/").removeprefix("./")


def _refuse_other_kinds(config: AdapterConfig, document: Mapping[str, Any], path: Path) -> None:
    if config.peft_type != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.peft_type}, and only LORA can be cut along")
    for key, what in _REFUSED.items():
        if document.get(key):
            raise CheckpointError(f"{path}: {key}: an adapter with {what} cannot be cut along")
    if config.bias != "none":
        raise CheckpointError(
            f"{path}: bias is {config.bias!r}: biases of the base that were trained cannot be cut along; train the "
            "adapter with bias: none"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _BEGINNINGS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}, which changes the base's weights in PEFT; "
            "convert it to a plain one first (path_initial_model_for_weight_conversion in PEFT)"
        )
    if wrong := [rank for rank in config.ranks if rank < 1]:
        raise CheckpointError(f"{path}: rank_pattern: a rank is {wrong[0]}, and must be at least 1")
