"""Convert a GGUF file to an ordinary folder.

transformers reads the tensors and the tokenizer. It takes over some of the metadata and assumes its own
defaults for the rest. So whatever the file says, and what the format means where the file is silent, goes
into the config before the model is built.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertprune.arch import Family, families
from expertprune.errors import CheckpointError
from expertprune.files import digest_of, file_digest, opened, require_room, staged_folder
from expertprune.models.loading import quiet_transformers

log = logging.getLogger(__name__)


_RECIPE = 2  # raised when the same file is converted to another folder than before


_FREQUENCIES = "rope_freqs.weight"


_FOLDER = "use the model's folder of safetensors"


@dataclass(frozen=True)
class _Header:
    """A GGUF file without its weights: metadata by key, and the number of values of each tensor."""

    architecture: str
    metadata: Mapping[str, Any]
    values: Mapping[str, int]
    frequencies: tuple[float, ...]

    @property
    def model(self) -> dict[str, Any]:
        """The metadata of the architecture, by keys without its prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def converted(file: Path, dtype: str, store: Path) -> Path:
    """A GGUF file as a folder of safetensors, converted once and kept in the store.

    Raises:
        CheckpointError: the file is damaged, of a family that transformers does not read from GGUF, or has
            metadata that cannot be taken over.
    """
    import transformers

    dtype = "bfloat16" if dtype == "auto" else dtype
    key = digest_of([file_digest(file, store), dtype, transformers.__version__, _RECIPE])
    folder = store / "bases" / f"{file.stem}-{key[:16]}"
    if (folder / "config.json").is_file():
        return folder
    with _readable(file):
        header = _header(file)
    family = _family(file, header)
    require_room(folder, file.stat().st_size * 8)
    log.warning("converting %s to safetensors (%s), once; this takes a minute", file.name, dtype)
    with _readable(file):
        config = _config(file, header, family)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
            model, loaded = quiet_transformers().AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _check_whole(file, header, model, loaded)
    if _begins(header) and not tokenizer.add_bos_token:  # transformers does not take this over either
        tokenizer.add_bos_token = True  # goes into the post-processor of tokenizer.json, which every reader obeys
    fresh = transformers.AutoModelForCausalLM.from_config(_plain(model.config), dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    with staged_folder(folder) as temporary:
        fresh.to(getattr(torch, dtype)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


@contextlib.contextmanager
def _readable(file: Path) -> Any:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader, from struct.error to IndexError
        raise CheckpointError(f"{file}: transformers cannot read this GGUF file: {error}") from error


def _header(file: Path) -> _Header:
    from gguf import GGUFReader

    _check_counts(file)
    reader = GGUFReader(file)
    wanted = [key for key in reader.fields if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")]
    metadata = {key: reader.fields[key].contents() for key in wanted if not key.startswith("GGUF.")}
    values = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    frequencies = [tensor.data.ravel().tolist() for tensor in reader.tensors if tensor.name == _FREQUENCIES]
    return _Header(str(metadata["general.architecture"]), metadata, values, tuple(*frequencies))


def _check_counts(file: Path) -> None:
    """Raises `CheckpointError` for counts of metadata and tensors that the file has no room for."""
    with opened(file) as content:
        magic, _, tensors, keys = struct.unpack("<4sIQQ", content.read(24).ljust(24, b"\0"))
    # a tensor takes 32 bytes or more of the header, a key 13
    if magic != b"GGUF" or 32 * tensors + 13 * keys > file.stat().st_size:
        raise CheckpointError(f"{file}: no whole GGUF file: it is shorter than its header says")


def _family(file: Path, header: _Header) -> Family:
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
                f"{_FOLDER}"
            )
    known = sorted({family.gguf.architecture for family in each if family.gguf is not None and family.gguf.readable})
    raise CheckpointError(
        f"{file}: holds a model of architecture {header.architecture!r}; GGUF files of these can be bases: "
        f"{', '.join(known)}; {_FOLDER}"
    )


def _config(file: Path, header: _Header, family: Family) -> Any:
    import transformers

    assert family.gguf is not None
    read = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    changes = family.gguf.stated(family.config, header.model, set(header.values), read.to_dict())
    config = _plain(read)
    for key, value in changes.items():  # one by one: a config may know a value under two keys
        setattr(config, key, value)
    scaling, factor = header.model.get("rope.scaling.type"), header.model.get("rope.scaling.factor")
    others = [name for name in header.values if name.startswith("rope_factors_")]
    if (scaling not in (None, "none", "linear") and factor not in (None, 1.0)) or others:
        raise CheckpointError(
            f"{file}: scales its position embeddings, which transformers does not take over from this GGUF file; {_FOLDER}"
        )
    if header.frequencies:
        config.rope_parameters |= _scaled(file, header, family, config)
    return config


def _scaled(file: Path, header: _Header, family: Family, config: Any) -> dict[str, Any]:
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
        f"{file}: {_FREQUENCIES} scales its position embeddings by factors that no known parameters make; {_FOLDER}"
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


def _check_whole(file: Path, header: _Header, model: Any, loaded: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` unless the model has every value of the file, and no parameter of another origin."""
    absent = [*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])]
    if absent:
        raise CheckpointError(f"{file}: gives no value to {', '.join(sorted(absent)[:3])}; {_FOLDER}")
    stored = sum(values for name, values in header.values.items() if name != _FREQUENCIES)
    built = sum(parameter.numel() for parameter in model.parameters())
    if stored != built:
        raise CheckpointError(
            f"{file}: holds {stored:,} parameters, of which transformers' {type(model).__name__} takes {built:,}; {_FOLDER}"
        )


def _begins(header: _Header) -> bool:
    """Whether texts begin with BOS. Files that do not say it mean yes for tokenizers without merges (SentencePiece)."""
    says = header.metadata.get("tokenizer.ggml.add_bos_token")
    return "tokenizer.ggml.merges" not in header.metadata if says is None else bool(says)


def _plain_dict(config: Any) -> dict[str, Any]:
    left_out = ("quantization_config", "_name_or_path", "name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _plain(config: Any) -> Any:
    return type(config).from_dict(_plain_dict(config))
