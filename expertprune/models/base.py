"""Resolve the base of a spec to a local folder of safetensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from expertprune.arch import Family, bundled_models
from expertprune.errors import CheckpointError, SpecError
from expertprune.files import HASHED, digest_of, file_digest, not_a_file, not_a_folder, require_room, staged_file
from expertprune.models.admission import causal_family, code_files
from expertprune.models.checkpoint import SINGLE, Checkpoint
from expertprune.models.gguf import converted
from expertprune.models.hub import hub_checkpoint, known_weights_digest
from expertprune.models.inventory import check_inventory, checked_layers, vocabulary_rows
from expertprune.models.loading import load_tokenizer, run_device, run_dtype
from expertprune.progress import shown, silent
from expertprune.registry import nearest
from expertprune.spec.schema import Base
from expertprune.tokenizing import Vocabulary, read_vocabulary, with_added
from expertprune.units import LayerShape

log = logging.getLogger(__name__)


_MUCH = 2**29  # bytes from which hashing takes long enough to be shown


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken")


_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")


@dataclass(frozen=True, eq=False)
class ResolvedBase:
    """A base resolved to an ordinary local folder, whose weights may be still to come (see `Checkpoint.fetch`).

    `tokenizer_digest` covers the tokenizer's files. `source` is where decoder layers come from while it runs.
    The tokenizer and its vocabulary are read at their first use and kept.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    family: Family
    layers: tuple[LayerShape, ...]
    store: Path
    tokenizer_digest: str
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False
    source: Literal["auto", "resident", "streamed"] = "auto"

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.trust_remote_code)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Raises `CheckpointError` if the tokenizer is of a kind that cannot be cut, or disagrees with itself."""
        found, rows = read_vocabulary(self.folder), vocabulary_rows(self.checkpoint, self.family)
        return with_added(found, self.tokenizer, rows, self.folder)

    @functools.cached_property
    def templates_digest(self) -> str:
        """SHA-256 of the files by which conversations become text; no other text depends on them."""
        paths = [path for pattern in _TEMPLATE_FILES for path in sorted(self.folder.glob(pattern)) if path.is_file()]
        return digest_of({str(path.relative_to(self.folder)): file_digest(path, self.store) for path in paths})

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the config and the weights, which are fetched first if they are not here."""
        self.checkpoint.fetch()
        paths = {file: self.checkpoint.folder / file for file in self.checkpoint.shards}
        known = {file: known_weights_digest(path, self.store) for file, path in paths.items()}
        unread = [path.stat().st_size for file, path in paths.items() if known[file] is None]
        hashing = shown if sum(unread) > _MUCH else silent
        with (
            hashing("hash weights", sum(math.ceil(size / HASHED) for size in unread)) as step,
            ThreadPoolExecutor(os.cpu_count()) as readers,  # hashing leaves other threads free to run
        ):
            found = readers.map(lambda file: known[file] or file_digest(paths[file], self.store, step), paths)
            return digest_of([self.checkpoint.config, dict(zip(paths, found, strict=True))])


def resolve_base(base: Base, store: Path) -> ResolvedBase:
    """Find the base, and check by its headers that it is a causal language model we can cut.

    Weights of the hub are not downloaded, and GGUF files not converted, until they are read.

    Raises:
        SpecError: no such model.
        CheckpointError: its folder is incomplete, quantized, of another kind, or disagrees with its config.
    """
    checkpoint = _checkpoint(base, store)
    folder = checkpoint.folder
    if base.trust_remote_code and (code := code_files(folder)):
        log.warning("%s: runs Python code that comes with it: %s", folder, ", ".join(code))
    if checkpoint.passed_over:
        log.warning(
            "%s: %s is taken, as transformers takes it, and not %s of the index, which vLLM takes; remove one of the two",
            folder, SINGLE, ", ".join(checkpoint.passed_over),
        )  # fmt: skip
    family = causal_family(checkpoint, base.trust_remote_code)
    _leave_predictors_out(checkpoint, family)
    layers = checked_layers(checkpoint, family)
    device = run_device(base.device)
    dtype = run_dtype(base.dtype, checkpoint.dtype, device)
    check_inventory(checkpoint, family, layers, base.trust_remote_code)
    tokenizer = {
        path.name: file_digest(path, store) for pattern in _TOKENIZER_FILES for path in sorted(folder.glob(pattern))
    }
    if not tokenizer:
        raise CheckpointError(f"{folder}: has no tokenizer files (tokenizer.json, tokenizer_config.json)")
    return ResolvedBase(
        name=base.model,
        folder=folder,
        checkpoint=checkpoint,
        family=family,
        layers=layers,
        store=store,
        tokenizer_digest=digest_of(tokenizer),
        dtype=dtype,
        trust_remote_code=base.trust_remote_code,
        device=device,
        source=base.layers,
    )


def _leave_predictors_out(checkpoint: Checkpoint, family: Family) -> None:
    names = family.of_predictors(checkpoint.config, checkpoint.tensors)
    if family.predictors is None or not names:
        return
    parameters = sum(checkpoint.tensors[name].parameters for name in names)
    log.warning(
        "%s: its layers for multi-token prediction (%s and others, %s parameters) are left out: only speculative "
        "decoding runs them, and an expert is written without them",
        checkpoint.folder, names[0], f"{parameters:,}",
    )  # fmt: skip
    checkpoint.leave_out(names, family.predictors.none_left(checkpoint.config))


def is_hub_id(name: str) -> bool:
    """Whether a base is meant to come from the hub."""
    path = Path(name)
    return name.count("/") == 1 and not (path.is_absolute() or path.is_dir() or name.endswith(".gguf"))


def _checkpoint(base: Base, store: Path) -> Checkpoint:
    name = base.model
    path = Path(name)
    if name in bundled_models():
        return converted(_bundled_file(name, store), base.dtype, store, bundled_models()[name].tied)
    if name.endswith(".gguf"):
        if problem := not_a_file(path):
            raise SpecError(f"base.model: {name}: {problem}")
        return converted(path, base.dtype, store)
    if path.is_dir():
        return Checkpoint(path.resolve())
    if path.is_absolute():
        raise SpecError(f"base.model: {name}: {not_a_folder(path)}")
    if name.count("/") != 1:
        hint = nearest(name, bundled_models()).replace("; valid", "; bundled models")
        raise SpecError(f"base.model: {name!r} is no folder, no hub id (owner/name) and no bundled model{hint}")
    return hub_checkpoint(name, base.revision, base.trust_remote_code)


def _bundled_file(name: str, store: Path) -> Path:
    """The GGUF file of a bundled model: in its package, or joined once from several packages, in the store."""
    entry = bundled_models()[name]
    joined = store / "gguf" / entry.file
    if entry.files and joined.is_file() and file_digest(joined, store) == entry.sha256:
        return joined
    paths = []
    for packaged in entry.packaged:
        found = importlib.util.find_spec(packaged.module)
        if found is None or found.origin is None:
            raise SpecError(f"base.model: {name!r} comes as a package that is not installed; run: {entry.install}")
        path = Path(found.origin).parent / packaged.file
        if not path.is_file():
            raise SpecError(f"base.model: {name!r}: {path} is missing; run: {_again(entry.install)}")
        paths.append(path)
    if not entry.files:
        return paths[0]
    require_room(joined, sum(path.stat().st_size for path in paths))
    digest = hashlib.sha256()
    with staged_file(joined) as temporary:
        with temporary.open("wb") as whole:
            for path in paths:
                with path.open("rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
                        whole.write(block)
        if digest.hexdigest() != entry.sha256:
            raise SpecError(
                f"base.model: {name!r}: the files beside {paths[0]} do not make the file that they should "
                f"(SHA-256 {digest.hexdigest()[:12]}, not {str(entry.sha256)[:12]}); run: {_again(entry.install)}"
            )
    return joined


def _again(install: str) -> str:
    return install.replace("pip install", "pip install --force-reinstall", 1)
