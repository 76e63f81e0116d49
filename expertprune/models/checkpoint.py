"""Safetensors checkpoints: read lazily, shard by shard, and written with changed tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.files import EXPERT_FILE, read_object

INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


# Files in other formats of weights, which must not be carried into an expert.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}


# transformers keeps chat templates beyond the default one in a folder of their own.
_CARRIED_FOLDERS = ("additional_chat_templates",)


_NOT_CARRIED = {
    "README.md", EXPERT_FILE, "report.html", "comparison.html", "throughput.json", INDEX,
    "pytorch_model.bin.index.json", ".gitattributes",
}  # fmt: skip


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """The file of a tensor, its shape, and its dtype in the words of safetensors."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Checkpoint:
    """A model folder: its config and the headers of its tensors. Tensors are read when they are asked for.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or holds pickled weights only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._check_links()
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.shards:
            with _opened(folder / file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    part = shard.get_slice(name)
                    self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
        if (folder / INDEX).is_file() and (missing := sorted(set(self._weight_map) - set(self.tensors))):
            raise CheckpointError(f"{folder / INDEX}: lists tensors that no file holds: {', '.join(missing[:3])}")

    def _check_links(self) -> None:
        """Raises `CheckpointError` for a link to a file outside the folder, whose content the expert would take over.

        The hub's own cache is the exception: its snapshots consist of links into the folder of its blobs.
        """
        inside = [self.folder.resolve()]
        if self.folder.resolve().parent.name == "snapshots":
            inside.append(self.folder.resolve().parents[1] / "blobs")
        folders = [self.folder / name for name in _CARRIED_FOLDERS]
        for path in (*self.folder.glob("*"), *(file for folder in folders for file in folder.glob("*"))):
            used = path in folders or not path.is_dir()
            if used and path.is_symlink() and not any(path.resolve().is_relative_to(each) for each in inside):
                raise CheckpointError(
                    f"{path}: is a link to a file outside the folder ({path.resolve()}); copy that file here, or remove "
                    "the link"
                )

    @property
    def _weight_map(self) -> dict[str, str]:
        """The index: from tensors to files."""
        listed = _read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{self.folder / INDEX}: its weight_map does not map tensors to files")
        return listed

    @property
    def shards(self) -> list[str]:
        """File names of the weights, in order."""
        if (self.folder / INDEX).is_file():
            listed = sorted(set(self._weight_map.values()))
            for file in listed:
                if Path(file).name != file:
                    raise CheckpointError(f"{self.folder / INDEX}: {file!r} is no plain file name")
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
            and path.name not in _NOT_CARRIED | {"config.json"}
            and not path.name.endswith(".partial")
        )

    @property
    def parameters(self) -> int:
        return sum(info.parameters for info in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the weights' files."""
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
        """One tensor, read now."""
        with _opened(self.folder / self.tensors[name].file) as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor


def write_weights(
    base: Checkpoint,
    out: Path,
    transform: Callable[[str, Tensor], Tensor | None],
    extra: Callable[[str], Iterator[tuple[str, Tensor]]] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> None:
    """Write the base's tensors into `out`, transformed, in the base's files.

    Files in which nothing changes are copied byte for byte.

    Args:
        transform: from a tensor's name and value to its new value, or to `None` if it stays as it is.
        extra: from a file's name to tensors that are added to it.
        names: from old names of tensors to new ones, or to `None` for tensors that are left out.
    """
    names = names or {}
    weight_map: dict[str, str] = {}
    total = parameters = 0
    any_changed = False
    for file in base.shards:
        here = [name for name, info in base.tensors.items() if info.file == file]
        changed = False
        tensors: dict[str, Tensor] = {}
        with _opened(base.folder / file) as shard:
            metadata = shard.metadata() or {"format": "pt"}
            for name in here:
                written = names.get(name, name)
                changed |= written != name
                if written is None:
                    continue
                tensor = shard.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise CheckpointError(
                        f"{base.folder / file}: {name} holds values that are not finite; fetch it again"
                    )
                new = transform(name, tensor)
                changed |= new is not None
                tensors[written] = (tensor if new is None else new).contiguous()
        for name, tensor in extra(file) if extra is not None else ():
            tensors[name], changed = tensor, True
        if changed:
            save_file(tensors, out / file, metadata=metadata)
        else:
            shutil.copyfile(base.folder / file, out / file)
        any_changed |= changed
        weight_map |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not (base.folder / INDEX).is_file():
        return
    if any_changed:
        index = _read_json(base.folder / INDEX)
        about = index.get("metadata")
        index["metadata"] = {**(about if isinstance(about, dict) else {}), "total_size": total}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = parameters
        index["weight_map"] = dict(sorted(weight_map.items()))
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        shutil.copyfile(base.folder / INDEX, out / INDEX)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though the folder's index names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); fetch or copy the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file, so the folder holds no model")
    return read_object(path, any_integer=False)
