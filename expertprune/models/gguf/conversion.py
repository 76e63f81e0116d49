"""Convert a GGUF file to an ordinary folder: first all but the weights, later the weights, one tensor at a time."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import BaseModel, RootModel
from torch import Tensor

from expertprune.arch import Family, GgufForm, families
from expertprune.errors import CheckpointError
from expertprune.files import (
    digest_of,
    no_collection,
    one_at_a_time,
    read_model,
    read_object,
    require_room,
    staged_file,
    stored_folder,
    write_json,
)
from expertprune.models.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from expertprune.models.gguf.names import gguf_name, is_one_of, name_map
from expertprune.models.gguf.reading import (
    FOLDER,
    FREQUENCIES,
    Header,
    config_in,
    family_in,
    header_of,
    opened_gguf,
    read_already,
    readable,
    tokenizer_in,
)
from expertprune.models.inventory import refuse_sizes
from expertprune.models.loading import quiet_transformers
from expertprune.models.tensorfile import DTYPES, TensorInfo, absent_bytes, in_order, written_file
from expertprune.progress import Progress, Track

_RECIPE = 3  # raised when the same file is converted to another folder than before


_PLAN = "conversion.json"  # in a folder whose weights are still to come


_SHARD = 5 * 2**30  # bytes of a file of weights; a larger tensor has a file of its own


_AT_ONCE = 2**22  # values that are dequantized at once


_HEAD = 2**20  # bytes: metadata, but for long lists of tokens


@dataclass(frozen=True)
class _Origin:
    """Where a tensor's values lie in the file: a stored tensor, or one routed expert's part of it."""

    stored: str
    expert: int | None


def converted(file: Path, dtype: str, store: Path, tied: bool = False) -> Checkpoint:
    """A GGUF file as a folder of safetensors in the store. Its weights are read and converted when they are first needed.

    Args:
        dtype: of the weights; `auto` is bfloat16.
        tied: whether the model's output matrix is its embedding, even if the file stores both. Then the output matrix is
            taken for both: such files store it in more bits.

    Raises:
        CheckpointError: the file is damaged, of a family that transformers does not read from GGUF, or has
            metadata that cannot be taken over.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    version = quiet_transformers().__version__
    identity = _identity(file)
    key = digest_of([identity, dtype, version, _RECIPE, *(["tied"] if tied else [])])
    folder = store / "bases" / f"{file.stem}-{key[:16]}"
    if not _whole(folder):
        _prepare(file, folder, getattr(torch, dtype), tied)
    if not (folder / _PLAN).is_file():
        return Checkpoint(folder)
    return Checkpoint(folder, Conversion(file, folder, identity))


def _whole(folder: Path) -> bool:
    """Whether a folder has everything but the weights, and those or the plan for them."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (_PLAN, SINGLE, INDEX))


def _identity(file: Path) -> list[Any]:
    """What tells a file from others and from what was there before, without reading its weights.

    That is what the store remembers digests by, and the bytes that it begins with.
    """
    status = file.stat()
    with file.open("rb") as content:
        head = hashlib.sha256(content.read(_HEAD)).hexdigest()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, head]


def _prepare(file: Path, folder: Path, dtype: torch.dtype, tied: bool) -> None:
    """Write a folder that has everything but the weights, and the plan for those."""
    with readable(file):
        reader = opened_gguf(file)
        header = header_of(file, reader)
    family = family_in(file, header)
    assert family.gguf is not None
    with readable(file), read_already(reader), no_collection():
        config = config_in(file, header, family)
        tokenizer = tokenizer_in(file, header)
    if tied:
        config.tie_word_embeddings = True
    refuse_sizes(config.to_dict(), family, list(header.shapes.values()), str(file))
    with readable(file), torch.device("meta"):
        model = quiet_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    sources = _sources(file, header, family, model)
    infos = _in_files(sources, header, family.gguf, dtype)
    with stored_folder(folder, _whole) as temporary:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        plan = {
            name: {"stored": source.stored, "expert": source.expert, "file": infos[name].file,
                   "shape": infos[name].shape, "dtype": infos[name].dtype}
            for name, source in sources.items()
        }  # fmt: skip
        write_json(temporary / _PLAN, plan)


def _sources(file: Path, header: Header, family: Family, model: Any) -> dict[str, _Origin]:
    """Where each tensor of the folder comes from.

    Raises:
        CheckpointError: the file lacks a tensor of the model, or has one that the model does not.
    """
    assert family.gguf is not None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    names, form = name_map(family.gguf, len(family.layer_shapes(model.config.to_dict()))), family.gguf
    found: dict[str, _Origin] = {}
    absent: list[str] = []
    for name, expert, pattern in _on_disk(family, model.config.to_dict(), shapes):
        stored = gguf_name(names, form, pattern)
        if name == family.vocabulary[0] and tied and "output.weight" in header.shapes:
            stored = "output.weight"
        have = header.shapes.get(stored or "")
        if have is not None and is_one_of(name, form.vectors):
            have = (1, *have)
        wanted = shapes.get(name, have[1:] if have is not None else None)
        if stored is None or have is None or wanted != (have if expert is None else have[1:]):
            absent.append(name)
        else:
            found[name] = _Origin(stored, expert)
    if absent:
        raise CheckpointError(f"{file}: gives no value to {', '.join(sorted(absent)[:3])}; {FOLDER}")
    used = {source.stored for source in found.values()} | {FREQUENCIES} | ({"token_embd.weight"} if tied else set())
    if more := sorted(set(header.shapes) - used):
        raise CheckpointError(
            f"{file}: holds {', '.join(more[:3])}, of which transformers' {type(model).__name__} takes nothing; {FOLDER}"
        )
    return found


def _on_disk(
    family: Family, config: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Iterator[tuple[str, int | None, str]]:
    """Every tensor of the folder: its name, its routed expert's number, and the name by which the format knows it."""
    if family.experts is None:
        yield from ((name, None, name) for name in shapes)
        return
    layers, module = family.layer_shapes(config), family.experts.module
    together = {
        family.layer_prefix(layer) + each.name
        for layer in range(len(layers))
        for each in family.experts.run
        if each.name.startswith(f"{module}.")
    }
    yield from ((name, None, name) for name in shapes if name not in together)
    for layer, shape in enumerate(layers):
        for each, expert in itertools.product(family.experts.each, range(shape.experts)):
            whole = family.layer_prefix(layer) + each.name
            yield whole.replace("{expert}", str(expert)), expert, whole.replace(".{expert}", "")


def _in_files(
    sources: Mapping[str, _Origin], header: Header, form: GgufForm, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """The header of every tensor of the folder, with the files filled in order."""
    kind = next(name for name, each in DTYPES.items() if each == dtype)
    infos = {name: TensorInfo(SINGLE, _shape(name, source, header, form), kind) for name, source in sources.items()}
    files: list[list[str]] = [[]]
    size = 0
    for name in in_order(dict.fromkeys(infos, dtype)):
        if files[-1] and size + infos[name].bytes > _SHARD:
            files.append([])
            size = 0
        files[-1].append(name)
        size += infos[name].bytes
    if len(files) == 1:
        return infos
    return {
        name: replace(infos[name], file=f"model-{number:05d}-of-{len(files):05d}.safetensors")
        for number, names in enumerate(files, 1)
        for name in names
    }


def _shape(name: str, source: _Origin, header: Header, form: GgufForm) -> tuple[int, ...]:
    shape = header.shapes[source.stored]
    if source.expert is not None:
        return shape[1:]
    return (1, *shape) if is_one_of(name, form.vectors) else shape


class _PlannedTensor(BaseModel):
    """Where a tensor of the folder comes from, and what it becomes."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    expert: int | None


class _Plan(RootModel[dict[str, _PlannedTensor]]):
    """The tensors by name."""


class Conversion:
    """The weights of a GGUF file on their way into a folder that has everything else."""

    def __init__(self, file: Path, folder: Path, identity: list[Any]) -> None:
        self.file, self.folder, self._identity = file, folder, identity
        plan = read_model(folder / _PLAN, _Plan).root
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(each.file, each.shape, each.dtype) for name, each in plan.items()
        }
        self._sources = {name: _Origin(each.stored, each.expert) for name, each in plan.items()}

    def fetch(self, track: Track) -> None:
        """Write the weights, file by file and one tensor at a time in memory; a file that is there stays."""
        with one_at_a_time(self.folder):
            if not (self.folder / _PLAN).is_file():  # another process was faster
                return
            if _identity(self.file) != self._identity:
                raise CheckpointError(f"{self.file}: was replaced since it was checked; run the command again")
            require_room(self.folder, absent_bytes(self.folder, self.tensors))
            with readable(self.file):
                stored = {tensor.name: tensor for tensor in opened_gguf(self.file).tensors}
            with track(f"convert {self.file.name}", len(self.tensors)) as step:
                for name in sorted({info.file for info in self.tensors.values()}):
                    self._write(name, stored, step)
            self._write_index()
            (self.folder / _PLAN).unlink()

    def _write(self, file: str, stored: Mapping[str, Any], step: Progress) -> None:
        here = {name: info for name, info in self.tensors.items() if info.file == file}
        if (self.folder / file).is_file():
            for _ in here:
                step()
            return
        arranged = _Arrangement.of(self.folder)
        expected = {name: (DTYPES[info.dtype], info.shape) for name, info in here.items()}
        with staged_file(self.folder / file) as path, written_file(path, expected, {"format": "pt"}) as made:
            for name in in_order({name: dtype for name, (dtype, _) in expected.items()}):
                source = self._sources[name]
                with readable(self.file):
                    tensor = arranged.read(name, stored[source.stored], source.expert, DTYPES[here[name].dtype])
                made.add(name, tensor.reshape(here[name].shape))
                step()

    def _write_index(self) -> None:
        files = {name: info.file for name, info in sorted(self.tensors.items())}
        if set(files.values()) == {SINGLE}:
            return
        total = {
            "total_parameters": sum(info.parameters for info in self.tensors.values()),
            "total_size": sum(info.bytes for info in self.tensors.values()),
        }
        write_json(self.folder / INDEX, {"metadata": total, "weight_map": files})


@dataclass(frozen=True)
class _Arrangement:
    """From a tensor as the format holds it to one as the folder does, the inverse of what an export does."""

    form: GgufForm
    head_dim: int

    @staticmethod
    def of(folder: Path) -> _Arrangement:
        config = read_object(folder / "config.json")
        family = families()[config["model_type"]]
        assert family.gguf is not None
        return _Arrangement(family.gguf, family.layer_shapes(config)[0].head_dim)

    def read(self, name: str, stored: Any, expert: int | None, dtype: torch.dtype) -> Tensor:
        data = stored.data if expert is None else stored.data[expert]
        if self.form.norm_offset and name.endswith("norm.weight"):
            return (_dequantized(data, stored.tensor_type, torch.float32) - self.form.norm_offset).to(dtype)
        tensor = _dequantized(data, stored.tensor_type, dtype)
        if not is_one_of(name.rpartition(".")[0], self.form.interleaved):
            return tensor
        halves = tensor.reshape(-1, self.head_dim // 2, 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)


def _dequantized(data: Any, kind: Any, dtype: torch.dtype) -> Tensor:
    """Values of a stored tensor, through float32, some rows at a time."""
    from gguf import quant_shape_from_byte_shape
    from gguf.quants import dequantize

    quantized = data.dtype == numpy.uint8
    shape = quant_shape_from_byte_shape(data.shape, kind) if quantized else data.shape
    if len(shape) == 1:
        return torch.from_numpy(numpy.array(dequantize(data, kind))).to(dtype)
    result = torch.empty(shape, dtype=dtype)
    rows = max(1, _AT_ONCE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        part = dequantize(data[start : start + rows], kind)
        result[start : start + rows] = torch.from_numpy(numpy.array(part))
    return result
