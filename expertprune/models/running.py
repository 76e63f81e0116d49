"""A base that runs: its model and tokenizer, and other folders run as the base is."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model, load_tokenizer


class RunningBase:
    """The model and the tokenizer of a base; each is loaded at its first use and kept."""

    def __init__(self, base: ResolvedBase) -> None:
        self.base = base

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in vars(self)

    @cached_property
    def model(self) -> Any:
        self.base.checkpoint.fetch()
        return run_folder(self.base.folder, self.base)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base.folder, self.base.trust_remote_code)


def run_folder(folder: Path, base: ResolvedBase) -> Any:
    """A folder's model, in the dtype and with the trust of the base."""
    return load_model(folder, base.dtype, trust_remote_code=base.trust_remote_code)
