"""Write a folder of safetensors as one GGUF file, with one tensor in memory at a time."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import Family, GgufForm, gguf_names
from expertprune.errors import CheckpointError, refused
from expertprune.files import GGUF, require_room, staged_output
from expertprune.models.admission import causal_family
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.gguf.names import gguf_name, is_one_of, name_map
from expertprune.models.gguf.reading import frequency_factors
from expertprune.models.gguf.vocabulary import GgufVocabulary, gguf_vocabulary
from expertprune.models.inventory import checked_layers, vocabulary_rows
from expertprune.models.loading import load_config, load_tokenizer
from expertprune.tokenizing import read_vocabulary, with_added
from expertprune.units import LayerShape

log = logging.getLogger(__name__)


TYPES = ("f32", "f16", "bf16", "q8_0")


_BLOCK = 32  # values that share a scale in Q8_0


_REALS = ("epsilon", "softcapping", "freq_base", "freq_base_swa", "factor")


@dataclass(frozen=True)
class Exported:
    """A file that was written; `tensors` counts them by type."""

    path: Path
    architecture: str
    tensors: dict[str, int]
    context: int


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name, its shape, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Source:
    """The folder that is written; `values` is its config with all defaults."""

    checkpoint: Checkpoint
    family: Family
    form: GgufForm
    layers: tuple[LayerShape, ...]
    config: Any
    values: Mapping[str, Any]

    @property
    def where(self) -> Path:
        return self.checkpoint.folder / "config.json"


def write_gguf(folder: Path, out: Path, kind: str, name: str, overwrite: bool = False) -> Exported:
    """Write a model's folder as one GGUF file.

    Matrices are stored as `kind`; vectors, norms and routers as float32. Where `kind` is `q8_0`, matrices whose width
    is no multiple of its blocks (32 values) are stored as float16.

    Args:
        kind: one of `TYPES`.
        name: of the model, in the file.

    Raises:
        CheckpointError: the folder holds no model of a known family, the format cannot express its tokenizer or
            its config, a weight is not finite or overflows `kind`, or the disk has no room.
    """
    source = _source(Checkpoint(folder))
    if source.values.get("tie_word_embeddings"):
        embedding, head, *_ = source.family.vocabulary
        source.checkpoint.check_tied({head: embedding})
    metadata, words = _described(source)
    with refused(f"{folder}: cannot be written as GGUF"):
        entries = list(_entries(source))
    require_room(out, _file_bytes(entries, kind, words))
    with staged_output(out, GGUF, overwrite) as temporary:
        counts = _written(temporary, source, metadata, words, entries, kind, name)
        source.checkpoint.check_unchanged()
    return Exported(out, source.form.architecture, counts, int(metadata["context_length"]))


def check_gguf(checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` where a base's config or tokenizer cannot be written as GGUF. No weights are read."""
    _described(_source(checkpoint))


def _described(source: _Source) -> tuple[dict[str, Any], GgufVocabulary]:
    """The metadata and the tokenizer of the file."""
    folder = source.checkpoint.folder
    rows = vocabulary_rows(source.checkpoint, source.family)
    with refused(f"{folder}: cannot be written as GGUF"):  # its config and tokenizer can be wrong in any way
        vocabulary, tokenizer = read_vocabulary(folder), load_tokenizer(folder)
        return _metadata(source), gguf_vocabulary(
            folder, with_added(vocabulary, tokenizer, rows, folder), tokenizer, rows
        )


def _source(checkpoint: Checkpoint) -> _Source:
    family = causal_family(checkpoint)
    where, engine = checkpoint.folder / "config.json", gguf_names().engine
    if family.gguf is None:
        raise CheckpointError(
            f"{where}: models of type {checkpoint.config.get('model_type')!r} cannot be written as GGUF"
        )
    layers = checked_layers(checkpoint, family)
    form = family.gguf
    if len(set(layers)) > 1:
        if form.layered is None:
            raise CheckpointError(
                f"{where}: its layers have widths of their own, which {engine} does not read in models of architecture "
                f"{form.architecture!r}; build it with compose.allocation: uniform"
            )
        form = form.model_copy(update={"architecture": form.layered})
    narrow = form.heads_fill_hidden and any(shape.query_heads * shape.head_dim != shape.hidden for shape in layers)
    if narrow or (not form.heads_grouped and any(shape.query_heads != shape.kv_heads for shape in layers)):
        raise CheckpointError(
            f"{where}: {engine} reads models of architecture {form.architecture!r} only where query heads are together as "
            f"wide as the hidden size{'' if form.heads_grouped else ' and each has a KV head of its own'}; build the expert "
            "without query_heads and kv_groups"
        )
    config = load_config(checkpoint.folder)
    return _Source(checkpoint, family, form, layers, config, config.to_dict())


def _metadata(source: _Source) -> dict[str, Any]:
    """The metadata of the model, by keys without the architecture's prefix."""
    form, values, shape = source.form, source.values, source.layers[0]
    for key, meant in form.implied.items():
        if key in values and values[key] != meant:
            raise _unsaid(source, key, values[key], meant)
    found: dict[str, Any] = {
        name: getattr(source.config, key, None) for name, key in form.keys(source.family.config).items()
    }
    found = {name: value for name, value in found.items() if value is not None}
    if source.family.has_ffn:
        found["feed_forward_length"] = _by_layer([layer.ffn for layer in source.layers])
    found["attention.head_count"] = _by_layer([layer.query_heads for layer in source.layers])
    found["attention.head_count_kv"] = _by_layer([layer.kv_heads for layer in source.layers])
    found |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    found["rope.dimension_count"] = shape.head_dim
    if form.attention_scale is not None:
        key = form.attention_scale.key
        meant = form.attention_scale.meant(len(source.layers), shape.hidden, shape.query_heads, shape.head_dim)
        if values[key] != meant:
            raise _unsaid(source, key, values[key], meant)
    found |= _rotations(source)
    found |= _windows(source, int(source.config.max_position_embeddings))
    for key, value in found.items():
        if not isinstance(value, str | list) and not key.endswith(_REALS) and not 0 <= int(value) < 2**32:
            raise CheckpointError(f"{source.where}: {key} is {value}, which the format does not hold")
    return {key: float(value) if key.endswith(_REALS) else value for key, value in found.items()}


def _by_layer(counts: list[int]) -> int | list[int]:
    return counts if len(set(counts)) > 1 else counts[0]


def _unsaid(source: _Source, key: str, value: Any, meant: Any) -> CheckpointError:
    return CheckpointError(
        f"{source.where}: {key!r} is {value!r}, which a GGUF file of architecture {source.form.architecture!r} cannot say: "
        f"it means {meant!r}"
    )


def _rotations(source: _Source) -> dict[str, Any]:
    parameters = source.values.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if "sliding_attention" in parameters:
        near, parameters = parameters["sliding_attention"], parameters["full_attention"]
        if near.get("rope_type", "default") != "default":
            raise _unsaid(source, "rope_parameters.sliding_attention.rope_type", near["rope_type"], "default")
        found["rope.freq_base_swa"] = near["rope_theta"]
    found["rope.freq_base"] = parameters["rope_theta"]
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        found["rope.dimension_count"] = int(source.layers[0].head_dim * part)
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": parameters["factor"]}
    elif kind != "default" and kind != (source.form.frequencies or {}).get("rope_type"):
        raise _unsaid(source, "rope_parameters.rope_type", kind, "default or linear")
    return found


def _windows(source: _Source, context: int) -> dict[str, Any]:
    """The attention window by layer. Where the format has none, the context is cut to the window."""
    window, values = source.form.window, source.values
    types, wide = values.get("layer_types"), len(source.layers)
    if window is None:
        size = values.get("sliding_window") if types is None or "sliding_attention" in types else None
        if size is not None and size < context:
            log.warning(
                "%s: %s ignores this family's attention window, so the file's context is cut to the window, %d tokens; "
                "within it both models are the same",
                source.where, gguf_names().engine, size,
            )  # fmt: skip
            return {"context_length": size}
        return {}
    for period in range(1, wide + 2) if window.stated else [window.period]:
        if types == window.layer_types(wide, period):
            return {"attention.sliding_window_pattern": period} if window.stated and period != window.period else {}
    if types == ["sliding_attention"] * wide and wide < window.period:
        return {}
    raise _unsaid(source, "layer_types", types, window.layer_types(wide, window.period))


def _entries(source: _Source) -> Iterator[_Entry]:
    """Every tensor of the file."""
    form, checkpoint, family = source.form, source.checkpoint, source.family
    names = name_map(form, len(source.layers))
    tied = bool(source.values.get("tie_word_embeddings"))
    grouped = set()
    for layer in range(len(source.layers)):
        for pattern in [each.name for each in family.experts.each] if family.experts is not None else []:
            parts = [
                family.layer_prefix(layer) + pattern.replace("{expert}", str(expert))
                for expert in range(source.layers[layer].experts)
            ]
            if not all(part in checkpoint.tensors for part in parts):
                raise CheckpointError(
                    f"{checkpoint.folder}: the routed experts of layer {layer} are not stored one by one; load the folder "
                    "with transformers, save it with save_pretrained, and export that"
                )
            grouped |= set(parts)
            shape = (len(parts), *checkpoint.tensors[parts[0]].shape)
            name = _named(source, names, family.layer_prefix(layer) + pattern.replace(".{expert}", ""))
            yield _Entry(name, shape, lambda parts=parts: torch.stack([checkpoint.read_finite(part) for part in parts]))  # type: ignore[misc]
    for name, info in checkpoint.tensors.items():
        if name in grouped or name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        shape = info.shape[1:] if is_one_of(name, form.vectors) else info.shape
        yield _Entry(_named(source, names, name), shape, lambda name=name: _arranged(source, name))  # type: ignore[misc]
    if tied and form.own_head:
        embedding = family.vocabulary[0]
        yield _Entry(
            "output.weight", checkpoint.tensors[embedding].shape, lambda: checkpoint.read_finite(embedding).float()
        )
    parameters = source.values.get("rope_parameters") or {}
    if form.frequencies is not None and parameters.get("rope_type") == form.frequencies["rope_type"]:
        factors = frequency_factors(source.config, parameters)
        yield _Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors)


def _named(source: _Source, names: Any, name: str) -> str:
    found = gguf_name(names, source.form, name)
    if found is None:
        raise CheckpointError(
            f"{source.checkpoint.folder}: a GGUF file of architecture {source.form.architecture!r} has no place for {name}"
        )
    return found


def _arranged(source: _Source, name: str) -> Tensor:
    """A tensor as the format holds it: rotary halves interleaved, norms with their offset."""
    tensor = source.checkpoint.read_finite(name).float()
    if is_one_of(name, source.form.vectors):
        return tensor.squeeze(0)
    if source.form.norm_offset and name.endswith("norm.weight"):
        return tensor + source.form.norm_offset
    if is_one_of(name.rpartition(".")[0], source.form.interleaved):
        width = source.layers[0].head_dim
        halves = tensor.reshape(-1, 2, width // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _written(
    path: Path,
    source: _Source,
    metadata: Mapping[str, Any],
    words: GgufVocabulary,
    entries: list[_Entry],
    kind: str,
    name: str,
) -> dict[str, int]:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, source.form.architecture)
    try:
        writer.add_name(name)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind])
        if kind == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            _add(writer, f"{source.form.architecture}.{key}", value)
        _add_vocabulary(writer, words)
        types = [gguf.GGMLQuantizationType[_type(entry, kind).upper()] for entry in entries]
        for entry, stored in zip(entries, types, strict=True):
            width = numpy.dtype({"F32": "float32", "F16": "float16"}.get(stored.name, "uint8"))
            shape = entry.shape if width.itemsize > 1 else gguf.quant_shape_to_byte_shape(entry.shape, stored)
            writer.add_tensor_info(entry.name, shape, width, math.prod(shape) * width.itemsize, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, stored in zip(entries, types, strict=True):
            writer.write_tensor_data(_quantized(source, entry, stored).view(_whole()))
    finally:
        writer.close()
    counts: dict[str, int] = {}
    for stored in types:
        counts[stored.name] = counts.get(stored.name, 0) + 1
    return counts


@functools.cache
def _whole() -> type:
    """An array that Python writes. NumPy's own `tofile` says nothing where the disk has no room for its last bytes."""
    import numpy

    class Whole(numpy.ndarray):
        def tofile(self, file: Any, *_: Any) -> None:
            file.write(numpy.ascontiguousarray(self).data)

    return Whole


_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": (_BLOCK + 2) / _BLOCK}  # of a value
_WORD = 64  # bytes of a token, a score, a type and the merges that make it, generously


def _file_bytes(entries: Sequence[_Entry], kind: str, words: GgufVocabulary) -> int:
    values = sum(math.prod(entry.shape) * _BYTES[_type(entry, kind)] for entry in entries)
    return int(values) + _WORD * len(words.tokens)


def _type(entry: _Entry, kind: str) -> str:
    if len(entry.shape) == 1 or entry.name.endswith("norm.weight") or ".ffn_gate_inp" in entry.name:
        return "f32"
    return "f16" if kind == "q8_0" and entry.shape[-1] % _BLOCK else kind


def _quantized(source: _Source, entry: _Entry, stored: Any) -> Any:
    import gguf
    import numpy

    values = entry.read().float().contiguous().numpy()
    if stored.name == "F16" and float(numpy.abs(values).max()) > 65504:
        raise CheckpointError(
            f"{source.checkpoint.folder}: {entry.name} has weights that float16 does not hold; export with "
            "--type f32 or bf16"
        )
    return gguf.quants.quantize(values, stored)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif key.endswith(_REALS):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, int(value))


def _add_vocabulary(writer: Any, words: GgufVocabulary) -> None:
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    for name, index in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.space_before is not None:
        writer.add_add_space_prefix(words.space_before)
    if words.template is not None:
        writer.add_chat_template(words.template)
