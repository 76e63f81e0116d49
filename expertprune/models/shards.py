"""Write a checkpoint's tensors, changed, into files of the same names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.models.checkpoint import INDEX, Checkpoint, opened_weights, read_own_json
from expertprune.models.tensorfile import DTYPES, TensorInfo, in_order, written_file


def write_weights(
    base: Checkpoint,
    out: Path,
    transform: Callable[[str, Tensor], Tensor | None],
    extra: Callable[[str], Iterator[tuple[str, Tensor]]] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> None:
    """Write the base's tensors into `out`, transformed, in the base's files.

    One tensor is in memory at a time. Files in which nothing changes are copied byte for byte.

    Args:
        transform: from a tensor's name and value to its new value, or to `None` if it stays as it is.
        extra: from a file's name to tensors that are added to it.
        names: from old names of tensors to new ones, or to `None` for tensors that are left out.
    """
    base.fetch()
    names = names or {}
    weight_map: dict[str, str] = {}
    total = parameters = 0
    any_changed = False
    for file in base.shards:
        added = dict(extra(file)) if extra is not None else {}
        if base.leaves_out_of(file) and not added and all(info.file != file for info in base.tensors.values()):
            any_changed = True
            continue
        sizes, changed = _write_shard(base, file, out, transform, added, names)
        any_changed |= changed
        weight_map |= dict.fromkeys(sizes, file)
        parameters += sum(count for count, _ in sizes.values())
        total += sum(size for _, size in sizes.values())
    base.check_unchanged()
    if not base.has_index:
        return
    if any_changed:
        index = read_own_json(base.folder / INDEX)
        about = index.get("metadata")
        index["metadata"] = {**(about if isinstance(about, dict) else {}), "total_size": total}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = parameters
        index["weight_map"] = dict(sorted(weight_map.items()))
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        shutil.copyfile(base.folder / INDEX, out / INDEX)


def _write_shard(
    base: Checkpoint,
    file: str,
    out: Path,
    transform: Callable[[str, Tensor], Tensor | None],
    extra: Mapping[str, Tensor],
    names: Mapping[str, str | None],
) -> tuple[dict[str, tuple[int, int]], bool]:
    """One file of `write_weights`: the parameters and bytes of each tensor in it, and whether it differs from the base's.

    One tensor is in memory at a time.
    """
    here = [name for name, info in base.tensors.items() if info.file == file]
    sources = {written: name for name in here if (written := names.get(name, name)) is not None}
    changed = base.encoding is not None or bool(extra) or base.leaves_out_of(file)
    changed |= any(names.get(name, name) != name for name in here)
    infos = {renamed: base.tensors[name] for renamed, name in sources.items()}
    expected = {name: (_dtype(base, info), info.shape) for name, info in infos.items()}
    expected |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}
    with opened_weights(base.folder / file) as shard:
        metadata = shard.metadata() or {"format": "pt"}
    sizes: dict[str, tuple[int, int]] = {}
    with written_file(out / file, expected, metadata) as made:
        for name in in_order({name: dtype for name, (dtype, _) in expected.items()}):
            if name in extra:
                tensor = extra[name]
            else:
                tensor = base.read_finite(sources[name])
                if (new := transform(sources[name], tensor)) is not None:
                    tensor, changed = new, True
            made.add(name, tensor)
            sizes[name] = tensor.numel(), tensor.numel() * tensor.element_size()
    if not changed:
        shutil.copyfile(base.folder / file, out / file)
    return sizes, changed


def _dtype(base: Checkpoint, info: TensorInfo) -> torch.dtype:
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"{base.folder / info.file}: holds tensors of dtype {info.dtype}, which cannot be written"
        )
    return DTYPES[info.dtype]
