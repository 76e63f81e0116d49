"""Safetensors checkpoints, read lazily shard by shard and written sliced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.arch import ExpertTensor, Family
from expertprune.errors import CheckpointError
from expertprune.files import EXPERT_FILE
from expertprune.units import LayerShape, Structure

INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


# What an ordinary folder holds beside its weights and must not be carried into an expert.
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
    """Where a tensor lies, its shape, and its dtype as safetensors names it."""

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
    """A model folder: its config and the headers of its tensors; the tensors themselves are read when asked for.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or holds pickled weights only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.shards:
            with _opened(folder / file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    part = shard.get_slice(name)
                    self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
        if (folder / INDEX).is_file() and (missing := sorted(set(self._weight_map) - set(self.tensors))):
            raise CheckpointError(f"{folder / INDEX}: lists tensors that no file holds: {', '.join(missing[:3])}")

    @property
    def _weight_map(self) -> dict[str, str]:
        """From tensors to files, as the index says."""
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
        """Everything that an expert takes over unchanged: tokenizer, chat template, generation config, licence."""
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

    def check_widths(self, family: Family, shapes: tuple[LayerShape, ...]) -> None:
        """Raises `CheckpointError` where a coupled tensor is missing or disagrees with the config."""
        problems = []
        for layer, shape in enumerate(shapes):
            problems += self._missing_experts(family, layer, shape.experts)
            problems += self._other_experts(family, layer, shape)
            for coupled in family.tensors:
                name = family.layer_prefix(layer) + coupled.name
                expected = sum(shape.segment_rows(segment) for segment in coupled.segments)
                if name not in self.tensors:
                    if not coupled.optional:
                        problems.append(f"{name} is missing")
                    continue
                found = self.tensors[name].shape
                widths = {coupled.axis: expected} | ({1 - coupled.axis: shape.hidden} if len(found) == 2 else {})
                for axis, width in widths.items():
                    if axis >= len(found) or found[axis] != width:
                        problems.append(f"{name} is {list(found)}, the config makes axis {axis} {width}")
        if problems:
            rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.folder}: config.json disagrees with the weights: {'; '.join(problems[:3])}{rest}"
            )

    def vocabulary_rows(self, family: Family) -> int:
        """Rows of the embedding. Raises `CheckpointError` where a tensor of the vocabulary or the config disagrees."""
        found = {name: self.tensors[name].shape[0] for name in family.vocabulary if name in self.tensors}
        found["config.json's vocab_size"] = self.config.get("vocab_size", 0)
        if len(set(found.values())) > 1 or family.vocabulary[0] not in found:
            told = ", ".join(f"{name} {rows}" for name, rows in found.items())
            raise CheckpointError(f"{self.folder}: the rows of the vocabulary disagree: {told}")
        return found[family.vocabulary[0]]

    def row_parameters(self, family: Family) -> int:
        """How many parameters leave with one vocabulary row."""
        stored = [self.tensors[name] for name in family.vocabulary if name in self.tensors]
        return sum(info.parameters // info.shape[0] for info in stored)

    def _missing_experts(self, family: Family, layer: int, count: int) -> list[str]:
        """What of a layer's experts is stored neither as it runs nor one by one."""
        prefix, problems = family.layer_prefix(layer), []
        for run in family.experts.run if family.experts is not None else ():
            assert family.experts is not None
            names = [prefix + name for name in family.experts.on_disk(run.name, count)]
            if prefix + run.name not in self.tensors:
                problems += [f"{name} is missing" for name in names if name not in self.tensors]
        return list(dict.fromkeys(problems))

    def _other_experts(self, family: Family, layer: int, shape: LayerShape) -> list[str]:
        """Experts that are stored one by one in other widths than the config's."""
        problems, prefix = [], family.layer_prefix(layer)
        for expert in range(shape.experts if family.experts is not None else 0):
            assert family.experts is not None
            for tensor in family.experts.of_one(expert):
                info = self.tensors.get(prefix + tensor.name)
                width = shape.ffn * len(tensor.segments)
                if info is not None and tensor.axis is not None and info.shape[tensor.axis] != width:
                    found = list(info.shape)
                    problems.append(f"{prefix + tensor.name} is {found}, the config makes axis {tensor.axis} {width}")
        return problems

    def unit_parameters(self, family: Family, shape: LayerShape, layer: int, structure: Structure) -> int:
        """How many parameters leave with one unit of a structure."""
        if structure is Structure.EXPERTS:
            return self._expert_parameters(family, shape, layer)
        if structure is Structure.FFN and family.experts is not None:
            return self._neuron_parameters(family, shape, layer)
        total = 0
        for coupled in family.block(structure).tensors:
            info = self.tensors.get(family.layer_prefix(layer) + coupled.name)
            if info is None:
                continue
            per_row = info.parameters // info.shape[coupled.axis]
            for segment in coupled.segments:
                rows = shape.segment_rows(segment)
                if structure is Structure.QUERY_HEADS:
                    total += per_row * shape.head_dim if segment == "query" else 0
                else:
                    total += per_row * rows // shape.units(structure)
        return total

    def _expert_parameters(self, family: Family, shape: LayerShape, layer: int) -> int:
        """An expert's own tensors, or its rows of those that hold all, and its row of the router."""
        if family.experts is None:
            return 0
        own, shared = self._of_experts(family, layer)
        return sum(info.parameters for info, _ in own) + sum(info.parameters // shape.experts for info, _ in shared)

    def _neuron_parameters(self, family: Family, shape: LayerShape, layer: int) -> int:
        """A neuron's rows and columns of one expert's own tensors, or of its part of those that hold all."""
        own, shared = self._of_experts(family, layer)
        parts = [(info.parameters, tensor) for info, tensor in own]
        parts += [(info.parameters // shape.experts, tensor) for info, tensor in shared]
        return sum(size // shape.ffn for size, tensor in parts if tensor is not None and tensor.axis is not None)

    def _of_experts(
        self, family: Family, layer: int
    ) -> tuple[list[tuple[TensorInfo, ExpertTensor | None]], list[tuple[TensorInfo, ExpertTensor | None]]]:
        """What the first expert owns alone, and what all own together, with their description where they have one."""
        assert family.experts is not None
        prefix, run = family.layer_prefix(layer), {tensor.name: tensor for tensor in family.experts.run}
        own = [(self.tensors.get(prefix + each.name), each) for each in family.experts.of_one(0)]
        shared = [(self.tensors.get(prefix + each.name), run.get(each.name)) for each in family.experts.tensors]
        return [(a, b) for a, b in own if a is not None], [(a, b) for a, b in shared if a is not None]


def write_weights(
    base: Checkpoint,
    out: Path,
    transform: Callable[[str, Tensor], Tensor | None],
    extra: Callable[[str], Iterator[tuple[str, Tensor]]] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> None:
    """Write the base's tensors into `out`, transformed, in the base's files.

    A file of which nothing changes is copied, byte for byte.

    Args:
        transform: from a tensor's name and value to its new value, or `None` where it stays as it is.
        extra: from a file's name to tensors that it gains.
        names: of tensors that get another name, or `None` where they are left out.
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
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, so the folder holds no model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
