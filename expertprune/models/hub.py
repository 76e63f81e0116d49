"""Models of the Hugging Face hub: all but the weights at first, the weights when they are needed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from expertprune.arch import bundled_models
from expertprune.errors import CheckpointError, ExpertpruneError, SpecError, UsageError, first_line
from expertprune.files import known_digest, read_kept, require_room
from expertprune.models.checkpoint import INDEX, SINGLE, Checkpoint
from expertprune.models.tensorfile import TensorInfo, absent_bytes
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
    with _base_errors(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL, *code]))
    if _has_weights(folder):
        return Checkpoint(folder)
    return Checkpoint(folder, HubWeights(name, folder))


def _has_weights(folder: Path) -> bool:
    """Whether the one file is there, or all that the index names; a damaged index is the checkpoint's to refuse."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return (folder / SINGLE).is_file()
    index = read_kept(folder / INDEX, _Index)
    return index is None or all((folder / file).is_file() for file in set(index.weight_map.values()))


class _Index(BaseModel):
    """Which file holds each tensor."""

    weight_map: dict[str, str]


class HubWeights:
    """Weights that are still on the hub."""

    def __init__(self, name: str, folder: Path) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        self.name, self.folder = name, folder
        self._commit = folder.name  # the cache names a snapshot by its commit
        try:
            with _base_errors(name):
                found: Any = HfApi().get_safetensors_metadata(name, revision=self._commit)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"base.model: {name!r}: {first_line(error)}") from None
        self.tensors: Mapping[str, TensorInfo] = {
            tensor: TensorInfo(file, tuple(info.shape), info.dtype)
            for file, header in found.files_metadata.items()
            for tensor, info in header.tensors.items()
        }

    def fetch(self, track: Track) -> None:
        """Download the files whose headers were read, with the hub's own progress bars."""
        from huggingface_hub import snapshot_download

        require_room(self.folder, absent_bytes(self.folder, self.tensors))
        files = sorted({info.file for info in self.tensors.values()})
        with _base_errors(self.name), _bars():
            snapshot_download(self.name, revision=self._commit, allow_patterns=files)


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The hub's progress bars on: `transformers`, made quiet, has turned them off."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    off = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        yield
    finally:
        if off:
            disable_progress_bars()


@contextlib.contextmanager
def _base_errors(name: str) -> Iterator[None]:
    """Raises `SpecError` for what the hub says of a base."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with hub_errors(f"base.model: {name!r}", name, SpecError):
            yield
    except LocalEntryNotFoundError:
        raise SpecError(
            f"base.model: {name!r} is not in the local cache and the hub cannot be reached; "
            f"download it where there is a network, or use a folder or a bundled model{nearest('', bundled_models())}"
        ) from None


@contextlib.contextmanager
def hub_errors(what: str, name: str, kind: type[ExpertpruneError] = UsageError) -> Iterator[None]:
    """Turn what the hub refuses, and a network that fails, into one line that says the fix.

    Args:
        what: what the line begins with: the repository, and the key or option that names it.
        name: of the repository, `owner/name`.
        kind: the error that is raised.

    Raises:
        LocalEntryNotFoundError: files are not in the cache, and the hub cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        raise kind(f"{what}: {_refusal(name, error)}") from None
    except HFValidationError as error:
        raise kind(f"{what}: {first_line(error)}") from None
    except (HTTPError, ConnectionError) as error:
        raise kind(f"{what}: the hub cannot be reached ({first_line(error)})") from None


def _refusal(name: str, error: Any) -> str:
    """What the hub refuses, and what to do about it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        token = "take the token of that account" if get_token() else "set HF_TOKEN to a token of that account"
        return f"is gated: accept the licence at {HfApi().endpoint}/{name}, and {token}"
    if isinstance(error, RepositoryNotFoundError):
        private = "HF_TOKEN may not read it" if get_token() else "it is private: set HF_TOKEN"
        return f"the hub has no such repository, or {private}"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision (base.revision)"
    if status == 401:
        return "the hub does not accept the token; set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token may not do this; set HF_TOKEN to one that may ({first_line(error)})"
    return first_line(error)


def known_weights_digest(path: Path, store: Path) -> str | None:
    """SHA-256 of a file of weights where it is known: the store remembers it, or the hub's cache names the file by it."""
    if path.is_symlink():
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return blob.name
    return known_digest(path, store)
