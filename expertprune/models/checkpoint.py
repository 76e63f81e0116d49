"""Safetensors checkpoints: read lazily, shard by shard, and written with changed tensors."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertprune.errors import CheckpointError, under
from expertprune.files import EXPERT_FILE, PAGE, PAGE_SUFFIXES, is_report, not_a_file, read_object, user_path
from expertprune.models.encodings import Encoding, encoding_of
from expertprune.models.tensorfile import DTYPES, TensorInfo
from expertprune.progress import Track, shown

INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


CONFIG = "config.json"
_PART = 2**22  # values that are checked at a time: what a check holds is larger than its tensor


# Files in other formats of weights, which must not be carried into an expert.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}


# transformers keeps chat templates beyond the default one in a folder of their own.
_CARRIED_FOLDERS = ("additional_chat_templates",)


_NOT_CARRIED = {CONFIG, "README.md", EXPERT_FILE, INDEX, "pytorch_model.bin.index.json", ".gitattributes"}


class Pending(Protocol):
    """Weights that are not in their folder yet, though their headers are known.

    `tensors` are those that will be there, as they will be stored.
    """

    tensors: Mapping[str, TensorInfo]

    def fetch(self, track: Track) -> None:
        """Put the weights into the folder."""


@dataclass(frozen=True)
class Deferred:
    """A tensor that is read when it is indexed, in the form in which transformers takes tensors of open files."""

    checkpoint: Checkpoint
    name: str

    def get_dtype(self) -> str:
        return self.checkpoint.tensors[self.name].dtype

    def get_shape(self) -> list[int]:
        return list(self.checkpoint.tensors[self.name].shape)

    def __getitem__(self, key: Any) -> Tensor:
        return self.checkpoint.read(self.name)[key]


def check_link(path: Path, folder: Path) -> None:
    """Check that a path in a model's folder does not lead out of it.

    The hub's own cache is the exception: its snapshots consist of links into the folder of its blobs.

    Raises:
        CheckpointError: it is a link to a file elsewhere.
    """
    place, inside = path.resolve(), [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    if path.is_symlink() and not any(place.is_relative_to(each) for each in inside):
        raise CheckpointError(
            f"{path}: is a link to a file outside the folder ({place}); copy that file here, or remove the link"
        )


class Checkpoint:
    """A model folder: its config and the headers of its tensors. Tensors are read when they are asked for.

    What is stored in FP8 blocks or in MXFP4 appears as bfloat16 (see `encodings`), and `config` without its
    `quantization_config`.

    Attributes:
        encoding: how tensors are stored, where it is not as they are.
        left_out: tensors that are stored, and are treated as if they were not.
        pending: fetches the weights, where only their headers are here yet.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or holds pickled weights only.
    """

    encoding: Encoding | None = None
    left_out: Mapping[str, TensorInfo] = MappingProxyType({})
    pending: Pending | None = None
    _tied: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: Path, pending: Pending | None = None) -> None:
        self.folder, self.pending = folder, pending
        self._opened: dict[str, tuple[tuple[int, ...] | None, Any]] = {}
        self._check_links()
        self._seen = {CONFIG: _stamp(folder / CONFIG)}
        self.config = _read_config(folder / CONFIG)
        self.encoding = encoding_of(self.config)
        if self.encoding is not None:
            del self.config["quantization_config"]
        self._take(self._headers() if pending is None else dict(pending.tensors))

    def _take(self, stored: dict[str, TensorInfo]) -> None:
        self._stored = stored
        with under(str(self.folder)):
            found = stored if self.encoding is None else self.encoding.decoded(stored)
        self.tensors = {name: info for name, info in found.items() if name not in self.left_out}

    def leave_out(self, names: Collection[str], settings: Mapping[str, Any]) -> None:
        """Treat some tensors as if they were not stored; `settings` are what the config then says."""
        self.left_out = {name: self.tensors[name] for name in names}
        self.config |= settings
        self._take(self._stored)

    def leaves_out_of(self, file: str) -> bool:
        """Whether a file holds tensors that are left out."""
        return any(info.file == file for info in self.left_out.values())

    def _headers(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for file in self.shards:
            self._seen[file] = _stamp(self.folder / file)
            found |= headers(self.folder / file)
        self.check_unchanged(CONFIG)
        if self.has_index and (missing := sorted(set(self._weight_map) - set(found))):
            raise CheckpointError(f"{self.folder / INDEX}: lists tensors that no file holds: {', '.join(missing[:3])}")
        return found

    def check_unchanged(self, *files: str) -> None:
        """Raises `CheckpointError` where a file is another one than when its header was read.

        Args:
            files: names, of config.json and the shards; default: all of them.
        """
        for file in files or self._seen:
            if _stamp(self.folder / file) != self._seen[file]:
                raise CheckpointError(f"{self.folder / file}: was replaced while it was read; run the command again")

    def fetch(self, track: Track = shown) -> None:
        """Put weights that are not here yet into the folder; whoever watches this thread sees it.

        Raises:
            CheckpointError: they are not those that their headers promised, or the disk has no room.
        """
        if self.pending is None:
            return
        promised = self._stored
        self.pending.fetch(track)
        self.pending, self._seen = None, {CONFIG: _stamp(self.folder / CONFIG)}
        self._take(self._headers())
        if changed := [name for name, info in promised.items() if self._stored.get(name) != info]:
            raise CheckpointError(f"{self.folder}: {changed[0]} is not what the headers said; fetch the model again")
        self.check_tied(self._tied)

    def check_tied(self, pairs: Mapping[str, str]) -> None:
        """Check that tensors which the config ties are the same where both are stored; weights that are still to come,
        once they are here.

        Args:
            pairs: from tensors to those that they are tied to.

        Raises:
            CheckpointError: two differ, so that transformers runs both, and other programs one in place of the other.
        """
        self._tied = {name: other for name, other in pairs.items() if {name, other} <= self.tensors.keys()}
        if self.pending is not None:
            return
        for name, other in self._tied.items():
            one, two = (self.read_finite(each).to(self.dtype) for each in (name, other))
            if not torch.equal(one, two):
                raise CheckpointError(
                    f"{self.folder}: {name} is stored and is not {other}, though config.json ties them; set "
                    "tie_word_embeddings: false in config.json"
                )

    def _check_links(self) -> None:
        """Raises `CheckpointError` for a link to a file outside the folder, whose content the expert would take over."""
        folders = [self.folder / name for name in _CARRIED_FOLDERS]
        for path in (*self.folder.glob("*"), *(file for folder in folders for file in folder.glob("*"))):
            if path in folders or not path.is_dir():
                check_link(path, self.folder)

    @property
    def _weight_map(self) -> dict[str, str]:
        """The index: from tensors to files."""
        listed = read_own_json(self.folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{self.folder / INDEX}: its weight_map does not map tensors to files")
        return listed

    @property
    def has_index(self) -> bool:
        """Whether the weights are in the files that an index names: one file of the usual name counts before it, as in
        transformers."""
        return (self.folder / INDEX).is_file() and not (self.folder / SINGLE).is_file()

    @property
    def passed_over(self) -> list[str]:
        """Files that an index names, though the weights are those of the one file beside it."""
        if not (self.folder / INDEX).is_file() or self.shards != [SINGLE]:
            return []
        return sorted(set(self._weight_map.values()) - {SINGLE})

    @property
    def shards(self) -> list[str]:
        """File names of the weights, in order."""
        if self.pending is not None:
            return sorted({info.file for info in self.pending.tensors.values()})
        if self.has_index:
            listed = sorted(set(self._weight_map.values()))
            for file in listed:
                try:
                    plain = user_path(file).name == file
                except ValueError:
                    plain = False
                if not plain:
                    raise CheckpointError(f"{self.folder / INDEX}: {file[:40]!r} is no plain file name")
            return listed
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        found = [path.name for path in self.folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
        reason = (
            f"only {found[0]}, which could run code when read; convert it to safetensors" if found else "no weights"
        )
        raise CheckpointError(f"{self.folder}: holds {reason} ({SINGLE} or {INDEX} is expected)")

    @property
    def carried_files(self) -> list[Path]:
        """Files that an expert takes over unchanged: tokenizer, chat template, generation config, licence."""
        below = [path for name in _CARRIED_FOLDERS for path in (self.folder / name).glob("*")]
        return sorted(
            path
            for path in [*self.folder.iterdir(), *below]
            if path.is_file()
            and path.suffix not in _WEIGHT_SUFFIXES
            and path.name not in _NOT_CARRIED
            and not is_report(path.name)
            and not (path.suffix.lower() in PAGE_SUFFIXES and PAGE.made(path))  # of a name that the user chose
            and not path.name.endswith(".partial")
        )

    @property
    def parameters(self) -> int:
        return sum(info.parameters for info in self.tensors.values())

    def stored_bytes(self, names: Collection[str] | None = None) -> int:
        """Bytes of some tensors as they are stored, with their scales, or of all that do not count as left out."""
        chosen = list(self.tensors if names is None else names)
        if self.encoding is not None:
            chosen = [part for name in chosen for part in self.encoding.parts(name, self._stored)]
        return sum(self._stored[name].bytes for name in chosen)

    @property
    def quantization(self) -> Any:
        """What the config says of a quantization that is not decoded here; `None` or empty where it says nothing."""
        return self.config.get("quantization_config") or self.config.get("compression_config")

    @property
    def weight_bytes(self) -> int:
        """Size of the weights' files; of their values alone, where some count otherwise or are not here yet."""
        if self.encoding is not None or self.pending is not None or self.left_out:
            return sum(info.bytes for info in self.tensors.values())
        return sum((self.folder / file).stat().st_size for file in self.shards)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.parameters
        name = max(counts, key=lambda key: counts[key])
        if name not in DTYPES or not DTYPES[name].is_floating_point:
            raise CheckpointError(
                f"{self.folder}: weights are stored as {name}, so they are quantized; prune the unquantized model "
                "first, then quantize the expert"
            )
        return DTYPES[name]

    def read(self, name: str) -> Tensor:
        """One tensor, read now. Where it is not decoded, its memory is the file's, mapped."""
        self.fetch()
        if self.encoding is not None:
            return self.encoding.read(name, self._stored, self._as_stored)
        return self._as_stored(name)

    def read_finite(self, name: str) -> Tensor:
        """The same; raises `CheckpointError` if the tensor holds NaN or infinity."""
        tensor = self.read(name)
        parts = tensor.flatten().split(_PART) if tensor.is_floating_point() else ()
        if not all(bool(part.isfinite().all()) for part in parts):
            where = self.folder / self.tensors[name].file
            raise CheckpointError(f"{where}: {name} holds values that are not finite; fetch it again")
        return tensor

    def _as_stored(self, name: str) -> Tensor:
        file = self._stored[name].file
        opened = self._opened.get(file)
        if opened is None or opened[0] != self._seen[file]:  # opening reads the header of all tensors of the file
            opened = self._opened[file] = (self._seen[file], opened_weights(self.folder / file))
        self.check_unchanged(file)
        tensor: Tensor = opened[1].get_tensor(name)
        return tensor

    def maps(self, name: str, value: Tensor) -> bool:
        """Whether a tensor that came from `read` may still lie in the file's memory."""
        info = self.tensors.get(name)
        as_stored = info is not None and DTYPES.get(info.dtype) == value.dtype
        return self.encoding is None and as_stored and value.device.type == "cpu"

    def deferred(self) -> dict[str, Deferred]:
        """All tensors, none of them read yet: a `state_dict` for transformers' `from_pretrained`."""
        self.fetch()
        return {name: Deferred(self, name) for name in self.tensors}


def _stamp(path: Path) -> tuple[int, ...] | None:
    """It changes when a file is replaced or written to."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, none of them read; raises `CheckpointError` for a damaged file."""
    with opened_weights(path) as shard:
        parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - the handle is no mapping
        return {name: TensorInfo(path.name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def opened_weights(path: Path) -> Any:
    """A safetensors file, open for reading; raises `CheckpointError` where it is missing, no file, or damaged."""
    if problem := not_a_file(path):  # the library would wait for somebody who writes into a FIFO
        raise CheckpointError(f"{path}: {problem}, though the folder's index names it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); fetch or copy the file again") from None


def _read_config(path: Path) -> dict[str, Any]:
    """A model's config; raises `CheckpointError` where a key that says what it is holds something else than names."""
    config = read_own_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(config.get("model_type"), str | None):
        raise CheckpointError(f"{path}: model_type: must be a name (found {config['model_type']!r})")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{path}: architectures: must be a list of names (found {architectures!r})")
    return config


def read_own_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder; raises `CheckpointError` where it is missing, or holds no object."""
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file, so the folder holds no model")
    return read_object(path, any_integer=False)
