"""Real models that come as Python packages, so that they need no hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Self

import yaml
from pydantic import model_validator

from expertprune.arch.blocks import Data


class PackagedFile(Data):
    """A file inside an installed package, whose `module` is found but not run."""

    module: str
    file: str


class BundledModel(Data):
    """A model that comes as a package: the GGUF `file` inside the installed `module`.

    A model that is too large for one package comes in several `files`. Their bytes in this order
    are the file with the digest `sha256`. The output matrix of a `tied` model is its embedding, though
    the file stores both. `hub` is its id on the hub, and `licence` the hub's word for its licence.
    """

    file: str
    module: str | None = None
    files: tuple[PackagedFile, ...] = ()
    sha256: str | None = None
    tied: bool = False
    install: str
    hub: str | None = None
    licence: str

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.module is None) == (not self.files) or bool(self.files) != (self.sha256 is not None):
            raise ValueError("a bundled model needs either a module, or files and the sha256 of their whole")
        return self

    @property
    def packaged(self) -> tuple[PackagedFile, ...]:
        """The files that hold its bytes, in order."""
        return self.files if self.module is None else (PackagedFile(module=self.module, file=self.file),)


@functools.cache
def bundled_models() -> dict[str, BundledModel]:
    """Every bundled model by name."""
    data = yaml.safe_load((Path(__file__).parent / "bundled.yaml").read_text(encoding="utf-8"))
    return {name: BundledModel.model_validate(entry) for name, entry in data.items()}
