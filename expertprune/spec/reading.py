"""Read a spec from YAML or plain data, and report all of its problems at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from expertprune.errors import SpecError
from expertprune.files import read_yaml
from expertprune.registry import nearest
from expertprune.spec.schema import Spec


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Spec:
    """Read and check a spec. Its relative paths become absolute.

    Args:
        path: a YAML file.
        overrides: dotted keys and their values, such as `{"budget.ffn": 0.3}`, set before checking.

    Raises:
        SpecError: with every problem, each with file, key and the nearest valid name.
    """
    path = Path(path)
    data = read_yaml(path)
    return parse_spec(data, where=str(path), folder=path.resolve().parent, overrides=overrides)


def parse_spec(data: Any, where: str, folder: Path, overrides: Mapping[str, Any] | None = None) -> Spec:
    """Check a spec given as plain data, whose paths are relative to `folder`."""
    if not isinstance(data, dict):
        raise SpecError(f"{where}: a spec is a mapping of keys (name, base, dimensions, budget, ...)")
    data = copy.deepcopy(data)
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise SpecError([f"{where}: {problem}" for problem in problems_of(error)]) from None
    return _absolute(spec, folder)


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = data.get(parent)
        if not isinstance(inner, dict):
            shorthand = {"base": "model", "relevance": "criterion", "compensation": "method", "corpora": "catalogue"}
            inner = {shorthand[parent]: inner} if isinstance(inner, str) and parent in shorthand else {}
            data[parent] = inner
        data = inner
    data[last] = value


def _absolute(spec: Spec, folder: Path) -> Spec:
    spec = spec.model_copy(deep=True)
    model = folder / Path(spec.base.model).expanduser()
    if model.exists() or spec.base.model.startswith((".", "/", "~")) or spec.base.model.endswith(".gguf"):
        spec.base.model = str(model.resolve())
    return with_corpus_paths(spec, lambda _, path: str((folder / Path(path).expanduser()).resolve()))


def with_corpus_paths(spec: Spec, change: Callable[[str, str], str]) -> Spec:
    """A copy of a spec with every path below `corpora` changed.

    Args:
        change: from a path's dotted key and the path to the new path.
    """
    spec = spec.model_copy(deep=True)
    if spec.corpora.catalogue is not None:
        spec.corpora.catalogue = change("corpora.catalogue", spec.corpora.catalogue)
    for name, source in spec.corpora.sources.items():

        def changed(key: str, path: str, name: str = name) -> str:
            return change(f"corpora.sources.{name}.{key}", path)

        spec.corpora.sources[name] = source.with_paths(changed)
    return spec


def problems_of(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """The problems of a user's YAML, read as `model` (default: a spec), one for each key."""
    model = model or Spec
    found: dict[str, str] = {}
    for problem in error.errors():
        # pydantic names the branches of unions; the user does not know these names.
        parts = [str(p) for p in problem["loc"] if not (isinstance(p, str) and ("[" in p or p in ("float",)))]
        key = ".".join(parts) or model.__name__.lower()
        if problem["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{nearest(parts[-1], _keys_at(parts[:-1], model))}"
        elif problem["type"] == "missing":
            message = f"missing key {key!r}"
        else:
            message = f"{key}: {problem['msg'].removeprefix('Value error, ')} (found {_short(problem['input'])})"
        found.setdefault(key, message)
    return list(found.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(parents: list[str], model: type[BaseModel]) -> list[str]:
    for parent in parents:
        field = model.model_fields.get(parent)
        candidates = [field.annotation, *get_args(field.annotation)] if field is not None else []
        inner = [a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:  # an entry of a dictionary has no field of its own; its model was found one level up
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]
