"""What a GGUF file says of its model: family, config, tokenizer.

transformers reads the tokenizer and the metadata. It takes over some of the metadata and assumes its own
defaults for the rest. So whatever the file says, and what the format means where the file is silent, goes
into the config.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer

from expertprune.arch import Family, families
from expertprune.errors import CheckpointError
from expertprune.files import no_collection
from expertprune.models.gguf.lengths import check_lengths
from expertprune.models.loading import quiet_transformers

FREQUENCIES = "rope_freqs.weight"


FOLDER = "use the model's folder of safetensors"


@dataclass(frozen=True)
class Header:
    """A GGUF file without its weights: metadata by key, the shape of each tensor, rows first, and how many tokens it has."""

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    frequencies: tuple[float, ...]
    tokens: int

    @property
    def model(self) -> dict[str, Any]:
        """The metadata of the architecture, by keys without its prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Name the file in whatever its reader raises."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader, from struct.error to IndexError
        raise CheckpointError(f"{file}: transformers cannot read this GGUF file: {error}") from error


def opened_gguf(file: Path) -> Any:
    """The file's `gguf.GGUFReader`, many times as fast.

    The library makes a `numpy.memmap` of each of the millions of values of a tokenizer, in several calls.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self.plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self.plain = mapped.view(numpy.ndarray)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """Size, parts, places of the values among them, and types, as the library's own method gives them."""
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, numpy.uint32), self._get(orig_offs + 4, numpy.uint64)]
            start, kind, count = orig_offs + 12, GGUFValueType(int(head[0][0])), int(head[1][0])
            if kind == GGUFValueType.STRING and count:
                texts, size = _texts(self.plain, start, count)
                return 12 + size, head + texts, list(range(3, 2 + len(texts), 2)), [GGUFValueType.ARRAY, kind]
            if (scalar := self.gguf_scalar_to_np.get(kind)) is None or not count:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(start, scalar, count)
            own = list(values.reshape(-1, 1))
            return 12 + values.nbytes, head + own, list(range(2, 2 + len(own))), [GGUFValueType.ARRAY, kind]

    check_lengths(file)
    with no_collection():
        return Reader(file)


def _texts(data: Any, start: int, count: int) -> tuple[list[Any], int]:
    """Length and bytes of each of `count` strings that lie one behind the other, and the bytes that they take."""
    found, offset = [], start
    for _ in range(count):
        length = data[offset : offset + 8].view(numpy.uint64)
        end = offset + 8 + int(length[0])
        found += [length, data[offset + 8 : end]]
        offset = end
    return found, offset - start


@contextlib.contextmanager
def read_already(reader: Any) -> Iterator[None]:
    """Inside the block, transformers takes this reader; else it reads the file for the config and for the tokenizer."""
    import gguf

    own = gguf.GGUFReader
    gguf.GGUFReader = lambda _: reader
    try:
        yield
    finally:
        gguf.GGUFReader = own


def header_of(file: Path, reader: Any) -> Header:
    wanted = [key for key in reader.fields if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")]
    metadata = {key: reader.fields[key].contents() for key in wanted if not key.startswith("GGUF.")}
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    for key, value in metadata.items():
        if key.endswith(".block_count") and isinstance(value, int) and value > len(shapes):
            raise CheckpointError(f"{file}: {key} is {value}, and it has only {len(shapes)} tensors")
    frequencies = [tensor.data.ravel().tolist() for tensor in reader.tensors if tensor.name == FREQUENCIES]
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    count = 0 if tokens is None else len(tokens.data)
    return Header(str(metadata["general.architecture"]), metadata, shapes, tuple(*frequencies), count)


def family_in(file: Path, header: Header) -> Family:
    """The family of a file's model. Of families that share an architecture, one may have routed experts."""
    each = {family.family: family for family in families().values() if family.gguf is not None}.values()
    routed = "expert_count" in header.model and bool(header.model["expert_count"])
    for family in each:
        form = family.gguf
        if form is not None and form.architecture == header.architecture and (family.experts is not None) == routed:
            if form.readable:
                return family
            raise CheckpointError(
                f"{file}: holds a model of family {family.family!r}, which transformers does not read from GGUF files; "
                f"{FOLDER}"
            )
    known = sorted({family.gguf.architecture for family in each if family.gguf is not None and family.gguf.readable})
    raise CheckpointError(
        f"{file}: holds a model of architecture {header.architecture!r}; GGUF files of these can be bases: "
        f"{', '.join(known)}; {FOLDER}"
    )


def config_in(file: Path, header: Header, family: Family) -> Any:
    assert family.gguf is not None
    read = quiet_transformers().AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    changes = family.gguf.stated(family.config, header.model, set(header.shapes), read.to_dict())
    config = _plain(read)
    for key, value in changes.items():  # one by one: a config may know a value under two keys
        setattr(config, key, value)
    scaling, factor = header.model.get("rope.scaling.type"), header.model.get("rope.scaling.factor")
    others = [name for name in header.shapes if name.startswith("rope_factors_")]
    if (scaling not in (None, "none", "linear") and factor not in (None, 1.0)) or others:
        raise CheckpointError(
            f"{file}: scales its position embeddings, which transformers does not take over from this GGUF file; {FOLDER}"
        )
    if header.frequencies:
        config.rope_parameters |= _scaled(file, header, family, config)
    return _plain(config)  # again, for the defaults that follow from the changes


def _scaled(file: Path, header: Header, family: Family, config: Any) -> dict[str, Any]:
    """The rope parameters that give the frequency factors of a file.

    The file stores the factors, not the parameters. The family's usual ones are taken if they give the same factors.
    """
    assert family.gguf is not None
    if family.gguf.frequencies is not None:
        parameters = {**family.gguf.frequencies, "factor": max(header.frequencies)}
        made = frequency_factors(config, {**config.rope_parameters, **parameters})
        stored = torch.tensor(header.frequencies)
        if made.shape == stored.shape and torch.allclose(made, stored, rtol=1e-4, atol=0):
            return parameters
    raise CheckpointError(
        f"{file}: {FREQUENCIES} scales its position embeddings by factors that no known parameters make; {FOLDER}"
    )


def frequency_factors(config: Any, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Unscaled over scaled rotary frequencies, `[head_dim / 2]`, float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = type(config).from_dict({**_plain_dict(config), "rope_parameters": dict(parameters)})
    slowed, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](scaled, torch.device("cpu"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, 2 * len(slowed), 2, dtype=torch.float32) / (2 * len(slowed))
    assert 2 * len(slowed) <= width
    return (1.0 / parameters["rope_theta"] ** exponents) / slowed


def tokenizer_in(file: Path, header: Header) -> Any:
    """The file's tokenizer, with what transformers does not take over: tokens around a text, and no space before it."""
    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # These go into the post-processor of tokenizer.json, which every reader obeys.
    if _begins(header) and not tokenizer.add_bos_token:
        tokenizer.add_bos_token = True
    if header.metadata.get("tokenizer.ggml.add_eos_token") and not tokenizer.add_eos_token:
        tokenizer.add_eos_token = True
    if header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _put_no_space_before(tokenizer.backend_tokenizer)
    _keep_own(tokenizer, header.tokens)
    return tokenizer


def _keep_own(tokenizer: Any, rows: int) -> None:
    """Leave out tokens beyond the file's own: transformers adds `<|endoftext|>` to every byte-level tokenizer."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    more = {each["content"] for each in data["added_tokens"] if each["id"] >= rows}
    if more:
        for name, token in tokenizer.special_tokens_map.items():
            if isinstance(token, str) and token in more:
                setattr(tokenizer, name, None)
        data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] not in more]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))


def _put_no_space_before(tokenizer: Tokenizer) -> None:
    """Let a SentencePiece tokenizer mark no space before a text, and strip none from what it decodes."""
    data = json.loads(tokenizer.to_str())
    before, decoder = data["pre_tokenizer"], data["decoder"]
    if before is None or before["type"] != "Metaspace":
        return
    before["prepend_scheme"] = "never"
    decoder["decoders"] = [each for each in decoder.get("decoders", []) if each["type"] != "Strip"]
    changed = Tokenizer.from_str(json.dumps(data))
    tokenizer.pre_tokenizer, tokenizer.decoder = changed.pre_tokenizer, changed.decoder


def _begins(header: Header) -> bool:
    """Whether texts begin with BOS. Files that do not say it mean yes for tokenizers without merges (SentencePiece)."""
    says = header.metadata.get("tokenizer.ggml.add_bos_token")
    return "tokenizer.ggml.merges" not in header.metadata if says is None else bool(says)


def _plain_dict(config: Any) -> dict[str, Any]:
    left_out = ("quantization_config", "_name_or_path", "name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _plain(config: Any) -> Any:
    return type(config).from_dict(_plain_dict(config))
