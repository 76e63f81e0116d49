"""Read what others wrote: regular files only, within limits, and as plain data of known types."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from expertprune.errors import CheckpointError, ExpertpruneError, SpecError
from expertprune.files.validation import problems_of

# Limits. What people write is small; what we or a tokenizer write is larger.
YAML_BYTES = 256 * 2**10
JSON_BYTES = 64 * 2**20
DEPTH = 64  # of lists and mappings in each other
YAML_NODES = 100_000  # aliases counted as often as they are used
JSON_VALUES = 5_000_000  # by their commas, colons and brackets; at most 160 bytes of memory each
INTEGER = 2**63  # larger numbers do not fit what computes with them

M = TypeVar("M", bound=BaseModel)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a folder, a FIFO, a device, or may not be read.
    """
    # Without O_NONBLOCK, opening a FIFO waits for somebody who writes.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(f"it is {_kind(mode)}, not a file")
    with os.fdopen(handle, "rb") as file:
        yield file


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }  # fmt: skip
    return next((words for test, words in kinds.items() if test(mode)), "a socket")


def not_a_file(path: Path) -> str | None:
    """Why a path cannot be read as a file: it is missing, or something else; `None` for a file."""
    return _other_than(path, "file", stat.S_ISREG)


def not_a_folder(path: Path) -> str | None:
    """Why a path is not a folder: it is missing, or something else; `None` for a folder."""
    return _other_than(path, "folder", stat.S_ISDIR)


def _other_than(path: Path, wanted: str, is_wanted: Callable[[int], bool]) -> str | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"no such {wanted}"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return None if is_wanted(mode) else f"it is {_kind(mode)}, not a {wanted}"


def read_bytes(path: Path, limit: int, error: type[ExpertpruneError] = CheckpointError) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        ExpertpruneError: of the class `error`; the message names the file.
    """
    try:
        with opened(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if len(content) > limit:
        raise error(f"{path}: larger than {limit / 2**20:g} MiB, which no such file needs")
    return content


def read_text(path: Path, limit: int, error: type[ExpertpruneError] = CheckpointError) -> str:
    """The same as UTF-8 text."""
    try:
        return read_bytes(path, limit, error).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text: {problem.reason} at byte {problem.start}") from None


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(
    path: Path, limit: int = JSON_BYTES, error: type[ExpertpruneError] = CheckpointError, any_integer: bool = False
) -> Any:
    """The contents of a JSON file.

    Args:
        any_integer: whether numbers may be larger than what computes with them.

    Raises:
        ExpertpruneError: of the class `error`; the message names the file.
    """
    return parse_json(read_text(path, limit, error), str(path), error, any_integer)


def read_object(path: Path, limit: int = JSON_BYTES, any_integer: bool = True) -> dict[str, Any]:
    """A JSON file of a model's folder, which must hold an object; `{}` where there is none.

    Raises:
        CheckpointError: it is no regular file or no JSON object; the message names it.
    """
    if not os.path.lexists(path):
        return {}
    data = read_json(path, limit, any_integer=any_integer)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def parse_json(
    text: str,
    where: str,
    error: type[ExpertpruneError] = CheckpointError,
    any_integer: bool = False,
    unique: bool = False,
) -> Any:
    """JSON as plain data; see `read_json`.

    Args:
        unique: whether a mapping that has a key twice is an error; else the last counts.
    """
    if sum(map(text.count, ",:[{")) > JSON_VALUES:
        raise error(f"{where}: holds more than {JSON_VALUES:,} values, which no such file needs")
    hook = _unique(where, error) if unique else None
    try:
        with no_collection():
            data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=hook)
    except RecursionError:
        raise error(f"{where}: lists and mappings are nested too deeply") from None
    except ValueError as problem:  # of which JSONDecodeError is one; another is a number of thousands of digits
        raise error(f"{where}: not valid JSON: {str(problem).partition(';')[0]}") from None
    check_values(data, where, error, any_integer)
    return data


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in the block: where millions of objects are made, it takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _unique(where: str, error: type[ExpertpruneError]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes mappings of pairs; refuses a key that stands twice."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise error(f"{where}: has the key {key!r} twice in one mapping; rename or remove one")
        return found

    return mapping


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_model(path: Path, model: type[M], error: type[ExpertpruneError] = CheckpointError) -> M:
    """A JSON file as a typed model.

    Raises:
        ExpertpruneError: of the class `error`; the message names the file and every wrong key.
    """
    return as_model(read_json(path, error=error), model, str(path), error)


def read_kept(path: Path, model: type[M]) -> M | None:
    """What a file of our own holds; `None` where it is missing or damaged, so that it is made again."""
    with contextlib.suppress(CheckpointError):
        return read_model(path, model)
    return None


def as_model(data: Any, model: type[M], where: str, error: type[ExpertpruneError] = CheckpointError) -> M:
    """Plain data as a typed model; see `read_model`."""
    try:
        return model.model_validate(data)
    except (ValidationError, RecursionError) as problem:
        told = (
            "; ".join(problems_of(problem, model)[:5]) if isinstance(problem, ValidationError) else "nested too deeply"
        )
        raise error(f"{where}: {told}") from None


# --- YAML -------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The contents of a YAML file.

    Raises:
        SpecError: the file is missing or cannot be read, or a key stands twice, of which YAML would
            take the last.
    """
    return parse_yaml(read_text(path, YAML_BYTES, SpecError), str(path), loader)


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """YAML as plain data; see `read_yaml`."""
    reader = None
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if repeated := [f"{where}: {problem}" for problem in _repeated_keys(node, "", set())]:
            raise SpecError(repeated)
        if _expanded(node, {}, 0) > YAML_NODES:
            raise SpecError(f"{where}: its aliases hold themselves, or stand for more than {YAML_NODES:,} values")
        data = None if node is None else reader.construct_document(node)
    except ExpertpruneError:
        raise
    except RecursionError:
        raise SpecError(f"{where}: lists and mappings are nested too deeply, or hold themselves") from None
    except Exception as error:  # a scalar that its type refuses fails in any way, from KeyError to OverflowError
        told = " ".join(str(error).split())
        if not isinstance(error, yaml.YAMLError):
            told = f"a value is not of the type that it is written as ({told[:60]})"
        raise SpecError(f"{where}: not valid YAML: {told}") from None
    finally:
        if reader is not None:
            reader.dispose()
    check_values(data, where, SpecError)
    return data


def _expanded(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, aliases counted as often as they are used."""
    if node is None:
        return 0
    if id(node) in known:
        return known[id(node)]
    if depth > DEPTH:
        raise RecursionError
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        below = [each for pair in node.value for each in pair]
    known[id(node)] = YAML_NODES + 1  # what holds itself is endless
    known[id(node)] = 1 + sum(_expanded(each, known, depth + 1) for each in below)
    return known[id(node)]


def _repeated_keys(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[str]:
    """A message for each key that stands twice in a mapping; anchors are read once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, each in enumerate(node.value):
            yield from _repeated_keys(each, f"{where}[{number}]", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            full = f"{where}.{name}" if where else name
            if name in lines:
                yield f"{full}: stands twice, in lines {lines[name]} and {line}; keep one"
            lines[name] = line
            yield from _repeated_keys(value, full, seen)


# --- values -----------------------------------------------------------------------------------------------------------


_HALF = re.compile("[\ud800-\udfff]")  # of a character beyond the first 65,536


def check_values(
    data: Any, where: str, error: type[ExpertpruneError] = CheckpointError, any_integer: bool = False
) -> None:
    """Raises `error` for plain data that holds NaN, infinity, half a character or a huge number, or is too deep."""
    if (wrong := _wrong_value(data, any_integer)) is not None:
        keys, told = wrong
        about = f"{'.'.join(keys[:8])}: " if keys else ""  # enough to find it
        raise error(f"{where}: {about}{told}")


def _wrong_value(data: Any, any_integer: bool, depth: int = 0) -> tuple[tuple[str, ...], str] | None:
    """The first value of plain data that nothing can compute with or write: its keys, and what is wrong with it."""
    if isinstance(data, dict | list):
        if depth >= DEPTH:
            return (), "lists and mappings are nested too deeply"
        for name, each in data.items() if isinstance(data, dict) else enumerate(data):
            if isinstance(name, str) and _HALF.search(name):
                return (), "a key holds half of a character (a lone surrogate)"
            if (wrong := _wrong_value(each, any_integer, depth + 1)) is not None:
                keys, told = wrong
                return (str(name), *keys), told
    elif isinstance(data, str):
        if _HALF.search(data):
            return (), "a text holds half of a character (a lone surrogate)"
    elif isinstance(data, float):
        if not math.isfinite(data):
            return (), f"{data} is not a number that can be computed with"
    elif isinstance(data, int) and not any_integer and not -INTEGER <= data < INTEGER:
        return (), f"the number {str(data)[:20]}... is too large"
    return None
