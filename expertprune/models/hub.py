"""Models of the Hugging Face hub: all but the weights at first, the weights when they are needed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from expertprune.arch import bundled_models
from expertprune.errors import CheckpointError, SpecError, first_line
from expertprune.files import file_digest, read_kept, require_room
from expertprune.models.checkpoint import INDEX, SINGLE, Checkpoint
from expertprune.models.tensorfile import TensorInfo
from expertprune.progress import Track
from expertprune.registry import nearest

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


def hub_checkpoint(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    """A model of the hub in the local cache. Of weights that are not there, only the headers are read now.

    Raises:
        SpecError: there is no such model, or the hub cannot be reached.
        CheckpointError: its weights are in no safetensors.
    """
    from huggingface_hub import snapshot_download

    code = ["*.py"] if trust_remote_code else []
    with _hub_errors(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL, *code]))
    if _has_weights(folder):
        return Checkpoint(folder)
    return Checkpoint(folder, HubWeights(name, folder))


def _has_weights(folder: Path) -> bool:
    """Whether all files are there that the index names; a damaged index is the checkpoint's to refuse."""
    if not (folder / INDEX).is_file():
        return (folder / SINGLE).is_file()
    index = read_kept(folder / INDEX, _Index)
    return index is None or all((folder / file).is_file() for file in set(index.weight_map.values()))


class _Index(BaseModel):
    """Which file holds each tensor."""

    weight_map: dict[str, str]


class HubWeights:
    """Weights that are still on the hub."""

    def __init__(self, name: str, folder: Path) -> None:
        from huggingface_hub import get_safetensors_metadata
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        self.name, self.folder = name, folder
        self._commit = folder.name  # the cache names a snapshot by its commit
        try:
            with _hub_errors(name):
                found: Any = get_safetensors_metadata(name, revision=self._commit)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"base.model: {name!r}: {first_line(error)}") from None
        self.tensors: Mapping[str, TensorInfo] = {
            tensor: TensorInfo(file, tuple(info.shape), info.dtype)
            for file, header in found.files_metadata.items()
            for tensor, info in header.tensors.items()
        }

    def fetch(self, track: Track) -> None:
        """Download the files that the index names, with the hub's own progress bars."""
        from huggingface_hub import snapshot_download

        require_room(self.folder, sum(info.bytes for info in self.tensors.values()))
        files = sorted({info.file for info in self.tensors.values()})
        with _hub_errors(self.name):
            snapshot_download(self.name, revision=self._commit, allow_patterns=files)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (LocalEntryNotFoundError, ConnectionError):
        raise SpecError(
            f"base.model: {name!r} is not in the local cache and the hub cannot be reached; "
            f"download it where there is a network, or use a folder or a bundled model{nearest('', bundled_models())}"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise SpecError(f"base.model: {name!r}: {first_line(error)}") from None


def weights_digest(path: Path, store: Path) -> str:
    """SHA-256 of a file of weights. The hub's cache names such files by it, so those are not read."""
    if path.is_symlink():
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return blob.name
    return file_digest(path, store)
