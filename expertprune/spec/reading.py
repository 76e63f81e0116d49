"""Read a spec from YAML or plain data, and report all of its problems at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expertprune.errors import SpecError
from expertprune.files import problems_of, read_yaml, user_path
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
    spec = parse_spec(data, where=str(path), folder=path.resolve().parent, overrides=overrides)
    return trusting(spec, overrides)


TRUST = "base.trust_remote_code"


def trusting(spec: Spec, overrides: Mapping[str, Any] | None) -> Spec:
    """A spec from a file, with the trust in the base's code that the caller states.

    A file may come from anywhere, so what it says is no permission.
    """
    trusted = (overrides or {}).get(TRUST) is True
    return with_base(spec, trust_remote_code=trusted)


def with_base(spec: Spec, **changes: Any) -> Spec:
    """A copy of a spec with other values of `base`."""
    return spec.model_copy(update={"base": spec.base.model_copy(update=changes)})


def parse_spec(data: Any, where: str, folder: Path, overrides: Mapping[str, Any] | None = None) -> Spec:
    """Check a spec given as plain data, whose paths are relative to `folder`."""
    if not isinstance(data, dict):
        raise SpecError(f"{where}: a spec is a mapping of keys (name, base, dimensions, budget, ...)")
    if data.get("kind") == "plan":
        raise SpecError(f"{where}: is a plan, not a spec; run: expertprune prune {where}")
    data = copy.deepcopy(data)
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise SpecError([f"{where}: {problem}" for problem in problems_of(error, Spec)]) from None
    return _absolute(spec, folder)


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = _parts(data, dotted, value)
    for parent in parents:
        inner = data.get(parent)
        if not isinstance(inner, dict):
            shorthand = {"base": "model", "relevance": "criterion", "compensation": "method", "corpora": "catalogue"}
            inner = {shorthand[parent]: inner} if isinstance(inner, str) and parent in shorthand else {}
            data[parent] = inner
        data = inner
    data[last] = value


_SOURCES = ["corpora", "sources"]
_INSIDE = ("data_files", "generate")  # keys of a source that have keys of their own


def _parts(data: dict[str, Any], dotted: str, value: Any) -> list[str]:
    """The keys that a dotted key names. A corpus may have dots in its name, such as `node.js`."""
    parts = dotted.split(".")
    below = parts[2:]
    if parts[:2] != _SOURCES or len(below) < 2:
        return parts
    known: Any = data
    for key in _SOURCES:
        known = known.get(key) if isinstance(known, dict) else None
    lengths = range(len(below), 0, -1)
    length = next((each for each in lengths if ".".join(below[:each]) in (known or ())), None)
    if length is None and isinstance(value, dict) and below[-1] not in _INSIDE:
        length = len(below)  # a whole source
    elif length is None:
        length = len(below) - (2 if len(below) > 2 and below[-2] in _INSIDE else 1)
    return [*_SOURCES, ".".join(below[:length]), *below[length:]]


def _absolute(spec: Spec, folder: Path) -> Spec:
    model = folder / user_path(spec.base.model)
    if model.exists() or spec.base.model.startswith((".", "/", "~")) or spec.base.model.endswith(".gguf"):
        spec = with_base(spec, model=str(model.resolve()))
    return with_corpus_paths(spec, lambda _, path: str((folder / user_path(path)).resolve()), folder)


def with_corpus_paths(spec: Spec, change: Callable[[str, str], str], beside: Path | None = None) -> Spec:
    """A copy of a spec with every path below `corpora` changed.

    Args:
        change: from a path's dotted key and the path to the new path.
        beside: a data set that is a folder in this one has a path too.
    """
    corpora = spec.corpora
    changed: dict[str, Any] = {}
    if corpora.catalogue is not None:
        changed["catalogue"] = change("corpora.catalogue", corpora.catalogue)

    def below(name: str) -> Callable[[str, str], str]:
        return lambda key, path: change(f"corpora.sources.{name}.{key}", path)

    changed["sources"] = {name: source.with_paths(below(name), beside) for name, source in corpora.sources.items()}
    return spec.model_copy(update={"corpora": corpora.model_copy(update=changed)})
