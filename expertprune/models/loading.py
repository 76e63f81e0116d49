"""Load a model or a tokenizer from a local folder."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from expertprune.arch import PER_LAYER, attention_of, families, stock_architectures
from expertprune.arch.per_layer import model_with_layer_widths, with_layer_widths
from expertprune.errors import CheckpointError, SpecError, refused
from expertprune.files import no_collection, read_object
from expertprune.models.checkpoint import Checkpoint
from expertprune.progress import shown

log = logging.getLogger(__name__)


def run_dtype(wanted: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to run in.

    `auto` is as stored on a GPU. On a CPU it is float32, which is more exact, unless the base is
    stored in bfloat16 and this processor multiplies that much faster.
    """
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.type == "cuda":
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and bfloat16_gain() > MUCH_FASTER else torch.float32


MUCH_FASTER = 1.5  # times; with less to gain, float32's exactness counts more


@functools.cache
def bfloat16_gain() -> float:
    """How many times as fast as float32 this CPU multiplies matrices in bfloat16, measured once a process."""

    def seconds(dtype: torch.dtype) -> float:
        tokens, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        torch.nn.functional.linear(tokens, weight)  # the first product prepares threads and kernels
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(tokens, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def run_device(wanted: str) -> torch.device:
    """The device to run on.

    Raises:
        SpecError: this machine does not have it.
    """
    if wanted == "auto":
        return default_device()
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"base.device: {wanted}: torch finds {torch.cuda.device_count()} GPU(s) here; use cpu or auto")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's config, with the defaults of its class.

    Raises:
        CheckpointError: a value is of the wrong type, or the class refuses it.
    """
    with refused(f"{folder / 'config.json'}: transformers cannot read it"):
        return quiet_transformers().AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def build_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's model with the initial weights of its class, on torch's default device."""
    config = load_config(folder, trust_remote_code)
    made = model_class(folder)
    if hasattr(made, "from_config"):
        return made.from_config(config, trust_remote_code=trust_remote_code)
    return made(config)


def model_class(folder: Path) -> Any:
    """The class that builds a folder's model; this package's own where layers have widths of their own."""
    transformers = quiet_transformers()
    config = read_object(folder / "config.json")
    if not config.get(PER_LAYER):
        return transformers.AutoModelForCausalLM
    family, causal = families().get(config["model_type"]), class_of(config)
    path = within_decoder(causal, family.layers) if family else "layers"
    return with_layer_widths(causal, model_with_layer_widths(decoder_class_of(causal, config), path))


def within_decoder(causal: Any, path: str) -> str:
    """The place in its decoder of what lies at `path` of a causal language model."""
    return path.removeprefix(f"{causal.base_model_prefix}.")


def decoder_class_of(causal: Any, config: dict[str, Any]) -> Any:
    """The class of the decoder that a causal language model of transformers holds."""
    with torch.device("meta"):
        return type(causal(causal.config_class.from_dict(config)).base_model)


def class_of(config: dict[str, Any]) -> Any:
    """The class in transformers, or registered with it, that builds a config's model."""
    transformers = quiet_transformers()
    (name, *_) = stock_architectures(config)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    return transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[config["model_type"]]]


@functools.cache
def quiet_transformers() -> Any:
    """Import transformers with its progress bars off, and its advice too unless the user asked for logs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    if not log.isEnabledFor(logging.INFO):
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device | None = None, trust_remote_code: bool = False
) -> Any:
    """A `transformers` causal language model in evaluation mode, without gradients.

    One whose layers have widths of their own is built by this package's code, not by the copy in its folder.
    """
    checkpoint, device = Checkpoint(folder), device or default_device()
    with refused(f"{folder}: cannot be loaded"), _weights_shown("load weights"), _read_in_turn(checkpoint, dtype):
        options = {"dtype": dtype, "attn_implementation": attention_of(checkpoint.config)}
        if device.type == "cuda":
            options["device_map"] = {"": device}  # weights go there one by one, and are not put together in host memory
        if checkpoint.quantization:
            options["config"] = _dequantizing(load_config(folder, trust_remote_code))
        if checkpoint.encoding is None:
            model = model_class(folder).from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
        else:
            model = _decoded(checkpoint, trust_remote_code, options)
        checkpoint.check_unchanged()
    return model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def _weights_shown(stage: str) -> Iterator[None]:
    """Show how many weights transformers has loaded in the block, in place of its own bar."""

    def counted(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        items = args[0] if args else kwargs["iterable"]
        with shown(stage, len(items)) as step:
            for item in items:
                yield item
                step()

    hooks = quiet_transformers().utils.logging
    before = hooks.set_tqdm_hook(counted)
    try:
        yield
    finally:
        hooks.set_tqdm_hook(before)


@contextlib.contextmanager
def _read_in_turn(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """In the block, transformers reads routed experts' weights when it needs them, where it converts them.

    Its threads read ahead. An expert's weights wait, converted, for the others that share a tensor with
    them, so that float32 weights take 1.75 times their bytes; read in turn, 1.27 times.
    """
    family = families().get(checkpoint.config.get("model_type", ""))
    if family is None or family.experts is None or dtype == checkpoint.dtype:
        yield
        return
    with without_threads():
        yield


@contextlib.contextmanager
def without_threads() -> Iterator[None]:
    """In the block, transformers reads weights in the thread that asks for them."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers: no threads that read weights


def _dequantizing(config: Any) -> Any:
    """A quantized model's config whose layers can run alone: compressed-tensors would wait until the whole model runs."""
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "compressed-tensors":
        config.quantization_config = {**settings, "dequantize": True}
    return config


def _decoded(checkpoint: Checkpoint, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    """The model of a folder stored in fewer bits; each tensor is decoded when transformers asks for it."""
    folder = checkpoint.folder
    config = load_config(folder, trust_remote_code)
    with torch.device("meta"):
        made = type(build_model(folder, trust_remote_code))
    del config.quantization_config
    return made.from_pretrained(None, config=config, state_dict=checkpoint.deferred(), **options)


MOST_TOKENS = 2**24  # sixty times the largest vocabularies


def _check_token_ids(path: Path) -> None:
    """Raises `CheckpointError` for an id that no vocabulary has: the tokenizer would take memory for all ids below."""
    data = read_object(path)
    model, added = data.get("model"), data.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    named = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    named |= {str(each.get("content")): each.get("id") for each in added or () if isinstance(each, dict)}
    for token, index in named.items():
        if isinstance(index, int) and index >= MOST_TOKENS:
            raise CheckpointError(f"{path}: token {token[:40]!r} has the id {index}; ids are below {MOST_TOKENS:,}")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, which has encoded a word: settings of wrong types show only then."""
    _check_token_ids(folder / "tokenizer.json")
    with refused(f"{folder}: the tokenizer cannot be loaded"), no_collection():
        found = quiet_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        found("word")
        return found
