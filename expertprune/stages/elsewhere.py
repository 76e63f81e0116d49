"""Send a prepared spec to another process, and check that both would compute the same."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from expertprune import __version__
from expertprune.artifacts.expert import portable_spec
from expertprune.engine.team import team
from expertprune.errors import UsageError
from expertprune.files import digest_of
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import run_dtype
from expertprune.models.running import RunningBase
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base, Spec
from expertprune.stages.validate import Found, Prepared, SpecLike, find, prepare, validate


def agreed(spec: SpecLike, overrides: Mapping[str, Any] | None, store: str | Path | None) -> Prepared:
    """`validate`, in every member of a team; the first one begins, and leaves what it has converted.

    Raises:
        UsageError: members disagree, or do not share the store.
    """
    with team().after_the_first():
        prepared = validate(spec, overrides, store)
    agree(prepared)
    return prepared


def agree(found: Found, out: Path | None = None) -> None:
    """Raises `UsageError` where members of a team have other inputs than the first, or do not share its folders.

    Members of a team fetch weights that are not here yet; a process alone does not.
    """

    def inputs() -> dict[str, str]:
        corpora = {str(name): corpus.digest for name, corpus in found.corpora.items()}
        spec = portable_spec(found.spec).document()
        return {**facts(found.base), "spec": digest_of(spec), "corpora": digest_of(corpora)}

    team().agree(inputs)
    team().check_shared(found.store, "--store")
    if out is not None:
        team().check_shared(out.absolute().parent, "--out")


def facts(base: ResolvedBase) -> dict[str, str]:
    """What members of a team must have in common to run a base."""
    return {
        "version of expertprune": __version__,
        "version of torch": torch.__version__,
        "version of transformers": importlib.metadata.version("transformers"),
        "checkpoint": base.digest,
        "tokenizer": base.tokenizer_digest,
        "chat template": base.templates_digest,
        "dtype": str(base.dtype),
        "kind of device": base.device.type,
    }


@dataclass(frozen=True)
class SentSpec:
    """A prepared spec as plain data, for a process that shares the store.

    Attributes:
        spec: its document.
        device, dtype: what the base runs with where the task comes from.
    """

    spec: Mapping[str, Any]
    store: str
    device: str
    dtype: str

    @classmethod
    def of(cls, prepared: Prepared) -> SentSpec:
        device, dtype = means_of(prepared.base)
        return cls(prepared.spec.document(), str(prepared.store.resolve()), device, dtype)

    def prepared(self) -> Prepared:
        """The prepared spec again. Specs that differ in the budget alone share the running base."""
        parsed = _parsed(self.spec)
        kept = parsed.budget.retention  # it holds calibration documents back
        budget = {"retention": kept.model_dump()} if kept is not None else {"parameters": 0.5}
        key = json.dumps({**self.spec, "budget": budget}, sort_keys=True)
        return prepare(_found(key, self.store, self.device, self.dtype), parsed.budget)


def means_of(base: ResolvedBase) -> tuple[str, str]:
    """The type of device and the dtype that a base runs with."""
    return base.device.type, str(base.dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=1)  # a base stays loaded from task to task; two would not fit
def _found(spec: str, store: str, device: str, dtype: str) -> Found:
    return run_with(find(_parsed(json.loads(spec)), Path(store)), device, dtype)


F = TypeVar("F", bound=Found)


def run_with(found: F, device: str | None, dtype: str = "auto") -> F:
    """What was found, with a base that runs on a type of device (`None`: as it does here).

    A GPU named in the spec stays. The machine that asks for tasks may lack the device.
    """
    if device is None:
        return found
    base = base_with(found.base, found.spec.base, device, dtype)
    return replace(found, base=base, running=RunningBase(base))


def base_with(base: ResolvedBase, spec: Base, device: str | None, dtype: str = "auto") -> ResolvedBase:
    """The same for a base alone; `dtype` is in place of the spec's."""
    if device is None:
        return base
    place = base.device if base.device.type == device else torch.device(device)
    wanted = spec.dtype if dtype == "auto" else dtype
    return replace(base, device=place, dtype=run_dtype(wanted, base.checkpoint.dtype, place))


def _parsed(spec: Mapping[str, Any]) -> Spec:
    return parse_spec(dict(spec), str(spec.get("name", "spec")), Path.cwd())


def check_same(task: str, expected: str, own: str) -> None:
    """Raises `UsageError` where this machine would make another result than the one that is asked for."""
    if own != expected:
        raise UsageError(
            f"{task}: {socket.gethostname()} would compute another result than the machine that asks: install the "
            "same versions of expertprune, torch and transformers, and give it the same files"
        )
